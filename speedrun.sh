#!/usr/bin/env bash
# From raw text to a model that you can talk to, on any machine:
#
#   with GPUs    the recipe's text and chat data from the hub; a d20 on eight GPUs, a d12 on fewer
#   without      a d4 on the documentation of your own Python, in about 45 minutes on two cores
#
#   bash speedrun.sh            run, or continue where the last run stopped
#   bash speedrun.sh --fresh    run every stage again
#
# Settings (environment variables):
#   DATA               hub (the recipe's text: hub:fineweb, or hub:climbmix), embedded or a path of your own texts
#   DEPTH              layers; the width and the length of training follow
#   RECIPE             generation of the model: saint_iberis, or saint_iberis_2 (nanochat/recipes.py)
#   NPROC_PER_NODE     ranks: 1, 2, 4 or 8
#   DEVICE_BATCH_SIZE  rows of one forward pass; 0: as many as fit in memory
#   FP8                1: pretrain in 8 bits, on Hopper and newer data-centre GPUs
#   SEED               of the weights and of the order of the text
#   RL                 1: reinforcement learning too; on embedded conversations unless it is 0
#   CORE_BUNDLE        folder or address of the CORE bundle, or none; left out it is the published one with GPUs,
#                      none without
#   NANOCHAT_BASE_DIR (where all files go), WANDB_RUN, DOLLARS_PER_HOUR (3 for each GPU)
# For a rehearsal, best in a NANOCHAT_BASE_DIR of its own, since a stage whose settings changed runs again, and so do
# all stages after it:
#   STEPS              steps of every training stage
#   SHARDS             shards of the hub's text
#   EVAL_ITEMS         items of each evaluation: questions per task, CORE's too; conversations or rows of a validation
#   PYTHON             an interpreter with all packages; set-up is then skipped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/stage.sh # prepare, wandb, doctor, stage
prepare "$@"        # check the settings, set up; sets python, seed, recipe, bundle, gpus, gib and ranks

data=${DATA:-$([ "$gpus" -gt 0 ] && echo hub || echo embedded)}
name_text # hub becomes the name of the recipe's text; sets shards, those of the hub's text for training, or 0
chat_data=$([ "$shards" -gt 0 ] && echo "$data" || echo embedded) # of the stages after pretraining
if [ "$gpus" -gt 0 ] && [ "$data" != embedded ]; then
    depth=${DEPTH:-$((ranks >= 8 ? 20 : 12))} rows=${DEVICE_BATCH_SIZE:-0} vocab=65536 seq_len=2048
    tag=--model-tag=d$depth
    base=("$tag" "--save-every=$((250 * ranks))") # a d20 saves every eleven minutes
    loss=("$tag")
else
    depth=${DEPTH:-4} rows=${DEVICE_BATCH_SIZE:-$((ranks > 2 ? 16 / ranks : 8))} vocab=4096 seq_len=256
    tag=--model-tag=d$depth
    base=("$tag" --max-seq-len=256 --total-batch-size=8192 --num-iterations=80)
    base+=(--warmdown-ratio=0.5 --eval-every=40 --save-every=40)
    loss=("$tag" "--device-batch-size=$rows" --split-tokens=200000)
fi
[ "${FP8:-0}" = 0 ] || base+=(--fp8)
[ "$recipe" = saint_iberis ] || base+=("--recipe=$recipe") # the other stages follow their checkpoint
mid=("$tag" "$(wandb mid)") sft=("$tag" "$(wandb sft)") rl=("$tag" "$(wandb rl)") evals=("$tag")
if [ "$shards" -gt 0 ]; then
    mid+=("--device-batch-size=$rows") sft+=("--device-batch-size=$((gib >= 22 ? 4 : 2))")
else # a million tokens: small steps, whatever the model; warm starts and a rising momentum, as it was tuned
    chat_rows=$((rows == 0 || rows * ranks > 16 ? 16 / ranks : rows))
    mid+=(--max-seq-len=256 --total-batch-size=4096 "--device-batch-size=$chat_rows")
    mid+=(--eval-every=0 --save-every=40 --warm-start --momentum-warmup=300)
    sft+=(--conversations-per-step=128 "--device-batch-size=$((4 * chat_rows))")
    sft+=(--init-lr-frac=1 --warmdown-ratio=0.6 --eval-every=100 --save-every=100)
    sft+=(--warm-start --momentum-warmup=300)
    rl+=(--num-steps=150 --max-new-tokens=128 --init-lr-frac=0.15 --eval-every=50 --save-every=50)
    rl+=(--momentum-warmup=300 --top-k=0 --scale-lr-by-contrast)
    evals+=(--max-new-tokens=128 --batch-size=128)
    RL=${RL:-1}
fi
doctor "--data=$data" "--depth=$depth" "--vocab-size=$vocab" "--max-seq-len=$seq_len" \
    "--device-batch-size=$rows" "--ranks=$ranks" "--recipe=$recipe"

# stage NAME MODULE RANKS FLAGS...
if [ "$shards" -gt 0 ]; then # a shard is about 50 M tokens; training takes 20 tokens per parameter
    stage download nanochat.dataset 1 -n "${SHARDS:-$((depth * depth * 6 / 10 + 8))}" -w 4 "--data=$data" \
        || fail "no data from the hub; run again to continue, or start with DATA=embedded or DATA=<your texts>"
    stage chat_data tasks.mixtures 1
fi
stage tok_train scripts.tok_train 1 "--data=$data" "--vocab-size=$vocab"
stage tok_eval scripts.tok_eval 1 "--data=$data"
stage base_train scripts.base_train "$ranks" "--depth=$depth" "--seed=$seed" "$(wandb base)" \
    "--device-batch-size=$rows" "--data=$data" "${base[@]}"
stage base_loss scripts.base_loss "$ranks" "--data=$data" "${loss[@]}"
[ -z "$bundle" ] || stage base_eval scripts.base_eval "$ranks" "$tag" "$bundle"
stage mid_train scripts.mid_train "$ranks" "--data=$chat_data" "${mid[@]}"
stage chat_eval_mid scripts.chat_eval "$ranks" "--data=$chat_data" "${evals[@]}" -i mid
stage chat_sft scripts.chat_sft "$ranks" "--data=$chat_data" "${sft[@]}"
stage chat_eval_sft scripts.chat_eval "$ranks" "--data=$chat_data" "${evals[@]}" -i sft
if [ "${RL:-0}" = 1 ]; then
    stage chat_rl scripts.chat_rl "$ranks" "--data=$chat_data" "${rl[@]}"
    stage chat_eval_rl scripts.chat_eval "$ranks" "--data=$chat_data" "${evals[@]}" -i rl
fi
report
echo "talk to it: $python -m scripts.chat_web   (or in the terminal: $python -m scripts.chat_cli)"
