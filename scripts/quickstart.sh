#!/usr/bin/env bash
# From nothing to a table and a plot: installs the project into .venv, pre-trains a tiny ByT5 on made-up
# tasks (once), then tunes it on a task that it has never seen, fully and by DST at three budgets.
#   scripts/quickstart.sh [DIRECTORY]     results go to runs/quickstart by default
set -euo pipefail
out=runs/quickstart
[ $# -eq 0 ] || out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
scripts/make_venv.sh
.venv/bin/python -c 'import clu, gin, matplotlib, orbax.checkpoint, rich, seqio, dst_optax.finetuning' 2>/dev/null ||
  .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[finetuning]'
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
.venv/bin/dst-optax finetune --gin_file=quickstart_seed.gin --gin.RUN_DIR=\""$out/seed"\"
.venv/bin/dst-optax finetune --gin_file=quickstart.gin --gin.RUN_DIR=\""$out/rte"\" \
  --gin.CHECKPOINT=\""$out/seed/pretrained/rng_0/tuned"\"
echo "The plot is $out/rte/scores.png, predictions and tuned models lie in $out/rte/*/rng_0/."
