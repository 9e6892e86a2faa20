"""A task for tests of reinforcement learning, and a checkpoint to start from."""

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from tasks.common import Task
from tests.models import random_model, small_config
from tests.vocabulary import train_tokenizer


class WordTask(Task):
    """Say something short about a number: rewarded if it has the letter e."""

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


def write_sft_checkpoint(base_dir):
    tokenizer = train_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    save_checkpoint(checkpoint_dir("sft", "d2"), 5, small_chat_model(tokenizer), None, {})
