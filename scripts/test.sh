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
# The contract and the examples are tested with XLA as it is installed. The rest compiles in two thirds of the time
# without its newer emitters and LLVM's optimisation; networks run too slowly without the latter.
"$python" -m pytest -q -n 2 --doctest-modules dst_optax tests/test_contract.py "$@"
slim="${XLA_FLAGS:-} --xla_cpu_use_fusion_emitters=false"
XLA_FLAGS="$slim --xla_backend_optimization_level=0" \
  "$python" -m pytest -q -n 2 --dist loadgroup tests --ignore tests/finetuning --ignore tests/test_contract.py "$@"
XLA_FLAGS="$slim" "$python" -m pytest -q -n 2 --dist loadgroup tests/finetuning "$@"
XLA_FLAGS="$slim" "$python" scripts/optax_tests.py
