#!/usr/bin/env bash
# Sets up .venv when it is missing and passes every check: lint, types, doctests, tests.
#   scripts/test.sh             everything
#   PYTHON=python3.12 JAX=0.7.2 scripts/test.sh    another interpreter, a given jax
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
"$python" -m pip install -q --disable-pip-version-check -e '.[test,dev,finetuning]' ${JAX:+"jax==$JAX"}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m pyright
"$python" -m pytest -q --doctest-modules dst_optax -p no:cacheprovider
"$python" -m pytest -q -n 2 --dist loadgroup tests --ignore tests/finetuning "$@"
# the application's networks compile in half the time without XLA's newer emitters; the core is tested with them
XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_use_fusion_emitters=false" \
  "$python" -m pytest -q -n 2 --dist loadgroup tests/finetuning "$@"
"$python" scripts/optax_tests.py
