"""Tests of midtraining and finetuning: a base checkpoint, conversations to learn, short runs."""

import random

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_dir, load_tensors, model_path, save_checkpoint
from nanochat.gpt import GPT
from nanochat.metrics import read_metrics
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.recipes import find_recipe
from scripts import chat_sft, mid_train
from tasks import mixtures as recipes
from tasks.common import Task
from tests.helpers.models import small_config
from tests.helpers.vocabulary import train_tokenizer

QUIET = ["--device-type=cpu", "--eval-every=0", "--sample-every=0", "--save-every=0"]
SCRIPTS = {
    "mid": (mid_train, [*QUIET, "--device-batch-size=2", "--total-batch-size=192"]),  # 4 rows a step
    "sft": (chat_sft, [*QUIET, "--source=base", "--device-batch-size=2", "--conversations-per-step=4"]),
}
both_stages = pytest.mark.parametrize("stage", ["mid", "sft"])


class ColourTask(Task):
    """Questions about words, answered by a letter. Every fourth conversation has three exchanges."""

    eval_type = "categorical"

    def __init__(self, size: int = 20, seed: int = 0):
        super().__init__()
        self.size, self.seed = size, seed

    def num_examples(self):
        return self.size

    def get_example(self, index):
        rng = random.Random(1000 * self.seed + index)
        things = ["river", "stone,", "light", "bridge", "water"]
        question = " ".join(rng.choices(things, k=rng.randint(1, 12)))
        letter = "AB"["stone" in question]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": letter}]
        if index % 4 == 0:
            messages = [*messages, *messages, *messages]
        return {"messages": messages, "letters": ["A", "B"]}


class Unanswered(ColourTask):
    """The same task, but every other conversation has no answer to learn."""

    def get_example(self, index):
        conversation = super().get_example(index)
        return conversation if index % 2 else {**conversation, "messages": conversation["messages"][:1]}


def write_base_checkpoint(base_dir, tag="d2", with_optimizer=True, recipe="saint_iberis"):
    """Save a model with unusual n_kernel and slc_rate after three training steps on random tokens."""
    settings = find_recipe(recipe).settings
    tokenizer = train_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_kernel": 4, "slc_rate": 2, "sequence_len": 48}
    model = GPT(small_config(vocab_size=tokenizer.get_vocab_size(), **shape, **settings.model_fields))
    model.init_weights()
    optimizer = build_optimizer(model, settings.optimizer)
    for _ in range(3):
        ids = torch.randint(0, 300, (2, 17))
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        model.zero_grad()
    state = optimizer.state_dict() if with_optimizer else None
    # published checkpoints name no recipe
    meta = {} if recipe == "saint_iberis" else {"user_config": {"recipe": recipe}}
    save_checkpoint(checkpoint_dir("base", tag), 3, model, state, meta)


def learn(monkeypatch, task):
    """Replace the training task of both stages."""
    for name in ("mid_tasks", "sft_tasks"):
        monkeypatch.setattr(recipes, name, lambda data: (task, ColourTask(5, seed=1)))


def train(stage, *flags):
    script, usual = SCRIPTS[stage]
    return script.main([*usual, *flags])


def records(stage, tag="d2"):
    return read_metrics(checkpoint_dir(stage, tag) / "metrics.jsonl")


def untimed_records(stage, tag="d2"):
    """Return the records of metrics.jsonl without the values that depend on the clock."""
    return [{key: r[key] for key in r if "second" not in key and key != "mfu"} for r in records(stage, tag)]


def losses(stage, tag="d2"):
    return [r["loss"] for r in records(stage, tag) if "loss" in r]


def weights(stage, step, tag="d2"):
    return load_tensors(model_path(checkpoint_dir(stage, tag), step), "cpu")


def same(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def copy_base(tag):
    checkpoint_dir("base", tag).symlink_to(checkpoint_dir("base", "d2"))
