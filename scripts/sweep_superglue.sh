#!/usr/bin/env bash
# Tunes a T5 with T5X on every task, with every fraction of free parameters and every random seed.
#
#   scripts/sweep_superglue.sh [--dry-run] --model=t5_1_1_small --out=gs://bucket/sweep \
#     [--tasks=cb,rte] [--fractions=0.1@1e-3,0.01@3e-3,full] [--seeds=0,1,2] [-- --gin.TRAIN_STEPS=1005000 ...]
#
# Runs on the machine where it is started; on a pod, start it on every worker. The fraction "full" tunes all
# parameters. A learning rate may follow a fraction: smaller budgets want larger ones (docs/budget.md). Each run
# lies in <out>/<task>/<fraction>/<seed>. Rerun the command to resume: finished runs are passed over quickly, and
# a run that fails is named at the end. --dry-run prints the commands and runs none.
# `python -m t5x_integration.collect gs://bucket/sweep runs/sweep` makes one table of them.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "sweep_superglue.sh: $1" >&2
  exit 2
}

dry_run=false model='' out='' more=() failed=()
every_task=boolq,cb,copa,multirc,record,rte,wic,wsc
tasks=$every_task fractions=0.1,0.01,0.001,full seeds=0
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=true ;;
    --model=*) model=${1#*=} ;;
    --out=*) out=${1#*=} ;;
    --tasks=*) tasks=${1#*=} ;;
    --fractions=*) fractions=${1#*=} ;;
    --seeds=*) seeds=${1#*=} ;;
    --)
      shift
      more=("$@")
      break
      ;;
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' scripts/sweep_superglue.sh
      exit 0
      ;;
    *) fail "unknown argument '$1'; the head of this file says what there is." ;;
  esac
  shift
done
[[ "$model" == t5_1_1_* && -f "configs/t5x/$model.gin" ]] || fail "--model='$model' is none of configs/t5x/t5_1_1_*.gin."
[ -n "$out" ] || fail "no --out."
[ -n "${tasks//,/}" ] || fail "--tasks is empty."
for task in ${tasks//,/ }; do
  [[ ",$every_task," == *",$task,"* ]] || fail "--tasks: '$task' is none of $every_task."
done
[ -n "${fractions//,/}" ] || fail "--fractions is empty."
number='^[0-9]*\.?[0-9]+([eE]-?[0-9]+)?$' seen=,
is_share() {
  [[ "$1" =~ $number ]] && awk -v x="$1" 'BEGIN { exit !(x + 0 <= 1) }'
}
for each in ${fractions//,/ }; do
  fraction=${each%@*} rate=${each#*@}
  [ "$fraction" = full ] || is_share "$fraction" ||
    fail "--fractions: '$each' is no share from 0 to 1 or 'full', with or without '@' and a learning rate."
  [[ "$rate" = "$each" || "$rate" =~ $number ]] || fail "--fractions: '$rate' in '$each' is no learning rate."
  [[ "$seen" != *",$fraction,"* ]] || fail "--fractions: '$fraction' is there twice; its runs would share directories."
  seen+="$fraction,"
done
[[ "$seeds" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--seeds: '$seeds' is no list of numbers."

python=.venv/bin/python
[ -x "$python" ] || python=python3
for task in ${tasks//,/ }; do
  for each in ${fractions//,/ }; do
    fraction=${each%@*}
    for seed in ${seeds//,/ }; do
      flags=("--gin_file=configs/t5x/$model.gin")
      [ "$fraction" = full ] || flags+=(--gin_file=configs/t5x/dst.gin "--gin.FRACTION=$fraction")
      [ "$fraction" = "$each" ] ||
        flags+=("--gin.utils.create_learning_rate_scheduler.base_learning_rate=${each#*@}")
      flags+=(
        "--gin.TASKS=[\"$task\"]" "--gin.RANDOM_SEED=$seed" "--gin.train/utils.DatasetConfig.seed=$seed"
        "--gin.MODEL_DIR=\"$out/$task/$fraction/$seed\"" ${more[@]+"${more[@]}"}
      )
      if $dry_run; then
        printf '%q ' "$python" -m t5x_integration.train "${flags[@]}"
        echo
      else
        "$python" -m t5x_integration.train "${flags[@]}" || failed+=("$task/$fraction/$seed")
      fi
    done
  done
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "sweep_superglue.sh: these runs failed, rerun the command to try them again: ${failed[*]}" >&2
  exit 1
fi
