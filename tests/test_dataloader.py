import json
import random
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataloader
from nanochat.data.shards import write_parquet
from nanochat.dataloader import estimate_tokens, merge_states, packed_batches

BOS = 256


class ByteTokenizer:
    """Tokens are UTF-8 bytes; `seen` lists the texts that were encoded."""

    def __init__(self):
        self.seen = []

    def get_bos_token_id(self):
        return BOS

    def encode(self, text, *, prepend, num_threads):
        self.seen.extend(text)
        return [[prepend, *t.encode()] for t in text]


@pytest.fixture
def texts():
    """Documents of 0 to 40 bytes, and one that is longer than several micro-batches."""
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdefgh", k=rng.randrange(40))) for _ in range(37)]
    documents[11] = "long " * 40
    return documents


@pytest.fixture
def shards(tmp_path, texts):
    """The same documents in three shards with row groups of odd sizes."""
    bounds = [(0, 5, 2), (5, 6, 7), (6, 37, 3)]
    paths = [tmp_path / f"shard_{i}.parquet" for i in range(3)]
    for path, (start, stop, rows_per_group) in zip(paths, bounds, strict=True):
        write_parquet(path, texts[start:stop], rows_per_group)
    return paths


def batches(shards, *, tokenizer=None, batch_size=2, seq_len=8, streams=4, device="cpu", **settings):
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "streams": streams}
    return packed_batches(tokenizer or ByteTokenizer(), shards, **sizes, device=device, **settings)


def stream_tokens(texts, stream, streams, epochs=1):
    """The tokens of a stream, by its definition."""
    return [t for _ in range(epochs) for text in texts[stream::streams] for t in [BOS, *text.encode()]]


def as_lists(batch):
    return batch[0].tolist(), batch[1].tolist()


def global_order(shards, world_size, n_rounds, **settings):
    """The micro-batches of all ranks in the order of their streams."""
    n_own = settings.get("streams", 4) // world_size
    ranks = [batches(shards, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    return [as_lists(next(rank)) for _ in range(n_rounds * n_own) for rank in ranks]


# ---------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("seq_len", [1, 8, 50])
@pytest.mark.parametrize("streams", [1, 4])
def test_every_token_once_an_epoch_and_every_pair_of_neighbours(shards, texts, streams, seq_len):
    """A loader that removed all B * T + 1 tokens of a batch lost one token and one pair per batch."""
    n_rounds, batch_size = 1500 // (streams * seq_len), 2
    loader = batches(shards, streams=streams, seq_len=seq_len, batch_size=batch_size)
    inputs, targets = {}, {}
    for index, (x, y, _) in enumerate(islice(loader, n_rounds * streams)):
        inputs.setdefault(index % streams, []).extend(x.flatten().tolist())
        targets.setdefault(index % streams, []).extend(y.flatten().tolist())
    for stream in range(streams):
        expected = stream_tokens(texts, stream, streams, epochs=9)
        n = n_rounds * batch_size * seq_len
        assert n > 1.5 * len(expected) / 9, "the test ends before the second epoch"
        assert inputs[stream] == expected[:n]
        assert targets[stream] == expected[1 : n + 1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_together_have_the_batches_of_one_rank_that_accumulates(shards, world_size):
    assert global_order(shards, world_size, 12) == global_order(shards, 1, 12)


def test_batches_are_contiguous_and_not_shared(shards):
    """They were slices of one (B, T + 1) tensor, for which `.view(-1)` fails on some devices."""
    loader = batches(shards)
    first = next(loader)
    before = as_lists(first)
    for tensor in first[:2]:
        assert tensor.shape == (2, 8)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
    next(loader)
    assert as_lists(first) == before


def test_documents_are_tokenised_once_and_little_ahead(shards, texts, monkeypatch):
    monkeypatch.setattr(dataloader, "DOCUMENTS_PER_CALL", 2)
    tokenizer = ByteTokenizer()
    loader = batches(shards, tokenizer=tokenizer, streams=1)
    list(islice(loader, 3))
    assert tokenizer.seen == texts[: len(tokenizer.seen)]
    assert sum(len(text) + 1 for text in tokenizer.seen[:-2]) < 3 * 16 + 1


def test_a_seed_draws_the_order_of_row_groups(shards, texts):
    """Shards sorted by content were read in that order, the last kind of text at the end of training."""

    def order(seed):
        tokenizer = ByteTokenizer()
        list(batches(shards, tokenizer=tokenizer, streams=1, seed=seed, epochs=1))
        return tokenizer.seen

    groups = [texts[0:2], texts[2:4], texts[4:5], texts[5:6], *(texts[i : i + 3] for i in range(6, 37, 3))]
    starts = sorted(groups, key=lambda group: order(1).index(group[0]))
    assert order(1) == [text for group in starts for text in group]
    assert order(None) == texts
    assert len({str(order(seed)) for seed in (None, 1, 2)}) == 3
    assert global_order(shards, 4, 12, seed=1) == global_order(shards, 1, 12, seed=1)


@pytest.mark.gpu
def test_cuda_batches_equal_cpu_batches(shards):
    on_cuda = batches(shards, device="cuda")
    # Without synchronisation, so that a reused staging buffer would be overwritten during its copy.
    got = list(islice(on_cuda, 300))
    assert [as_lists(batch) for batch in got] == [as_lists(b) for b in islice(batches(shards), 300)]
    assert got[0][0].is_cuda


# ---------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("streams", [1, 4])
def test_resume_after_any_batch(shards, streams):
    """Resuming was approximate, and in the second epoch looped without end over nothing."""
    n = 190
    whole = [(as_lists(batch), json.dumps(batch[2])) for batch in islice(batches(shards, streams=streams), n)]
    assert json.loads(whole[-1][1])["positions"]["0"][0] >= 2, "the test ends before the third epoch"
    for index in range(n - 5):
        resumed = batches(shards, streams=streams, state=json.loads(whole[index][1]))
        assert [(as_lists(b), json.dumps(b[2])) for b in islice(resumed, 4)] == whole[index + 1 : index + 5]


def test_resume_reads_nothing_before_the_position(shards, monkeypatch):
    monkeypatch.setattr(dataloader, "DOCUMENTS_PER_CALL", 1)
    state = list(islice(batches(shards, streams=1), 20))[-1][2]
    read = []
    real_read = dataloader.read_row_group
    monkeypatch.setattr(dataloader, "read_row_group", lambda *place: read.append(place) or real_read(*place))
    tokenizer = ByteTokenizer()
    next(batches(shards, streams=1, state=state, tokenizer=tokenizer))
    assert state["positions"]["0"][1] > 10
    assert len(read) <= 2
    assert len(tokenizer.seen) <= 3


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_resume_with_another_number_of_ranks(shards, before, after):
    n_steps, streams = 9, 4
    ranks = [batches(shards, rank=r, world_size=before) for r in range(before)]
    states = [list(islice(rank, n_steps * streams // before))[-1][2] for rank in ranks]
    state = json.loads(json.dumps(merge_states(states)))
    resumed = global_order(shards, after, 3, state=state)
    assert resumed == global_order(shards, 1, n_steps + 3)[n_steps * streams :]


def test_resume_within_a_step(shards):
    """After 6 of 8 micro-batches two ranks can resume, four cannot."""
    states = [list(islice(batches(shards, rank=r, world_size=2), 3))[-1][2] for r in range(2)]
    state = merge_states(states)
    assert state["next_stream"] == 2
    ranks = [batches(shards, rank=r, world_size=2, state=state) for r in range(2)]
    assert [as_lists(next(rank)) for rank in ranks] == global_order(shards, 1, 2)[6:8]
    with pytest.raises(ValueError, match="after a whole step"):
        batches(shards, world_size=4, state=state)


# ---------------------------------------------------------------------------------------------------------
# Validation: a limited number of epochs


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("epochs", [1, 2])
def test_limited_epochs_count_every_token_once(shards, texts, world_size, epochs):
    streams = 4
    seen = {stream: ([], []) for stream in range(streams)}
    for rank in range(world_size):
        before = {str(s): [0, s, 0] for s in range(rank, streams, world_size)}
        for x, y, state in batches(shards, rank=rank, world_size=world_size, epochs=epochs):
            (moved,) = [int(s) for s in before if before[s] != state["positions"][s]]
            before = state["positions"]
            seen[moved][0].extend(x.flatten().tolist())
            seen[moved][1].extend(y.flatten().tolist())
            assert (y != -1).any(), "a batch without targets gives NaN"
    for stream in range(streams):
        expected = stream_tokens(texts, stream, streams, epochs)
        inputs, targets = seen[stream]
        n = len(expected) - 1
        assert targets[:n] == expected[1:]
        assert set(targets[n:]) <= {-1}
        assert inputs[:n] == expected[:-1]
        assert set(inputs[n:]) <= {BOS}
        assert len(targets) - n < 16


def test_resume_in_limited_epochs(shards):
    whole = [(as_lists(batch), batch[2]) for batch in batches(shards, epochs=2)]
    for index, (_, state) in enumerate(whole):
        rest = [(as_lists(batch), batch[2]) for batch in batches(shards, epochs=2, state=state)]
        assert rest == whole[index + 1 :]


def test_a_stream_of_one_empty_document_has_no_targets(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["", "abc"])
    assert [
        as_lists(b) for b in batches([tmp_path / "a.parquet"], streams=2, batch_size=1, seq_len=4, epochs=1)
    ] == [([[BOS, 97, 98, BOS]], [[97, 98, 99, -1]])]


# ---------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streams": 6, "world_size": 4}, "multiple of world_size=4; try 8"),
        ({"streams": 1, "world_size": 4}, "multiple of world_size=4; try 4"),
        ({"streams": 38}, "37 documents"),
        ({"streams": 0}, "streams=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": -1}, "seq_len=-1"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_inconsistent_sizes_are_named(shards, settings, message):
    with pytest.raises(ValueError, match=message):
        batches(shards, **settings)


def test_no_shards(tmp_path):
    """The loader looped without end for an empty folder."""
    with pytest.raises(ValueError, match="0 documents"):
        batches([])
    write_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(ValueError, match="no documents"):
        batches([tmp_path / "empty.parquet"])


@pytest.mark.parametrize("settings", [{"streams": 2}, {"batch_size": 1}, {"seq_len": 4}, {"seed": 1}])
def test_a_state_of_other_sizes(shards, settings):
    state = next(batches(shards))[2]
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        batches(shards, state=state, **settings)


def test_a_state_of_other_data(shards, tmp_path, texts):
    state = list(islice(batches(shards, streams=1), 3))[-1][2]
    with pytest.raises(ValueError, match="documents="):
        batches(shards[1:], streams=1, state=state)
    write_parquet(tmp_path / "other.parquet", ["x"] * len(texts))
    state["positions"]["0"][2] = 2
    with pytest.raises(ValueError, match="which has 2"):
        next(batches([tmp_path / "other.parquet"], streams=1, state=state))


def test_inconsistent_states_are_not_merged(shards):
    ranks = [batches(shards, rank=r, world_size=2) for r in range(2)]
    (_, _, first), (_, _, second) = next(ranks[0]), next(ranks[1])
    with pytest.raises(ValueError, match=r"lacks the streams \[1, 3\]"):
        batches(shards, rank=1, world_size=2, state=first)
    with pytest.raises(ValueError, match="different batches"):
        merge_states([first, next(ranks[1])[2]])
    assert merge_states([first, second])["positions"].keys() == {"0", "1", "2", "3"}


# ---------------------------------------------------------------------------------------------------------
# Reading


def test_row_groups_are_decoded_once_while_streams_are_near_one_another(shards, texts, monkeypatch):
    """Every stream reads from every row group; without a cache each would be decoded once per stream."""
    read = []
    real_read = dataloader.read_row_group
    monkeypatch.setattr(dataloader, "read_row_group", lambda *place: read.append(place) or real_read(*place))
    documents = dataloader._Documents(shards, None)
    for stream in range(4):
        assert documents.read(list(range(stream, len(texts), 4))) == texts[stream::4]
    assert len(read) == len(set(read)) == len(documents.row_groups)

    read.clear()
    monkeypatch.setattr(dataloader, "CACHE_BYTES", 100)
    documents = dataloader._Documents(shards, None)
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    assert documents.read(order) == [texts[i] for i in order]
    assert sum(column.nbytes for column in documents.cache.values()) <= 100 or len(documents.cache) == 1
    assert len(read) > len(set(read))


@pytest.mark.parametrize("with_dictionary", [True, False])
def test_tokens_are_estimated_without_reading_all(tmp_path, with_dictionary):
    """Within 3 %, from footers and a few documents, whoever wrote the file; other columns do not count."""
    rng = random.Random(1)
    documents = [
        " ".join(rng.choices(["river", "stone,", "bridge"], k=rng.randrange(200, 900))) for _ in range(900)
    ]
    path = tmp_path / "shard.parquet"
    table = pa.table({"url": ["https://there/" * 40] * 900, "text": documents})
    pq.write_table(table, path, row_group_size=200, use_dictionary=with_dictionary)
    tokenizer = ByteTokenizer()
    exact = sum(len(text) + 1 for text in documents)
    assert estimate_tokens(tokenizer, [path]) == pytest.approx(exact, rel=0.03)
    assert len(tokenizer.seen) == 64
    assert estimate_tokens(tokenizer, [path, path]) == pytest.approx(2 * exact, rel=0.03)


def test_tokens_of_empty_documents(tmp_path):
    write_parquet(tmp_path / "shard.parquet", ["", ""])
    assert estimate_tokens(ByteTokenizer(), [tmp_path / "shard.parquet"]) > 0
