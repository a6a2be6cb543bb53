#!/usr/bin/env bash
# Sets up .venv when it is missing and passes every check: lint, types, doctests, tests.
#   scripts/test.sh             everything
#   PYTHON=python3.12 JAX=0.7.2 scripts/test.sh    another interpreter, a given jax
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
scripts/make_venv.sh
"$python" -m pip install -q --disable-pip-version-check -e '.[test,dev,finetuning]' ${JAX:+"jax==$JAX"}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
"$python" -m ruff format --check .
"$python" -m ruff check .

# The contract and the examples are tested with XLA as it is installed. The rest compiles in two thirds of the time
# without its newer emitters and LLVM's optimisation; networks run too slowly without the latter.
slim="${XLA_FLAGS:-} --xla_cpu_use_fusion_emitters=false"
fast="$slim --xla_backend_optimization_level=0"
half=$((($(getconf _NPROCESSORS_ONLN) + 1) / 2)) # the library's tests and the application's share the cores

library() {
  "$python" -m pyright &&
    "$python" -m pytest -q -n "$half" --doctest-modules dst_optax -p no:cacheprovider &&
    XLA_FLAGS="$fast" "$python" -m pytest -q -n "$half" --dist loadgroup tests \
      --ignore tests/finetuning --ignore tests/test_contract.py "$@" &&
    XLA_FLAGS="$fast" "$python" scripts/optax_tests.py
}

application() {
  "$python" -m pytest -q -n "$half" tests/test_contract.py "$@" &&
    XLA_FLAGS="$slim" "$python" -m pytest -q -n "$half" --dist loadgroup tests/finetuning "$@"
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'kill %1 %2 2>/dev/null; exit 130' HUP INT TERM
set -m # each half is a job of its own: `kill` reaches all that it started, pytest's workers too, and no one else
library "$@" </dev/null >"$log" 2>&1 &
first=$!
application "$@" </dev/null &
status=0
wait $! || status=$?
wait "$first" || status=$?
cat "$log"
exit "$status"
