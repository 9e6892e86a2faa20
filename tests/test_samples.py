"""The samples that training prints beside the loss."""

import logging

import pytest
import torch

from nanochat.chat_format import render_for_completion
from nanochat.common import Runtime
from nanochat.train.samples import N_REPLIES, print_replies
from tests.helpers.chats import ColourTask
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def replies(caplog, tokenizer, *args, rank=0, sequence_len=64):
    model = random_model(small_config(vocab_size=tokenizer.get_vocab_size(), sequence_len=sequence_len))
    runtime = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32, rank=rank)
    with caplog.at_level(logging.INFO):
        print_replies(model, tokenizer, runtime, *args)
    return model, [record.message for record in caplog.records]


def test_prompts_with_greedy_replies(tokenizer, caplog):
    task = ColourTask(9)
    model, lines = replies(caplog, tokenizer, task, 8)
    for i, line in enumerate(lines):
        prompt = render_for_completion(tokenizer, task[i], 56)
        reply = list(model.generate(torch.tensor([prompt]), 8, temperature=0))
        assert line == f"sample | {tokenizer.decode(prompt)!r} -> {tokenizer.decode(reply)!r}"
    assert len(lines) == N_REPLIES


def test_a_short_context_and_a_short_task(tokenizer, caplog):
    """A context of 64 had no room for a prompt and a reply of 64 tokens: the run ended without a report."""
    _, lines = replies(caplog, tokenizer, ColourTask(2))
    assert len(lines) == 2


def test_other_ranks_are_silent(tokenizer, caplog):
    assert replies(caplog, tokenizer, ColourTask(2), rank=1)[1] == []
