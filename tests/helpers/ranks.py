"""The program of test_ranks.py under torchrun: the same training and evaluation for any number of ranks."""

import json
import logging
import sys

from nanochat import common
from nanochat.chat_eval import evaluate_task
from nanochat.checkpoint_manager import load_for
from nanochat.core_bundle import load_bundle
from nanochat.core_eval import evaluate_core
from nanochat.optim import stack
from scripts import base_train, chat_sft, mid_train
from tasks import mixtures as recipes
from tests.helpers.chats import QUIET, ColourTask

TASK = ColourTask(20), ColourTask(5, seed=1)
NUM_STEPS, HALF = 20, 10
SHORT = [*QUIET, f"--num-iterations={NUM_STEPS}", "--device-batch-size=1"]


def pretrain(corpus, *flags):
    """Pretrain with 12 micro-batches per step, a multiple of 1, 2, 3 and 4 ranks."""
    shape = ["--depth=2", "--max-seq-len=16", "--total-batch-size=192", "--eval-tokens=800"]
    base_train.main([*SHORT, *shape, f"--data={corpus}", f"--save-every={HALF}", "--keep-last=0", *flags])


def base(corpus, tag, partial_tag, *flags):
    """Pretrain under `tag`, and resume the model `partial_tag`, if any."""
    stack.BUCKET_BYTES = 100_000  # several buckets per stack, even for small matrices
    pretrain(corpus, f"--model-tag={tag}", *flags)
    if partial_tag:
        pretrain(corpus, f"--model-tag={partial_tag}", "--resume", *flags)
    return 0


def work(corpus, tag, partial_tag):
    """Train each stage under `tag`, resume the base model `partial_tag`, evaluate into eval_<tag>.json."""
    recipes.mid_tasks = recipes.sft_tasks = lambda data: TASK
    base(corpus, tag, partial_tag)
    mid_train.main([*SHORT, f"--model-tag={tag}", "--total-batch-size=192", "--warmdown-ratio=1"])
    chat_sft.main([*SHORT, f"--model-tag={tag}", "--conversations-per-step=12", "--init-lr-frac=0.1"])
    runtime = common.setup_runtime("cpu")
    model, tokenizer, _ = load_for(runtime, "sft", "eval", tag, -1)
    figures = evaluate_task(ColourTask(11, seed=2), model, tokenizer, runtime, batch_size=4, max_new_tokens=4)
    core = evaluate_core(model, tokenizer, load_bundle(common.base_dir() / "bundle"), runtime)
    if runtime.is_main:
        results = {"chat": {**figures, "seconds": 0}, "core": core["core"], **core["tasks"]}
        (common.base_dir() / f"eval_{tag}.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    logging.disable(logging.INFO)
    program, *arguments = sys.argv[1:]
    common.run(lambda: {"base": base, "work": work}[program](*arguments))
