#!/usr/bin/env bash
# Makes .venv with the first Python that fits, or checks the one that is there: 3.11 to 3.13, since tensorflow-text has
# no wheels for 3.14. PYTHON=... names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "make_venv.sh: $1" >&2
  exit 2
}

fits() {
  "$1" -c "import sys, $2; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null
}

if [ -e .venv ]; then
  fits .venv/bin/python pip || fail ".venv has no pip, or no Python 3.11 to 3.13; remove it and try again."
  exit
fi
pythons=(python3 python3.13 python3.12 python3.11)
[ -z "${PYTHON:-}" ] || pythons=("$PYTHON")
for python in "${pythons[@]}"; do
  if fits "$python" "ensurepip, venv"; then
    trap 'rm -rf .venv' EXIT # half of one would look like a whole one the next time
    "$python" -m venv .venv
    trap - EXIT
    exit
  fi
done
fail "no Python 3.11 to 3.13 with venv (Debian: apt install python3-venv) as ${pythons[*]}; PYTHON=... names another."
