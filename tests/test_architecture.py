"""Which module may import which: arrows go one way, and there are no circles."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for name in ("dst_optax", "t5x_integration") for p in (ROOT / name).rglob("*.py"))


def name_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}


def imported(statements):
    """Names of what statements import; ``from a import b`` may mean the module ``a.b`` or a name in ``a``."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, "imports are absolute"
            for alias in statement.names:
                module = f"{statement.module}.{alias.name}"
                yield module if module in MODULES else statement.module


def at_import(name):
    """Ours that a module needs to be imported."""
    body = ast.parse(MODULES[name].read_text()).body
    return {x for x in imported(body) if x in MODULES} - {name}


def anywhere(name):
    """All that a module imports, in functions too."""
    return set(imported(ast.walk(ast.parse(MODULES[name].read_text()))))


def in_functions_too(name):
    return anywhere(name) & MODULES.keys() - {name}


@pytest.mark.parametrize("arrows", [at_import, in_functions_too])
def test_no_circles(arrows):
    graph = {name: arrows(name) for name in MODULES}
    assert sum(map(len, graph.values())) > len(MODULES)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError that names the modules


def test_a_module_is_told_from_a_name():
    code = "from dst_optax import subset, wrap\nimport dst_optax.counts"
    assert list(imported(ast.parse(code).body)) == ["dst_optax.subset", "dst_optax", "dst_optax.counts"]


# The core from its foundations upwards: a module imports only what stands before it.
CORE = ["counts", "budget", "tree", "silos", "distances", "floats", "state", "counting", "select"]
CORE += ["project", "rule", "transform", "diagnostics"]


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_a_ladder(name):
    below = {f"dst_optax.{other}" for other in CORE[: CORE.index(name)]}
    assert anywhere(f"dst_optax.{name}") & MODULES.keys() <= below


TOP = ("dst_optax.cli", "dst_optax.subset_cli", "t5x_integration")
PACKAGES = ("dst_optax.subset", "dst_optax.serving", "dst_optax.finetuning")  # from below


def is_in(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("floor", range(len(PACKAGES) + 1))
def test_no_arrow_goes_upward(floor):
    """From the core (no package) up to the last package, in functions too."""
    above = (*PACKAGES[floor:], *TOP)
    modules = [name for name in MODULES if name != "dst_optax" and not is_in(name, above)]
    assert modules
    for name in modules:
        upward = {x for x in anywhere(name) if is_in(x, above)}
        assert not upward, f"{name} imports {upward}"


@pytest.mark.parametrize(
    ("package", "place"), [("t5x", "t5x_integration"), ("vllm", "dst_optax.serving.vllm")]
)
def test_one_place_knows(package, place):
    importers = {name for name in MODULES if package in {x.split(".")[0] for x in anywhere(name)}}
    assert importers
    assert all(is_in(name, (place,)) for name in importers)
