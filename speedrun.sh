#!/usr/bin/env bash
# From raw text to a trained base model, on whatever machine this is:
#
#   with GPUs    FineWeb-EDU from the hub; a d20 on 8 of them, a d12 on fewer
#   without      a small model on the documentation of your own Python, in about eight minutes on two cores
#
#   bash speedrun.sh            run, or go on where the last run stopped
#   bash speedrun.sh --fresh    do every stage again
#
# Settings: NANOCHAT_BASE_DIR, NPROC_PER_NODE, WANDB_RUN, DATA (hub, embedded or a path of your own texts), DEPTH,
# DEVICE_BATCH_SIZE (rows of one forward).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "speedrun: $*" >&2; exit 1; }
case "${1:-}" in "" | --fresh) ;; *) fail "unknown argument '$1'; usage: bash speedrun.sh [--fresh]" ;; esac
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
export PYTHONUNBUFFERED=1
state=$NANOCHAT_BASE_DIR/speedrun
mkdir -p "$state" 2>/dev/null && [ -w "$state" ] || fail "cannot write to $NANOCHAT_BASE_DIR; set NANOCHAT_BASE_DIR"
[ -z "${1:-}" ] || rm -f "$state"/*.done
bash dev/setup.sh
python=.venv/bin/python

# ---- the machine and the run it is good for

read -r gpus gib < <($python -c '
import torch
n = torch.cuda.device_count()
print(n, min((torch.cuda.get_device_properties(i).total_memory for i in range(n)), default=0) >> 30)')
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
data=${DATA:-$([ "$gpus" -gt 0 ] && echo hub || echo embedded)}
if [ "$gpus" -gt 0 ] && [ "$data" != embedded ]; then
    depth=${DEPTH:-$((ranks >= 8 ? 20 : 12))}
    # rows of 2,048 tokens for a d12 (dev/LOG.md), half as many beyond; powers of two, so that the batch divides
    rows=$((gib >= 75 ? 32 : gib >= 38 ? 16 : gib >= 22 ? 8 : gib >= 14 ? 4 : 2))
    rows=${DEVICE_BATCH_SIZE:-$((depth > 12 ? rows / 2 : rows))}
    vocab=65536
    flags=()
else
    depth=${DEPTH:-4}
    rows=${DEVICE_BATCH_SIZE:-8}
    vocab=4096
    flags=(--max-seq-len=256 --total-batch-size=8192 --num-iterations=110)
    flags+=(--warmdown-ratio=0.5 --eval-every=50 --save-every=50)
fi
echo "speedrun: $gpus GPU(s) of $gib GiB, $ranks rank(s), data $data, depth $depth, files in $NANOCHAT_BASE_DIR"

# ---- stages

# stage NAME MODULE RANKS FLAGS...: run a command unless it ended well before with the same flags; once one stage
# has run, all after it run too
redone=no
stage() {
    local name=$1 module=$2 ranks=$3
    shift 3
    local done_file=$state/$name.done again=()
    if [ "$redone" = no ] && [ "$(cat "$done_file" 2>/dev/null)" = "$ranks $*" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    rm -f "$done_file"
    if [ "$name" = base_train ]; then again=("$([ "$redone" = yes ] && echo --overwrite || echo --resume)"); fi
    local launch=("$python" -m "$module")
    if [ "$ranks" -gt 1 ]; then
        launch=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$ranks" -m "$module")
    fi
    "${launch[@]}" "$@" "${again[@]}" | tee "$state/$name.log" || return 1
    if [ "$name" = base_train ] && ! tail -n 1 "$state/$name.log" | grep -q '^base_train:'; then
        fail "base_train was told to stop and has saved; run again to go on"
    fi
    echo "$ranks $*" >"$done_file"
    [ "$name" = download ] || redone=yes # more shards do not change what was learnt from the first
}

model=("--data=$data" "--device-batch-size=$rows" "--model-tag=d$depth")
if [ "$data" = hub ]; then # a shard is about 50 M tokens, and 20 tokens a parameter are wanted
    stage download nanochat.dataset 1 -n $((depth * depth * 6 / 10 + 8)) -w 4 \
        || fail "no data from the hub; run again to go on, or start with DATA=embedded or DATA=<your texts>"
fi
stage tok_train scripts.tok_train 1 "--data=$data" "--vocab-size=$vocab"
stage tok_eval scripts.tok_eval 1 "--data=$data"
stage base_train scripts.base_train "$ranks" "--depth=$depth" "--run=${WANDB_RUN:-dummy}" "${model[@]}" "${flags[@]}"
stage base_loss scripts.base_loss "$ranks" "${model[@]}"

echo "== results (details in $NANOCHAT_BASE_DIR/report)"
for name in tok_train tok_eval base_train base_loss; do tail -n 1 "$state/$name.log"; done
