"""The program of kills.py under torchrun: the four training stages in sequence, each with --resume.

A stage starts from the model of the previous one. All resume from their last checkpoint, so the command is
the same after a kill in any stage.
"""

import sys

from nanochat import common
from scripts import base_train, chat_rl, chat_sft, mid_train
from tasks import mixtures as recipes
from tests.helpers.chats import QUIET, ColourTask
from tests.helpers.wordtask import WordTask

SAVE_EVERY = 3
STAGES = ("base", "mid", "sft", "rl")


def work(text: str, num_steps: str, tag: str) -> int:
    """Train each stage of a tag for `num_steps`: base on the text, the others on tasks of a few words."""
    recipes.mid_tasks = recipes.sft_tasks = lambda data: (ColourTask(20), ColourTask(5, seed=1))
    recipes.rl_tasks = lambda data: (WordTask(10), WordTask(stop=4))
    usual = [*QUIET, f"--save-every={SAVE_EVERY}", "--log-every=1000000", "--resume", f"--model-tag={tag}"]
    learn = [*usual, f"--num-iterations={num_steps}", "--device-batch-size=2"]
    shape = ["--depth=2", "--max-seq-len=16", "--eval-tokens=64"]
    base_train.main([*learn, *shape, "--total-batch-size=64", f"--data={text}"])
    mid_train.main([*learn, "--total-batch-size=64"])
    chat_sft.main([*learn, "--conversations-per-step=8"])
    sampling = ["--examples-per-step=4", "--num-samples=4", "--max-new-tokens=4", "--eval-examples=4"]
    # high temperature: equal answers have no advantage to learn from them
    return chat_rl.main([*usual, *sampling, "--temperature=9", f"--num-steps={num_steps}"])


if __name__ == "__main__":
    text, num_steps, *tags = sys.argv[1:]
    common.run(lambda: max(work(text, num_steps, tag) for tag in tags))
