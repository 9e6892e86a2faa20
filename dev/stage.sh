# The machinery of speedrun.sh, which sources it: settings are checked, the machine is examined, stages run once.
#
# $NANOCHAT_BASE_DIR/speedrun holds for each stage NAME
#   NAME.done       the settings with which it finished
#   NAME.log        its output
#   NAME.steps      STEPS of a training stage
#   NAME.overwrite  while a training stage has older checkpoints to replace and has not saved one of its own
# and, once pretraining starts, its seed, its recipe and its precision (fp8).
#
# It must run in bash 3.2, the one of macOS: no associative arrays, no expansion of an empty array.

fail() { echo "speedrun: $*" >&2; exit 1; }

# prepare [--fresh]: check the settings, set up .venv, examine the machine.
# Sets state, fresh, python, seed, recipe, bundle, gpus, gib (memory of the smallest GPU) and ranks.
prepare() {
    local setting has_fp8
    fresh=${1:-}
    case $fresh in "" | --fresh) ;; *) fail "unknown argument '$fresh'; usage: bash speedrun.sh [--fresh]" ;; esac
    for setting in FP8 RL; do
        case ${!setting:-0} in 0 | 1) ;; *) fail "$setting=${!setting} must be 0 or 1" ;; esac
    done
    for setting in STEPS SHARDS EVAL_ITEMS; do
        case ${!setting:-1} in
            0* | *[!0-9]*) fail "$setting=${!setting} must be a whole number above 0; leave it out for a full run" ;;
        esac
    done
    [ "${DATA:-}" != auto ] || fail "DATA=auto must be hub, embedded or a path of your own texts; left out it is chosen"
    export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
    export PYTHONUNBUFFERED=1
    state=$NANOCHAT_BASE_DIR/speedrun
    mkdir -p "$state" 2>/dev/null && [ -w "$state" ] || fail "cannot write to $NANOCHAT_BASE_DIR; set NANOCHAT_BASE_DIR"
    [ -z "$fresh" ] || rm -f "$state"/*.done "$state/seed" "$state/recipe" "$state/fp8"
    seed=${SEED:-42}
    keep seed "$seed"
    recipe=${RECIPE:-saint_iberis}
    keep recipe "$recipe"

    python=${PYTHON:-.venv/bin/python}
    if [ -n "${PYTHON:-}" ]; then
        "$python" -c "import nanochat, rustbpe, torch" >/dev/null 2>&1 || fail "PYTHON=$PYTHON must be an interpreter \
that can import nanochat, rustbpe and torch; leave it out, and .venv is set up"
    else
        bash dev/setup.sh
    fi
    [ -z "${WANDB_RUN:-}" ] || "$python" -c 'import wandb' 2>/dev/null || fail "WANDB_RUN=$WANDB_RUN needs wandb, \
which is not installed: uv pip install --python ${PYTHON:-.venv} wandb"
    case ${CORE_BUNDLE:-none} in
        none) bundle="" ;;
        *://*) bundle=--bundle-url=$CORE_BUNDLE ;;
        *)
            bundle=--bundle=$CORE_BUNDLE
            [ -f "$CORE_BUNDLE/core.yaml" ] || fail "CORE_BUNDLE=$CORE_BUNDLE is no folder with a core.yaml; \
name one, the address of a zip, or none"
            ;;
    esac

    read -r gpus gib has_fp8 < <("$python" -c '
import torch
from nanochat.hardware import has_large_tiles
gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
memory = min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=0)
print(len(gpus), memory >> 30, bool(gpus) and all(map(has_large_tiles, gpus)))')
    [ -n "${CORE_BUNDLE:-}" ] || [ "$gpus" = 0 ] || bundle=--bundle= # base_eval finds or downloads the published one
    ranks=${NPROC_PER_NODE:-$((gpus >= 8 ? 8 : gpus >= 4 ? 4 : gpus >= 2 ? 2 : 1))} # divisors of the batch sizes
    case $ranks in 1 | 2 | 4 | 8) ;; *) fail "NPROC_PER_NODE=$ranks must be 1, 2, 4 or 8" ;; esac
    export NPROC_PER_NODE=$ranks
    [ "${FP8:-0}" = 0 ] || [ "$has_fp8" = True ] \
        || fail "FP8=$FP8 needs Hopper GPUs, or newer ones of data centres; leave it out"
    keep fp8 "${FP8:-0}"
}

# keep SETTING VALUE: refuse a value other than the one that pretraining started with
keep() {
    local started name
    started=$(cat "$state/$1" 2>/dev/null || echo "$2")
    name=$(echo "$1" | tr '[:lower:]' '[:upper:]')
    [ "$2" = "$started" ] || fail "$name=$2, but the run in $NANOCHAT_BASE_DIR started with $name=$started: \
set that, set NANOCHAT_BASE_DIR to another folder, or run every stage again with --fresh"
}

# name_text: name the hub's text in data; sets shards, its number of shards for training, 0 for other text
name_text() {
    if [ "$data" = hub ]; then
        case $recipe in saint_iberis_2) data=hub:climbmix ;; *) data=hub:fineweb ;; esac
    fi
    case $data in # as in nanochat/dataset.py
        hub:fineweb) shards=1822 ;;
        hub:climbmix) shards=6542 ;;
        hub:*) fail "DATA=$data is no text of the hub; choose hub:fineweb or hub:climbmix, or hub for the recipe's" ;;
        *) shards=0 ;;
    esac
    [ -n "${SHARDS:-}" ] || return 0
    [ "$shards" -gt 0 ] || fail "SHARDS=$SHARDS is for DATA=hub, and the data is $data; leave it out"
    [ "$SHARDS" -le "$shards" ] 2>/dev/null \
        || fail "SHARDS=$SHARDS must be at most $shards, the shards of $data; lower it"
}

# doctor FLAGS...: check the machine for what would end this run; then start its report
doctor() {
    echo "speedrun: $gpus GPU(s) of $gib GiB, $ranks rank(s), data $data, depth $depth, files in $NANOCHAT_BASE_DIR"
    echo "== doctor"
    "$python" -m scripts.doctor "$@" || fail "the doctor found what would end this run"
    [ -z "$fresh" ] && [ -f "$NANOCHAT_BASE_DIR/report/start.json" ] || "$python" -m nanochat.report reset
}

# wandb STAGE: the flag that names the wandb run of a stage
wandb() { echo "--run=$([ -n "${WANDB_RUN:-}" ] && echo "$WANDB_RUN-$1" || echo dummy)"; }

# shortened NAME: the flags by which STEPS and EVAL_ITEMS shorten a stage; seq_len is the tokens of a row of text
shortened() {
    case $1 in
        base_train | mid_train | chat_sft) echo ${STEPS:+"--num-iterations=$STEPS"} ;;
        chat_rl) echo ${STEPS:+"--num-steps=$STEPS"} ;;
    esac
    [ -n "${EVAL_ITEMS:-}" ] || return 0
    case $1 in
        base_train) echo "--eval-tokens=$((EVAL_ITEMS * seq_len)) --core-max-per-task=$EVAL_ITEMS" ;;
        base_loss) echo "--split-tokens=$((EVAL_ITEMS * seq_len))" ;;
        base_eval) echo "--max-per-task=$EVAL_ITEMS" ;;
        mid_train | chat_sft) echo "--val-conversations=$EVAL_ITEMS" ;;
        chat_rl) echo "--eval-examples=$EVAL_ITEMS" ;;
        chat_eval_*) echo "--max-problems=$EVAL_ITEMS" ;;
    esac
}

# stage NAME MODULE RANKS FLAGS...: run a command, unless it has finished with the same settings. Once one stage has
# run, all after it run too and replace their checkpoints. A stage that was cut off resumes, but not before it has
# saved once: until then its folder may hold the checkpoints that it is to replace.
redone=no
stage() {
    local name=$1 module=$2 ranks=$3
    shift 3
    set -- "$@" $(shortened "$name") # unquoted: flags without spaces, or none
    local settings="$ranks $*${SHARDS:+ SHARDS=$SHARDS}" log=$state/$name.log overwrite=$state/$name.overwrite
    local again="" changes
    [ "$python" = .venv/bin/python ] || settings="$settings PYTHON=$python"
    if [ "$name" = base_train ]; then
        echo "$seed" >"$state/seed"
        echo "$recipe" >"$state/recipe"
        echo "${FP8:-0}" >"$state/fp8"
    fi
    if [ "$redone" = no ] && [ "$(cat "$state/$name.done" 2>/dev/null)" = "$settings" ]; then
        echo "== $name: already done"
        return
    fi
    echo "== $name"
    rm -f "$state/$name.done"
    # more shards do not change what was learned from the first ones, and CORE changes nothing
    case $name in download | chat_data | base_eval) changes=$redone ;; *) changes=yes ;; esac
    [ "$redone" = "$changes" ] || "$python" -m nanochat.report reset "--since=$name"
    case $name in base_train | mid_train | chat_sft | chat_rl)
        # with other STEPS the learning rates would not follow their schedule
        if [ "$redone" = yes ] || [ "$(cat "$state/$name.steps" 2>/dev/null)" != "${STEPS:-}" ]; then
            rm -f "$log"
            touch "$overwrite"
        elif grep -qs "saved to" "$log"; then
            rm -f "$overwrite"
        fi
        echo "${STEPS:-}" >"$state/$name.steps"
        again=$([ -e "$overwrite" ] && echo --overwrite || echo --resume) ;;
    esac
    local launch=("$python" -m "$module")
    if [ "$ranks" -gt 1 ]; then
        launch=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$ranks" -m "$module" --)
    fi
    "${launch[@]}" "$@" ${again:+"$again"} | tee "$log" || return 1
    if [ -n "$again" ] && ! grep -q "^$name:" "$log"; then
        fail "$name was stopped by a signal and has saved; run again to continue"
    fi
    redone=$changes
    grep -q "^$name: .* is skipped: " "$log" || echo "$settings" >"$state/$name.done" # else the next start tries again
}

# report: write report.md
report() {
    echo "== report"
    "$python" -m nanochat.report generate ${DOLLARS_PER_HOUR:+"--dollars-per-hour=$DOLLARS_PER_HOUR"}
}
