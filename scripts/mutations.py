"""Breaks each rule of the contract once, and shows which tests turn red.

    python scripts/mutations.py            all rules
    python scripts/mutations.py nonfinite  those whose name holds the word

The checkout is copied, the copy is broken, and the tests that should notice are run there. Every rule
must turn its tests red; the exit status is 1 if one does not.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    """One way to break a rule."""

    rule: str
    file: str  # under dst_optax
    old: str
    new: str
    tests: str  # arguments of pytest


MUTATIONS = [
    Mutation(
        "rank: ceil", "budget.py", "-(-product.numerator // product.denominator)",
        "product.numerator // product.denominator", "tests/test_contract.py -k sgd",
    ),
    Mutation(
        "rank: shortest decimal", "budget.py", "Fraction(str(fraction))", "Fraction(fraction)",
        "tests/test_budget.py",
    ),
    Mutation(
        "rank: largest remainder", "budget.py", "key=lambda i: (-(", "key=lambda i: ((",
        "tests/test_budget.py",
    ),
    Mutation(
        "rank: rounding interval of a traced fraction", "budget.py", "(jnp.uint32(1) << (k + 1)",
        "(0 * (k + 1)", "tests/test_budget.py",
    ),
    Mutation(
        "rank: rounding interval in half precision", "budget.py", "k = max(23 - info.nmant, 0)", "k = 0",
        "tests/test_budget.py",
    ),
    Mutation(
        "rank: rounding interval of a power of two", "budget.py", "(exponent > info.minexp)",
        "(exponent < -200)", "tests/test_budget.py",
    ),
    Mutation(
        "rank: ties at the threshold are reverted", "select.py", "(x.values > above) |",
        "(x.values >= above) |", "tests/test_contract.py -k strict",
    ),
    Mutation(
        "rank: fill takes ties in a fixed order", "select.py", "return _mix(index)", "return (index)",
        "tests/test_transform.py -k fill_orders_ties",
    ),
    Mutation(
        "rank: fill meets the budget", "select.py", "tie=jnp.where(lacking, t, -2)",
        "tie=jnp.where(lacking, -2, -2)", "tests/test_transform.py -k 'fill and oracle'",
    ),
    Mutation(
        "rank: what equals the seed has no distance", "select.py", "(bits(theta_hat) == bits(seed)) | ", "",
        "tests/test_distances.py -k equals_the_seed",
    ),
    Mutation(
        "rank: subnormal distances are 0", "select.py", " | (delta < jnp.finfo(wide).tiny)", "",
        "tests/test_distances.py -k subnormal",
    ),
    Mutation(
        "rank: forced rounding of updates", "floats.py", "own ^ zero.astype(own.dtype)", "own",
        "tests/test_transform.py -k products_in_the_same_program",
    ),
    Mutation(
        "reverted: apply_updates sets the seed", "transform.py",
        "jnp.where(leaf.mask | ~leaf.captured, p, leaf.seed)", "p",
        "tests/test_transform.py -k 'exact_apply or oracle'",
    ),
    Mutation(
        "reverted: finalize sets the seed", "transform.py",
        "return state_lib.map_leaf_states(_restore_outside, params, state)", "return params",
        "tests/test_transform.py -k finalize",
    ),
    Mutation(
        "reverted: the mask is in the state", "rule.py",
        "state._replace(mask=mask, step", "state._replace(step",
        "tests/test_contract.py -k sgd",
    ),
    Mutation(
        "reverted: updates lead back to the seed", "project.py", "difference(seed, params[i], u.dtype)",
        "jnp.zeros_like(u)", "tests/test_transform.py -k lead_back",
    ),
    Mutation(
        "seed: the first update captures", "state.py", "captured=jnp.zeros((), bool)",
        "captured=jnp.ones((), bool)", "tests/test_transform.py -k first_update",
    ),
    Mutation(
        "seed: later updates do not", "state.py",
        "            state.captured, [_placed", "            state.captured & False, [_placed",
        "tests/test_contract.py -k sgd",
    ),
    Mutation(
        "seed: a new one leaves parameters as they are", "state.py", "lambda x: ~_nowhere(x), state.seed",
        "lambda x: _nowhere(x), state.seed", "tests/test_transform.py -k new_seed",
    ),
    Mutation(
        "seed: a new one forgets thresholds", "state.py",
        "threshold=jax.tree.map(jnp.zeros_like, state.memory.threshold),",
        "threshold=state.memory.threshold,", "tests/test_transform.py -k new_seed",
    ),
    Mutation(
        "subset: told by bits", "transform.py", "(bits(jnp.asarray(p)) != bits(leaf.seed))",
        "(jnp.asarray(p) != leaf.seed)", "tests/test_transform.py -k told_by_bits",
    ),
    Mutation(
        "silos: spelled alike are not one", "silos.py", "return Silos(_Own, stacked,",
        "return Silos(lambda *at: str(_Own(*at)), stacked,", "tests/test_silos.py -k spelled",
    ),
    Mutation(
        "silos: the longer prefix wins", "tree.py", "return max(above, key=lambda pair: len(pair[0]))[1]",
        "return above[0][1]", "tests/test_tree.py",
    ),
    Mutation(
        "nonfinite: counted where all are free at every step", "project.py",
        "counts = [jnp.sum(~jnp.isfinite(x), dtype=jnp.float32) for x in free]", "counts = []",
        "tests/test_diagnostics.py -k free_too",
    ),
    Mutation(
        "seed: init copies", "state.py", "return jnp.array(x, copy=True)", "return x",
        "tests/test_structure.py -k every_buffer",
    ),
    Mutation(
        "nonfinite: kept", "select.py", "keys, jnp.full_like(keys, -1))", "keys, jnp.full_like(keys, 0))",
        "tests/test_transform.py -k not_a_number",
    ),
    Mutation(
        "nonfinite: counted", "select.py", "total - bracket.ranked)", "none)", "tests/test_diagnostics.py",
    ),
    Mutation(
        "nonfinite: an infinite distance ranks largest", "select.py",
        "jnp.where(jnp.isnan(delta), jnp.inf, delta)",
        "jnp.where(jnp.isinf(delta), 0.0, delta)", "tests/test_distances.py -k overflows",
    ),
    Mutation(
        "nonfinite: the state holds none of ours", "select.py",
        "jnp.minimum(real, jnp.finfo(jnp.float32).max)", "jnp.where(real > 0, jnp.inf, real)",
        "tests/test_transform.py -k infinite_or_nan",
    ),
    Mutation(
        "sharding: the mask lies as the parameters do", "state.py", "return jnp.isnan(x) & jnp.isinf(x)",
        "return jnp.zeros(x.shape, bool)", "tests/test_sharding.py -k keep_their_shardings",
    ),
    Mutation(
        "sharding: only counts cross devices", "counting.py", "if jax.device_count() > 1 or", "if False or",
        "tests/test_sharding.py -k 'only_counts or equal_one'",
    ),
    Mutation(
        "state: plain names", "state.py", "step: jax.Array  # (), int32: updates so far",
        "count: jax.Array  # (), int32: updates so far", "tests/test_transform.py -k small_and_named",
    ),
    Mutation(
        "state: of the same plan", "state.py", "if fingerprint != plan.fingerprint:", "if False:",
        "tests/test_frameworks.py -k another_plan",
    ),
    Mutation(
        "composable: disjoint states only", "state.py", "if path in by_path:", "if False:",
        "tests/test_diagnostics.py -k two_states",
    ),
    Mutation(
        "composable: no callable default", "transform.py",
        'None,\n    ties: str = "strict",\n) -> optax.GradientTransformationExtraArgs:\n    """Lets',
        'distances.absolute,\n    ties: str = "strict",\n) -> Any:\n    """Lets',
        "tests/test_wrappers.py -k inject",
    ),
    Mutation(
        "rank: silos of one size lie apart", "counting.py", "(batch_of.get(s, len(batches)), sizes[s])", "s",
        "tests/test_transform.py -k neighbours",
    ),
    Mutation(
        "speed: kernels without constants", "counting.py",
        "return _row(jnp.asarray(np.array([i, i + 1], np.uint32)), zero).reshape(())",
        "return jnp.uint32(i)", "tests/test_structure.py -k compilation",
    ),
    Mutation(
        "speed: one batch in memory", "floats.py",
        "    zero, xs = lax.while_loop(lambda carry: carry[0] != 0, turn, (zero, xs))\n", "",
        "tests/test_structure.py -k temporary_memory",
    ),
]  # fmt: skip


def turns_red(mutation: Mutation) -> bool:
    """Whether the tests fail on a broken copy, and for no other reason than that they fail."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(ROOT / "dst_optax", copy / "dst_optax", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "dst_optax" / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.rule}: {mutation.file} has {text.count(mutation.old)} places {mutation.old!r}."
            )
        file.write_text(text.replace(mutation.old, mutation.new))
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider --no-header {mutation.tests}"
        env = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(command, shell=True, cwd=copy, env=env, capture_output=True, text=True)
        last = done.stdout.strip().splitlines()[-1:]
        print(
            f"{'red  ' if done.returncode == 1 else 'GREEN'}  {mutation.rule}: {' '.join(last)}", flush=True
        )
        return done.returncode == 1


def main() -> int:
    """Runs the mutations that the command line names."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if all(word in m.rule for word in words)]
    return 0 if all([turns_red(m) for m in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
