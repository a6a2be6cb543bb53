"""Runs optax's own optimizer tests, bodies unchanged, on Dynamic Subset Tuning.

    python scripts/optax_tests.py [FILE ...]

The test files ship in the optax wheel. Our rows join their tables of optimizers just before the test
class is made; only the tests of our rows are run, each file in a process of its own. Tests that ask
for convergence take the row with every entry free, all others the row with half of them free.
Complex parameters are left out: the transform refuses them.
"""

import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
import unittest
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax

FREE, HALF = "dst_optax_free", "dst_optax_half"
CONVERGENCE = ("test_optimization", "test_optimizers")
BY_NAME = """
{table} = type({table})([*{table}, *({{"opt_name": name, "opt_kwargs": {{"learning_rate": 1e-1}}{more}}}
    for name in ("dst_optax_free", "dst_optax_half"))])
"""
WRAPPER = ', "wrapper_name": None, "wrapper_kwargs": None'
ROWS = {
    "contrib/_common_test.py": BY_NAME.format(table="_MAIN_OPTIMIZERS_UNDER_TEST", more=WRAPPER)
    + BY_NAME.format(table="_ALL_OPTIMIZERS_UNDER_TEST", more=WRAPPER),
    "_src/alias_test.py": BY_NAME.format(table="_OPTIMIZERS_UNDER_TEST", more=""),
    "_src/float64_test.py": "ALL_MODULES.append(('dst_optax_half', alias.dst_optax_half, "
    "{'learning_rate': 1e-1}))",
    "_src/sharding_test.py": "from optax._src import alias\n"
    "OPTIMIZERS['dst_optax_half'] = alias.dst_optax_half(1.0)",
    "transforms/_accumulation_test.py": BY_NAME.format(table="OPTIMIZERS_TO_TEST", more=""),
}


def register() -> None:
    """Makes our rows' optimizers known to optax, where the tests look names up."""
    import optax
    from optax._src import alias

    import dst_optax

    def dst_optax_free(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return dst_optax.wrap(optax.adam(learning_rate), fraction_of_free_params=1.0)

    def dst_optax_half(
        learning_rate: optax.ScalarOrSchedule, fraction_of_free_params: float = 0.5
    ) -> optax.GradientTransformation:
        return dst_optax.wrap(optax.adam(learning_rate), fraction_of_free_params)

    for factory in (dst_optax_free, dst_optax_half):
        setattr(alias, factory.__name__, factory)


def load(file: str) -> types.ModuleType:
    """The test module with our rows in its tables, which its decorators read."""
    spec = importlib.util.find_spec("optax")
    assert spec is not None
    assert spec.submodule_search_locations
    path = f"{spec.submodule_search_locations[0]}/{file}"
    with open(path) as f:
        tree = ast.parse(f.read(), path)
    is_case = [
        isinstance(node, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in node.bases)
        for node in tree.body
    ]
    first = is_case.index(True)
    tree.body[first:first] = ast.parse(ROWS[file], "<our rows>").body
    module = types.ModuleType("optax_tests")
    sys.modules[module.__name__] = module
    exec(compile(tree, path, "exec"), module.__dict__)
    return module


def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


def ours(test: unittest.TestCase) -> bool:
    method = test._testMethodName.rstrip("0123456789")
    row = FREE if method in CONVERGENCE else HALF
    return row in test.id() and "complex" not in test.id()


def run(file: str) -> bool:
    register()
    module = load(file)
    selected = [t for t in cases(unittest.defaultTestLoader.loadTestsFromModule(module)) if ours(t)]
    # sharding_test.py compares versions as strings, by which 0.10 would come before 0.7.2
    version = f"9 ({jax.__version__})" if jax.__version_info__ >= (0, 10) else jax.__version__
    with mock.patch.object(jax, "__version__", version):
        result = unittest.TextTestRunner(verbosity=0).run(unittest.TestSuite(selected))
    ran = result.testsRun - len(result.skipped)
    print(f"{file}: {ran} tests of our rows ran, {len(result.skipped)} were skipped", flush=True)
    return result.wasSuccessful() and ran > 0


def run_alone(file: str) -> bool:
    return subprocess.run([sys.executable, __file__, file]).returncode == 0


def main(files: list[str]) -> int:
    if len(files) == 1:
        return int(not run(files[0]))
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(2) as pool:
        # MultiSteps outside of jit compiles the same program at every step
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        names = sorted(files or ROWS, reverse=True)  # the longest first
        failed = [file for file, passed in zip(names, pool.map(run_alone, names), strict=True) if not passed]
    print(f"failed: {', '.join(failed)}" if failed else "optax's tests pass on our rows")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
