"""What the docs say is so: their Python runs, the API reference is whole, the errors they explain exist."""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import benchmarks_page
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("dst_optax", "t5x_integration")
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<note>[\w ]+) -->\n+)?```python\n(?P<code>.*?)^```", re.M | re.S)

# Modules whose functions and classes are public, and which of those are not.
PUBLIC = {
    "dst_optax": {"diagnostics", "distances", "project", "serving", "silos", "subset"},  # pages of their own
    "dst_optax.silos": {"check_fraction", "check_scalar", "groups_that_share_silos"},
    "dst_optax.distances": set(),
    "dst_optax.diagnostics": set(),
    "dst_optax.project": {"project_updates"},
    "dst_optax.rule": set(),
    "dst_optax.reference": {"ReferenceState"},
    "dst_optax.subset": {"fingerprint", "fingerprints"},  # described where they are defined
    "dst_optax.subset.fingerprint": {"changed"},
    "dst_optax.subset.models": {"shard_files"},
    "dst_optax.subset.coordinates": {"to_hf", "from_hf"},  # described as methods
    "dst_optax.subset.versions": set(),
    "dst_optax.subset.peft": set(),
    "dst_optax.serving": set(),
    "dst_optax.serving.torch": set(),
    "dst_optax.serving.vllm": {"SubsetEndpoints", "register"},  # entry points, called by vLLM
}
# What other functions return; their examples show it.
RETURNED = {
    "dst_optax.DynamicSubsetTuningState",
    "dst_optax.project.Projection",
    "dst_optax.serving.store.Listed",
    "dst_optax.silos.LeafPlan",
    "dst_optax.silos.SiloPlan",
    "dst_optax.silos.Silos",
    "dst_optax.subset.SubsetError",
}


def blocks(page):
    """The code that can run here, padded so that an error names the page's line.

    A comment before a block says ``not run``, or ``needs`` and the packages without which it is left out.
    """
    text = page.read_text()
    for found in BLOCK.finditer(text):
        note = found["note"] or ""
        missing = [p for p in note.removeprefix("needs").split() if importlib.util.find_spec(p) is None]
        if not missing and note != "not run":
            yield "\n" * text[: found.start("code")].count("\n") + found["code"]


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p))], ids=lambda p: p.name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)


def definitions(module):
    """Top-level functions and classes of a module, read without importing it."""
    path = ROOT / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text()).body
    return {x.name: x for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef)}, body


def public_names(module):
    found, body = definitions(module)
    names = {name for name in found if not name.startswith("_")}
    for x in body:
        if isinstance(x, ast.Assign) and [t.id for t in x.targets if isinstance(t, ast.Name)] == ["__all__"]:
            names = set(ast.literal_eval(x.value))
    return {f"{module}.{name}" for name in names - PUBLIC[module]}


def documented():
    text = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    return re.findall(r"^::: (\S+)", text, re.M)


def test_the_api_reference_has_every_public_name_once():
    wanted = {name for module in PUBLIC for name in public_names(module)} | {"dst_optax.serving.store.Listed"}
    assert sorted(documented()) == sorted(wanted)


@pytest.mark.parametrize("name", sorted(set(documented()) - RETURNED))
def test_every_public_name_has_an_example(name):
    module, _, own = name.rpartition(".")
    found, _ = definitions(module)
    if own not in found:  # the package hands on what another module defines
        found, _ = definitions(getattr(importlib.import_module(module), own).__module__)
    assert re.search(r"^Example:|Example::$", ast.get_docstring(found[own]) or "", re.M)


def test_the_errors_that_are_explained_exist():
    """Each row of the page quotes a message up to where it names a parameter or value."""
    strings = []
    for file in [f for package in PACKAGES for f in (ROOT / package).rglob("*.py")]:
        strings += [x.value for x in ast.walk(ast.parse(file.read_text())) if isinstance(x, ast.Constant)]
    said = "\n".join(x for x in strings if isinstance(x, str))
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(), re.M)
    assert len(quoted) > 10
    assert [q for q in quoted if not all(part in said for part in q.split(" … "))] == []


def test_links_and_figures_of_the_readme_exist():
    """The site's build checks those of the other pages."""
    targets = re.findall(r"\]\(([^)#]+)|src(?:set)?=\"([^\"]+)\"", (ROOT / "README.md").read_text())
    local = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_benchmarks_page_is_that_of_its_records():
    records = [json.loads(file.read_text()) for file in sorted((DOCS / "benchmarks").glob("*.json"))]
    assert (DOCS / "benchmarks.md").read_text() == benchmarks_page.page(records)


def test_a_record_becomes_a_table_with_its_origin():
    record = {
        "environment": {
            "machine": {"device": "1 x chip", "processor": "some", "cpus": 3, "memory_gb": 7},
            "versions": {"jax": "1.2.3"},
            "date": "2031-02-03",
            "command": "python scripts/benchmark.py selection",
        },
        "cells": [
            {
                "part": "selection",
                "n": 10_000,
                "fraction": fraction,
                "passes": {"warm": 4, "cold": 9},
                "times": {"warm": {"ms": 1.234}, "np.partition": {"ms": 456.7}},
            }
            for fraction in (0.5, 0.1)
        ],
    }
    found = benchmarks_page.page([record])
    assert "| 10,000 | 0.1 | 4 | 1.23 ms | 457 ms |" in found
    assert found.count("python scripts/benchmark.py selection`") == 1
    assert all(word in found for word in ("1 x chip", "jax 1.2.3", "2031-02-03"))
    assert found.count("No record yet") == len(benchmarks_page.PARTS) - 1
