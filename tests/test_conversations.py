"""Conversations as batches: every pair of tokens exactly once, for any ranks, micro-batch size and resume."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from nanochat.chat_format import render_conversation
from nanochat.common import Runtime
from nanochat.train.conversations import OPEN_ROWS, Conversations, by_width, pack
from tasks.common import Task
from tests.helpers.vocabulary import WORDS, train_tokenizer

SEQ_LEN = 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


class Chats(Task):
    """Random conversations of 1 to 3 exchanges, some with a calculator call; few tokens or many."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def num_examples(self):
        return self.n

    def get_example(self, index):
        rng = random.Random(index)

        def text():
            return " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 12])))

        messages = [{"role": role, "content": text()} for role in ("user", "assistant") * rng.randint(1, 3)]
        if index % 3 == 0:
            kinds = ("text", "python", "python_output", "text")
            messages[-1]["content"] = [{"type": kind, "text": text()} for kind in kinds]
        return {"messages": messages}


@dataclass(frozen=True, kw_only=True)
class OneOfRanks(Runtime):
    """A rank whose `gather` returns given values of all ranks."""

    all_values: Any

    def gather(self, value):
        assert value == self.all_values[self.rank]
        return self.all_values


def ranks(data, world_size):
    """Return the runtimes of all ranks, which gather the lengths that are measured here on one rank."""
    lengths = [len(data.render(index)[0]) - 1 for index in range(len(data.task))]
    shares = [lengths[rank::world_size] for rank in range(world_size)]
    cpu = {"device": torch.device("cpu"), "compute_dtype": torch.float32, "world_size": world_size}
    return [OneOfRanks(rank=rank, all_values=shares, **cpu) for rank in range(world_size)]


def data_of(tokenizer, n=60, packed=True, seq_len=SEQ_LEN):
    return Conversations(task=Chats(n), tokenizer=tokenizer, seq_len=seq_len, packed=packed)


def step_rows(data, rows, world_size, batch_size, n_steps, **bounds):
    """Return all rows in the order in which a run on world_size ranks takes them, without padding."""
    per_rank = [
        list(islice(data.batches(rows, batch_size, runtime, **bounds), n_steps))
        for runtime in ranks(data, world_size)
    ]
    found = []
    for batches in zip(*per_rank, strict=True):
        assert all(state == batches[0][2] for *_, state in batches)
        for inputs, targets, _ in batches:
            found += [trimmed(*row) for row in zip(inputs, targets, strict=True)]
    return found


def trimmed(inputs, targets):
    """Return the contents of a row up to its last target."""
    width = max((targets != -1).nonzero().flatten().tolist(), default=-1) + 1
    return inputs[:width].tolist(), targets[:width].tolist()


# ---------------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_pack_places_everything_once_and_within_capacity(capacity):
    rng = random.Random(capacity)
    n_places = [rng.choice([1, 2, 6, 7, 8, 20, 63, 64, 65, 200]) for _ in range(1500)]
    rows = pack(n_places, capacity)
    covered = Counter((index, place) for row in rows for index, a, b in row for place in range(a, b))
    assert covered == Counter((index, place) for index, n in enumerate(n_places) for place in range(n))
    assert all(0 < sum(end - begin for _, begin, end in row) <= capacity for row in rows)
    # only conversations longer than a row are cut, into as few pieces as possible
    pieces = Counter(index for row in rows for index, _, _ in row)
    assert all(pieces[index] == -(-n // capacity) for index, n in enumerate(n_places))


def test_pack_by_hand():
    assert pack([5, 6, 4, 3, 2, 10, 23], 10) == [
        [(0, 0, 5), (3, 0, 3), (4, 0, 2)],
        [(1, 0, 6), (2, 0, 4)],  # 4 fits this one exactly, although the first row was opened before
        [(5, 0, 10)],
        [(6, 0, 10)],
        [(6, 10, 20)],
        [(6, 20, 23)],
    ]
    assert pack([9, 10, 1], 10) == [[(0, 0, 9), (2, 0, 1)], [(1, 0, 10)]]
    assert pack([], 10) == []


def test_rows_are_almost_full():
    rng = random.Random(0)
    n_places = [min(3000, int(rng.lognormvariate(5.5, 0.9)) + 5) for _ in range(20_000)]
    rows = pack(n_places, 2048)
    assert sum(n_places) / (2048 * len(rows)) > 0.995


def test_few_rows_are_open_at_a_time():
    """Otherwise packing takes quadratic time if nothing fits together."""
    rows = pack([6] * (OPEN_ROWS + 5) + [4] * (OPEN_ROWS + 5), 10)
    assert sum(len(row) == 2 and row[0][2] == 6 for row in rows) == OPEN_ROWS


# ---------------------------------------------------------------------------------------------------------
# Inputs and targets


def test_packed_rows_hold_every_pair_of_every_conversation_once(tokenizer):
    """Conversations used to be cropped at the end of a row, and an epoch ended before the last were seen."""
    data = data_of(tokenizer)
    rows = data.plan(Runtime.cpu())
    lengths = [len(data.render(index)[0]) for index in range(60)]
    assert max(lengths) > 2 * SEQ_LEN
    assert min(lengths) < SEQ_LEN / 2
    expected = Counter()
    for index in range(60):
        ids, _ = render_conversation(tokenizer, data.task[index], 10_000)
        expected.update(pairwise(ids))
    found = Counter()
    for inputs, targets, _ in islice(data.batches(rows, 1, Runtime.cpu()), len(rows)):
        assert inputs.shape == targets.shape == (1, SEQ_LEN)
        found.update((a, b) for a, b in zip(inputs[0].tolist(), targets[0].tolist(), strict=True) if b != -1)
    assert found == expected


def test_pieces_of_a_row_follow_one_another_from_its_start(tokenizer):
    data = data_of(tokenizer)
    rows = data.plan(Runtime.cpu())
    for row, (inputs, targets) in zip(rows, step_rows(data, rows, 1, 1, len(rows)), strict=True):
        ids = [(data.render(index)[0], begin, end) for index, begin, end in row]
        assert inputs == [id for conversation, begin, end in ids for id in conversation[begin:end]]
        assert targets == [id for conversation, begin, end in ids for id in conversation[begin + 1 : end + 1]]


def test_finetuning_learns_the_assistant_s_tokens_only(tokenizer):
    data = data_of(tokenizer, packed=False, seq_len=500)
    rows = data.plan(Runtime.cpu())
    assert [row[0][0] for row in rows] == list(range(60))
    batches = data.batches(rows, 1, Runtime.cpu())
    for index, (inputs, targets, _) in zip(range(60), batches, strict=False):
        ids, mask = render_conversation(tokenizer, data.task[index], 501)
        assert inputs.tolist() == [ids[:-1]]
        assert targets.tolist() == [[b if m else -1 for b, m in zip(ids[1:], mask[1:], strict=True)]]
        learned = [id for id in targets[0].tolist() if id != -1]
        ends = [
            tokenizer.encode_special(f"<|{name}|>") for name in ("assistant_end", "output_end", "user_end")
        ]
        n_replies = len(data.task[index]["messages"]) // 2
        assert [learned.count(end) for end in ends] == [n_replies, 0, 0]


def test_finetuning_rows_are_cut_to_their_length(tokenizer):
    """The setting was ignored: rows always had 2048 tokens."""
    data = data_of(tokenizer, packed=False)
    rows = data.plan(Runtime.cpu())
    widths = [batch[0].size(1) for batch in islice(data.batches(rows, 1, Runtime.cpu()), len(rows))]
    assert max(widths) == SEQ_LEN
    assert min(widths) < SEQ_LEN
    for inputs, targets, _ in islice(data.batches(rows, 8, Runtime.cpu()), 5):
        assert inputs.shape == targets.shape
        is_padding = inputs == tokenizer.get_bos_token_id()
        is_padding[:, 0] = False
        assert (targets[is_padding] == -1).all()
        assert not is_padding.all(dim=0).any()  # as wide as the widest


def test_rows_are_sorted_by_length_within_their_step(tokenizer):
    data = data_of(tokenizer, packed=False)
    rows = data.plan(Runtime.cpu())[:59]
    found = by_width(rows, 8)
    for first in range(0, 59, 8):
        ours, theirs = found[first : first + 8], rows[first : first + 8]
        assert sorted(ours) == sorted(theirs)
        lengths = [row[0][2] for row in ours]
        assert lengths == sorted(lengths)
    assert len(found) == 59


# ---------------------------------------------------------------------------------------------------------
# Ranks, epochs, resume


@pytest.mark.parametrize("packed", [True, False])
def test_any_number_of_ranks_takes_the_same_rows(tokenizer, packed):
    data = data_of(tokenizer, packed=packed)
    plans = [data.plan(runtime) for n in (1, 2, 3) for runtime in ranks(data, n)]
    assert all(plan == plans[0] for plan in plans)
    rows = plans[0]
    expected = step_rows(data, rows, 1, 1, 24)
    for world_size, batch_size in ((1, 4), (2, 4), (3, 2), (1, 12), (2, 1)):
        n_steps = 24 // (world_size * batch_size)
        assert step_rows(data, rows, world_size, batch_size, n_steps) == expected


def test_the_last_step_is_filled_with_empty_rows(tokenizer):
    for packed in (True, False):
        data = data_of(tokenizer, n=5, packed=packed)
        rows = data.plan(Runtime.cpu())[:5]
        found = step_rows(data, rows, 2, 4, 2, stop=5)
        assert found[:5] == step_rows(data, rows, 1, 1, 5)
        assert found[5:] == [([], [])] * 11
        (inputs, targets, _) = next(data.batches(rows, 4, Runtime.cpu(), start=100, stop=5))
        assert inputs.shape == targets.shape
        assert (targets == -1).all()


def test_after_the_last_row_comes_the_first(tokenizer):
    data = data_of(tokenizer, n=7, packed=False)
    rows = data.plan(Runtime.cpu())
    once = step_rows(data, rows, 1, 1, 7)
    assert step_rows(data, rows, 1, 4, 5) == (3 * once)[:20]
    assert step_rows(data, rows, 1, 4, 5, stop=14) == [*once, *once, *[([], [])] * 6]


@pytest.mark.parametrize("packed", [True, False])
def test_resume_from_any_state(tokenizer, packed):
    data = data_of(tokenizer, packed=packed)
    rows = data.plan(Runtime.cpu())
    whole = list(islice(data.batches(rows, 3, Runtime.cpu()), 12))
    for i, (*_, state) in enumerate(whole[:-1]):
        inputs, targets, after = next(data.batches(rows, 3, Runtime.cpu(), start=state["next_row"]))
        assert torch.equal(inputs, whole[i + 1][0])
        assert torch.equal(targets, whole[i + 1][1])
        assert after == whole[i + 1][2]
    # with other ranks and another micro-batch, too
    start = whole[3][2]["next_row"]
    rest = [trimmed(*row) for inputs, targets, _ in whole[4:] for row in zip(inputs, targets, strict=True)]
    assert step_rows(data, rows, 2, 6, 2, start=start) == rest


def test_a_limit_on_the_conversations(tokenizer):
    data = data_of(tokenizer, packed=False)
    for runtime in ranks(data_of(tokenizer, n=11, packed=False), 2):
        assert data.plan(runtime, 11) == data.plan(Runtime.cpu())[:11]
    assert data.plan(Runtime.cpu(), 1000) == data.plan(Runtime.cpu())


def test_an_empty_task(tokenizer):
    with pytest.raises(ValueError, match="no conversations"):
        data_of(tokenizer, n=0).plan(Runtime.cpu())
