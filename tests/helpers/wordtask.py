"""Tests of reinforcement learning: an easy task, its rollouts, and an SFT checkpoint."""

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.decode.row import Completion
from nanochat.engine import Engine
from nanochat.train.rollouts import Rollouts
from tasks.common import Task
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer


class WordTask(Task):
    """Answers to a number; the reward is 1 for an answer that contains the letter e."""

    def __init__(self, size: int = 10, **bounds):
        super().__init__(**bounds)
        self.size = size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": str(index)}, {"role": "assistant", "content": "e"}]}

    def evaluate(self, conversation, completion):
        return "e" in completion


def small_chat_model(tokenizer):
    return random_model(small_config(vocab_size=tokenizer.get_vocab_size(), n_layer=2))


class FakeEngine(Engine):
    """Answers "e7", where 7 is output of the calculator; the last sample has no end token."""

    def complete(self, prompts, *, num_samples, **settings):
        e, seven, end = [*self.tokenizer.encode("e7"), self.special["<|assistant_end|>"]]
        answers = [Completion([e, seven], [1, 0], end) for _ in range(len(prompts) * num_samples)]
        answers[-1].end_token = None
        return answers


def rollouts_of(tokenizer, **changes):
    settings = {
        "task": WordTask(),
        "engine": Engine(small_chat_model(tokenizer), tokenizer),
        "examples_per_step": 4,
        "num_samples": 4,
        "max_new_tokens": 12,
        "batch_size": 64,
        "temperature": 1.0,
        "top_k": 50,
        "seed": 42,
    }
    return Rollouts(**{**settings, **changes})


def write_sft_checkpoint(base_dir):
    tokenizer = train_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    save_checkpoint(checkpoint_dir("sft", "d2"), 5, small_chat_model(tokenizer), None, {})
