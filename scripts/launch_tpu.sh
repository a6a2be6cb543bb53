#!/usr/bin/env bash
# T5X with DST on a TPU VM or a pod slice, from creation to deletion.
#
#   scripts/launch_tpu.sh [--dry-run] all --name=dst --zone=us-west4-a --type=v5litepod-256 \
#     --model_dir=gs://bucket/rte -- --gin_file=configs/t5x/t5_1_1_xxl.gin --gin_file=configs/t5x/dst.gin \
#     --gin.TASKS='["rte"]'
#
# Commands: create, install, run, fetch, delete, or all of them in this order. `run` starts T5X on every
# worker; a preempted TPU is made anew as soon as there is one, and T5X resumes from its last checkpoint in
# --model_dir. For that, give `run` the --type, --version and --spot of `create`. What is installed is the last
# commit. `fetch` writes the subset to --out (default runs/<name>).
# Options: --project=, --version= (runtime; the default depends on --type), --spot, --out=. --dry-run prints the
# commands and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."

T5X=git+https://github.com/google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16

fail() {
  echo "launch_tpu.sh: $1" >&2
  exit 2
}

dry_run=false spot=() project=() name='' zone='' type='' version='' model_dir='' out=''
command='' gin=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=true ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=("--project=${1#*=}") ;;
    --model_dir=*) model_dir=${1#*=} ;;
    --out=*) out=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --)
      shift
      gin=("$@")
      break
      ;;
    create | install | run | fetch | delete | all) command=$1 ;;
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' scripts/launch_tpu.sh
      exit 0
      ;;
    *) fail "unknown argument '$1'; --help says what there is." ;;
  esac
  shift
done
[ -n "$command" ] || fail "no command: create, install, run, fetch, delete or all."
[ -n "$name" ] || fail "no --name."
[ -n "$zone" ] || fail "no --zone."
case "$command" in
  create | run | all) [ -n "$type" ] || fail "no --type, for example v5litepod-8." ;;
esac
case "$command" in
  run | fetch | all)
    [[ "$model_dir" == gs://?* ]] || fail "--model_dir='$model_dir' is not gs://..., where checkpoints outlive the TPU."
    ;;
esac
case "$command" in
  run | all)
    [ ${#gin[@]} -gt 0 ] || fail "no gin flags after --."
    [[ " ${gin[*]} " == *configs/t5x/dst.gin\ * ]] || fail "no dst.gin among the gin files: all parameters would be tuned."
    ;;
esac
case "$type" in
  v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
  v5p-*) version=${version:-v2-alpha-tpuv5} ;;
  v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
  *) version=${version:-tpu-ubuntu2204-base} ;;
esac
out=${out:-runs/$name}
case "$command" in
  fetch | all) [ ! -e "$out" ] || fail "$out exists, so the subset would land inside it; give another --out." ;;
esac

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" "--zone=$zone" ${project[@]+"${project[@]}"}
}

on() {
  tpu ssh "$name" "--worker=$1" "--command=$2"
}

create() {
  tpu create "$name" "--accelerator-type=$type" "--version=$version" ${spot[@]+"${spot[@]}"}
}

install() {
  local archive=dst-optax.tar.gz local_copy=/tmp/dst-optax.tar.gz
  $dry_run || local_copy=$(mktemp)
  [ -z "$(git status --porcelain --untracked-files=no)" ] ||
    echo "launch_tpu.sh: the last commit is installed, without the changes that are not committed." >&2
  run git archive --format=tar.gz --output="$local_copy" HEAD
  tpu scp "$local_copy" "$name:$archive" --worker=all
  $dry_run || rm -f "$local_copy"
  # Ubuntu 22.04, which most images are, has Python 3.10; then uv brings a newer one.
  on all "rm -rf dst-optax && mkdir dst-optax && tar -xzf $archive -C dst-optax && cd dst-optax && \
{ scripts/make_venv.sh || { curl -LsSf https://astral.sh/uv/install.sh | sh && \
~/.local/bin/uv venv --seed --python 3.12 .venv; }; } && \
.venv/bin/pip install -q -r configs/t5x/requirements.txt 'jax[tpu]==0.10.2' && \
.venv/bin/pip install -q --no-deps $T5X && .venv/bin/pip install -q -e '.[finetuning]'"
}

preempted() {
  $dry_run && return 1
  local state
  state=$(gcloud compute tpus tpu-vm describe "$name" "--zone=$zone" ${project[@]+"${project[@]}"} \
    '--format=value(state)')
  [ "$state" = PREEMPTED ] || [ "$state" = TERMINATED ]
}

train() {
  local flags
  printf -v flags '%q ' "${gin[@]}" "--gin.MODEL_DIR=\"$model_dir\""
  until on all "cd dst-optax && .venv/bin/python -m t5x_integration.train $flags"; do
    preempted || fail "training failed; its output is above."
    echo "launch_tpu.sh: $name was preempted; making it anew."
    delete
    until create; do
      echo "launch_tpu.sh: it was not made, see above; trying again in five minutes. Ctrl-C ends that; nothing is lost."
      sleep "${RETRY_SECONDS:-300}"
    done
    install
  done
}

fetch() {
  local quoted
  printf -v quoted '%q' "$model_dir"
  on 0 "cd dst-optax && rm -rf subset && \
JAX_PLATFORMS=cpu .venv/bin/python -m t5x_integration.export $quoted subset"
  run mkdir -p "$(dirname "$out")"
  tpu scp "$name:dst-optax/subset" "$out" --recurse --worker=0
}

delete() {
  tpu delete "$name" --quiet
}

remind() {
  [ $? -eq 0 ] || echo "launch_tpu.sh: $name may still exist and cost money: scripts/launch_tpu.sh delete" \
    "--name=$name" "--zone=$zone" ${project[@]+"${project[@]}"} >&2
}

$dry_run || trap remind EXIT
case "$command" in
  run) train ;;
  all)
    create
    install
    train
    fetch
    delete
    ;;
  *) "$command" ;;
esac
