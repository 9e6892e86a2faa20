#!/usr/bin/env bash
# From raw text to a model that one can talk to, on whatever machine this is:
#
#   with GPUs    FineWeb-EDU and chat data from the hub; a d20 on 8 of them, a d12 on fewer
#   without      a small model on the documentation of your own Python, in about twenty minutes on two cores
#
#   bash speedrun.sh            run, or go on where the last run stopped
#   bash speedrun.sh --fresh    do every stage again
#
# Settings: NANOCHAT_BASE_DIR, NPROC_PER_NODE (1, 2, 4 or 8 ranks), WANDB_RUN, DATA (hub, embedded or a path of your own
# texts), DEPTH, DEVICE_BATCH_SIZE (rows of one forward), FP8 (1: pretrain in 8 bits, on Hopper cards and newer ones of
# data centres), SEED (of weights and order of text), RL (1: reinforcement learning, too, which is done on embedded
# conversations unless it is 0), CORE_BUNDLE (folder or address of the CORE evaluation bundle; without it CORE is not
# measured), DOLLARS_PER_HOUR (3 for each GPU).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "speedrun: $*" >&2; exit 1; }
case "${1:-}" in "" | --fresh) ;; *) fail "unknown argument '$1'; usage: bash speedrun.sh [--fresh]" ;; esac
for setting in FP8 RL; do
    case ${!setting:-0} in 0 | 1) ;; *) fail "$setting=${!setting} must be 0 or 1" ;; esac
done
[ "${DATA:-}" != auto ] || fail "DATA=auto must be hub, embedded or a path of your own texts; left out it is chosen"
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
export PYTHONUNBUFFERED=1
state=$NANOCHAT_BASE_DIR/speedrun
mkdir -p "$state" 2>/dev/null && [ -w "$state" ] || fail "cannot write to $NANOCHAT_BASE_DIR; set NANOCHAT_BASE_DIR"
[ -z "${1:-}" ] || rm -f "$state"/*.done "$state/seed" "$state/fp8"

# keep SETTING VALUE: refuse another value than the one that pretraining began with
keep() {
    local begun name
    begun=$(cat "$state/$1" 2>/dev/null || echo "$2")
    name=$(echo "$1" | tr '[:lower:]' '[:upper:]')
    [ "$2" = "$begun" ] || fail "$name=$2, but the run in $NANOCHAT_BASE_DIR began with $name=$begun: \
say so, set NANOCHAT_BASE_DIR to another folder, or do every stage again with --fresh"
}

seed=${SEED:-42}
keep seed "$seed"
bash dev/setup.sh
python=.venv/bin/python
[ -z "${WANDB_RUN:-}" ] || $python -c 'import wandb' 2>/dev/null \
    || fail "WANDB_RUN=$WANDB_RUN needs wandb, which is not installed: uv pip install --python .venv wandb"
case ${CORE_BUNDLE:-} in
    "") bundle="" ;;
    *://*) bundle=--bundle-url=$CORE_BUNDLE ;;
    *)
        bundle=--bundle=$CORE_BUNDLE
        [ -f "$CORE_BUNDLE/core.yaml" ] || fail "CORE_BUNDLE=$CORE_BUNDLE is no folder with a core.yaml"
        ;;
esac

# ---- the machine and the run it is good for

read -r gpus gib has_fp8 < <($python -c '
import torch
from nanochat.hardware import has_large_tiles
gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
memory = min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=0)
print(len(gpus), memory >> 30, bool(gpus) and all(map(has_large_tiles, gpus)))')
ranks=${NPROC_PER_NODE:-$((gpus >= 8 ? 8 : gpus >= 4 ? 4 : gpus >= 2 ? 2 : 1))} # what the batches divide by
case $ranks in 1 | 2 | 4 | 8) ;; *) fail "NPROC_PER_NODE=$ranks must be 1, 2, 4 or 8" ;; esac
data=${DATA:-$([ "$gpus" -gt 0 ] && echo hub || echo embedded)}
chat_data=$([ "$data" = hub ] && echo hub || echo embedded) # what is learned after pretraining
if [ "$gpus" -gt 0 ] && [ "$data" != embedded ]; then
    depth=${DEPTH:-$((ranks >= 8 ? 20 : 12))}
    rows=${DEVICE_BATCH_SIZE:-0} # 0: as many as the memory holds
    vocab=65536
    seq_len=2048
    base=("--save-every=$((250 * ranks))") loss=() # at d20 every eleven minutes, however many ranks
else
    depth=${DEPTH:-4}
    rows=${DEVICE_BATCH_SIZE:-$((ranks > 2 ? 16 / ranks : 8))}
    vocab=4096
    seq_len=256
    base=(--max-seq-len=$seq_len --total-batch-size=8192 --num-iterations=80)
    base+=(--warmdown-ratio=0.5 --eval-every=40 --save-every=40)
    loss=("--device-batch-size=$rows" --split-tokens=200000)
fi
if [ "${FP8:-0}" = 1 ]; then
    [ "$has_fp8" = True ] || fail "FP8=$FP8 needs Hopper GPUs, or newer ones of data centres; leave it out"
    base+=(--fp8)
fi
keep fp8 "${FP8:-0}"
if [ "$chat_data" = hub ]; then
    mid=("--device-batch-size=$rows") sft=("--device-batch-size=$((gib >= 22 ? 4 : 2))") evals=() rl=()
else # a million tokens: small steps, whatever the model
    chat_rows=$((rows == 0 || rows * ranks > 16 ? 16 / ranks : rows))
    mid=(--max-seq-len=256 --total-batch-size=4096 "--device-batch-size=$chat_rows")
    mid+=(--eval-every=0 --save-every=40)
    sft=(--conversations-per-step=128 "--device-batch-size=$((4 * chat_rows))")
    sft+=(--init-lr-frac=1 --warmdown-ratio=0.6 --eval-every=100 --save-every=100)
    evals=(--max-new-tokens=40 --batch-size=128)
    rl=(--num-steps=150 --max-new-tokens=40 --init-lr-frac=0.1 --eval-every=50 --save-every=50)
    RL=${RL:-1}
fi
echo "speedrun: $gpus GPU(s) of $gib GiB, $ranks rank(s), data $data, depth $depth, files in $NANOCHAT_BASE_DIR"
export NPROC_PER_NODE=$ranks
echo "== doctor"
$python -m scripts.doctor "--data=$data" "--depth=$depth" "--vocab-size=$vocab" "--max-seq-len=$seq_len" \
    "--device-batch-size=$rows" "--ranks=$ranks" || fail "the doctor found what would end this run"

# ---- stages

# stage NAME MODULE RANKS FLAGS...: run a command unless it ended well before with the same flags; once one stage
# has run, all after it run too, and begin anew, again so if cut off before their first save: until then the
# checkpoints of before may be there
redone=no
stage() {
    local name=$1 module=$2 ranks=$3
    shift 3
    local done_file=$state/$name.done anew=$state/$name.anew log=$state/$name.log again="" changes
    if [ "$redone" = no ] && [ "$(cat "$done_file" 2>/dev/null)" = "$ranks $*" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    rm -f "$done_file"
    # more shards do not change what was learnt from the first
    case $name in download | chat_data) changes=$redone ;; *) changes=yes ;; esac
    [ "$redone" = "$changes" ] || "$python" -m nanochat.report reset "--since=$name"
    case $name in base_train | mid_train | chat_sft | chat_rl)
        if [ "$redone" = yes ]; then
            rm -f "$log"
            touch "$anew"
        elif grep -qs "saved to" "$log"; then
            rm -f "$anew"
        fi
        again=$([ -e "$anew" ] && echo --overwrite || echo --resume) ;;
    esac
    local launch=("$python" -m "$module")
    if [ "$ranks" -gt 1 ]; then
        launch=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$ranks" -m "$module" --)
    fi
    "${launch[@]}" "$@" ${again:+"$again"} | tee "$log" || return 1
    if [ -n "$again" ] && ! grep -q "^$name:" "$log"; then
        fail "$name was told to stop and has saved; run again to go on"
    fi
    echo "$ranks $*" >"$done_file"
    redone=$changes
}

# name of a wandb run: one a stage
wandb() { echo "--run=$([ -n "${WANDB_RUN:-}" ] && echo "$WANDB_RUN-$1" || echo dummy)"; }

[ -z "${1:-}" ] && [ -f "$NANOCHAT_BASE_DIR/report/start.json" ] || $python -m nanochat.report reset
tag=--model-tag=d$depth
base_model=("--data=$data" "$tag")
if [ "$data" = hub ]; then # a shard is about 50 M tokens, and 20 tokens a parameter are wanted
    stage download nanochat.dataset 1 -n $((depth * depth * 6 / 10 + 8)) -w 4 \
        || fail "no data from the hub; run again to go on, or start with DATA=embedded or DATA=<your texts>"
    stage chat_data tasks.mixtures 1
fi
stage tok_train scripts.tok_train 1 "--data=$data" "--vocab-size=$vocab"
stage tok_eval scripts.tok_eval 1 "--data=$data"
echo "$seed" >"$state/seed"
echo "${FP8:-0}" >"$state/fp8"
stage base_train scripts.base_train "$ranks" "--depth=$depth" "--seed=$seed" "$(wandb base)" \
    "--device-batch-size=$rows" "${base_model[@]}" "${base[@]}"
stage base_loss scripts.base_loss "$ranks" "${base_model[@]}" ${loss[@]+"${loss[@]}"}
[ -z "$bundle" ] || stage base_eval scripts.base_eval "$ranks" "$tag" "$bundle"
stage mid_train scripts.mid_train "$ranks" "--data=$chat_data" "$tag" "$(wandb mid)" "${mid[@]}"
stage chat_eval_mid scripts.chat_eval "$ranks" "--data=$chat_data" "$tag" -i mid ${evals[@]+"${evals[@]}"}
stage chat_sft scripts.chat_sft "$ranks" "--data=$chat_data" "$tag" "$(wandb sft)" "${sft[@]}"
stage chat_eval_sft scripts.chat_eval "$ranks" "--data=$chat_data" "$tag" -i sft ${evals[@]+"${evals[@]}"}
if [ "${RL:-0}" = 1 ]; then
    stage chat_rl scripts.chat_rl "$ranks" "--data=$chat_data" "$tag" "$(wandb rl)" ${rl[@]+"${rl[@]}"}
    stage chat_eval_rl scripts.chat_eval "$ranks" "--data=$chat_data" "$tag" -i rl ${evals[@]+"${evals[@]}"}
fi
echo "== report"
$python -m nanochat.report generate ${DOLLARS_PER_HOUR:+"--dollars-per-hour=$DOLLARS_PER_HOUR"}
echo "talk to it: $python -m scripts.chat_web   (or in the terminal: $python -m scripts.chat_cli)"
