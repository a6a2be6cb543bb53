"""Runs T5X's own unit tests of optimizers and what holds them, bodies unchanged, on Dynamic Subset Tuning.

    python scripts/t5x_tests.py [wrapper|chain|theirs FILE ...]

Needs T5X, as README says ("T5X on TPU"), and `t5`, which its tests import. Where a test makes an optimizer
of T5X, it gets ours around it ("wrapper"), or a chain that ends in DST ("chain"); "theirs" changes nothing.
Every entry is free, by a schedule, so that the seed is kept and results must be those of T5X's optimizer.
Each file runs in a process of its own. What fails must be what DIFFERENT lists, with the reason.
"""

import importlib
import os
import subprocess
import sys
import unittest
from collections.abc import Iterator
from typing import Any

FILES = ("adafactor_test", "optimizers_test", "partitioning_test", "train_state_test", "trainer_test")
WAYS = ("wrapper", "chain")
DIFFERENT: dict[tuple[str, str], dict[str, str]] = {}


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


def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


def run(way: str, file: str) -> bool:
    from absl import flags

    from t5x_integration import compat

    compat.make_importable()
    flags.FLAGS([__file__])
    replace(way)
    suite = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(f"t5x.{file}"))
    result = unittest.TextTestRunner(verbosity=0).run(suite)
    failed = {
        test.id().removeprefix(f"t5x.{file}."): words for test, words in result.failures + result.errors
    }
    expected = DIFFERENT.get((way, file), {})
    surprises = [name for name in failed if name not in expected]
    passed = [name for name in expected if name not in failed]
    for name in surprises:
        print(f"  {name}: {failed[name].strip().splitlines()[-1][:200]}")
    for name in passed:
        print(f"  {name} passes, though DIFFERENT lists it")
    print(f"{file} {way}: {result.testsRun - len(failed)} of {result.testsRun} tests pass", flush=True)
    return not surprises and not passed and result.testsRun > 0


def run_alone(way: str, file: str) -> bool:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.run([sys.executable, __file__, way, file], env=environment).returncode == 0


def main(arguments: list[str]) -> int:
    if len(arguments) == 2:
        return int(not run(*arguments))
    ways, files = arguments[:1] or WAYS, arguments[1:] or FILES
    failed = [f"{file} {way}" for way in ways for file in files if not run_alone(way, file)]
    print(f"failed: {', '.join(failed)}" if failed else "T5X's tests pass on DST, but for those listed")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
