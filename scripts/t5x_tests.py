"""Runs T5X's own unit tests of optimizers and what holds them, bodies unchanged, on Dynamic Subset Tuning.

    python scripts/t5x_tests.py [wrapper|chain|theirs [FILE[.CLASS[.TEST]]]]

Needs T5X and T5, which its tests import, as docs/t5x.md says. Where a test makes an optimizer
of T5X, it gets ours around it ("wrapper"), or a chain that ends in DST ("chain"); "theirs" changes nothing.
Every entry is free, by a schedule, so that the seed is kept and results must be those of T5X's optimizer.
Each file runs in a process of its own. What fails must be what DIFFERENT lists, with the reason.
"""

import os
import subprocess
import sys
import unittest
from typing import Any

from optax_tests import cases

OPTAX = ("optimizers_test", "partitioning_test", "train_state_test", "trainer_test")
FILES = {"wrapper": ("adafactor_test", *OPTAX), "chain": OPTAX, "theirs": ("adafactor_test", *OPTAX)}
FIELD = "it compares the state with one that has no field of ours"
MADE = "it makes the state by hand, without ours"
BOTH = {
    "BasicTest.test_adamw_state_serialization": FIELD,
    "BasicTest.test_logical_axes_adamw": FIELD,
}
DEFAULT = ("wrapper", "chain")
DIFFERENT = {
    "theirs": {},
    "chain": BOTH,
    "wrapper": BOTH
    | {
        "AdafactorTest.test_apply_gradient": MADE,
        "AdafactorTest.test_apply_gradient_with_global_norm_clipping": MADE,
        "AdafactorTest.test_init_state": FIELD,
        "AdafactorTest.test_multiply_by_parameter_scale_equivalence0": "it puts DST into a MultiOptimizer",
        "AdafactorTest.test_multiply_by_parameter_scale_equivalence1": "it puts DST into a MultiOptimizer",
        "ModelBasedPartitionerTest.test_get_mesh_axes": MADE,
        "FlaxOptimTrainStateTest.test_create": "its model names no axes, which ours asks for scanned layers",
        "FlaxOptimTrainStateTest.test_restore_state": MADE,
        "FlaxOptimTrainStateTest.test_to_state_dict": FIELD,
    },
}


def all_free(step: Any) -> float:
    """A schedule, so that DST keeps the seed of tensors that are free at every step."""
    del step
    return 1.0


def stand_in(theirs: Any, ours: Any) -> type:
    """A class of T5X that makes our optimizers; what else it has is its own."""
    return type(theirs.__name__, (theirs,), {"__new__": lambda cls, *args, **kwargs: ours(*args, **kwargs)})


def replace(way: str) -> None:
    """Puts ours in the place of T5X's, where the tests look them up."""
    import optax
    from t5x import adafactor, optimizers

    import dst_optax
    from t5x_integration import optimizers as ours

    theirs = optimizers.OptaxWrapper, adafactor.Adafactor
    if way == "wrapper":

        def wrapped(inner: Any) -> Any:
            return lambda *args, **kwargs: ours.dynamic_subset_tuning(inner(*args, **kwargs), all_free)

        optimizers.OptaxWrapper, adafactor.Adafactor = (stand_in(x, wrapped(x)) for x in theirs)
    elif way == "chain":

        def chained(transform: Any) -> Any:
            dst = dst_optax.dynamic_subset_tuning(all_free)
            return ours.OptaxWrapper(optax.chain(transform, dst))

        optimizers.OptaxWrapper = stand_in(theirs[0], chained)


def name_of(test: unittest.TestCase) -> str:
    return f"{type(test).__name__}.{test._testMethodName}"


def run(way: str, name: str) -> bool:
    from absl import flags

    from t5x_integration import compat

    compat.make_importable()
    flags.FLAGS([__file__])
    replace(way)
    return judge(way, name, list(cases(unittest.defaultTestLoader.loadTestsFromName(f"t5x.{name}"))))


def judge(way: str, name: str, tests: list[unittest.TestCase]) -> bool:
    """Runs tests; whether there were any, and just those failed that DIFFERENT lists."""
    result = unittest.TextTestRunner(verbosity=0).run(unittest.TestSuite(tests))
    failed = {name_of(test): words for test, words in result.failures + result.errors}
    ran = {name_of(test) for test in tests} - {name_of(test) for test, _ in result.skipped}
    different = DIFFERENT.get(way, {}).keys() & ran
    for test in sorted(failed.keys() - different):
        print(f"  {test}: {failed[test].strip().splitlines()[-1][:200]}")
    for test in sorted(different - failed.keys()):
        print(f"  {test} passes, though DIFFERENT lists it")
    skipped = f", {len(result.skipped)} were skipped" if result.skipped else ""
    print(f"{name}, {way}: {len(ran - failed.keys())} of {len(ran)} tests pass{skipped}", flush=True)
    return failed.keys() == different and bool(ran)


def run_alone(way: str, name: str) -> bool:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.run([sys.executable, __file__, way, name], env=environment).returncode == 0


def main(arguments: list[str]) -> int:
    if len(arguments) == 2:
        return int(not run(*arguments))
    failed = [
        f"{name}, {way}" for way in arguments or DEFAULT for name in FILES[way] if not run_alone(way, name)
    ]
    print(f"failed: {', '.join(failed)}" if failed else "T5X's tests pass on DST, but for those listed")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
