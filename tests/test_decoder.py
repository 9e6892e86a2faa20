"""Both decoders draw the tokens of the model, whatever else is decoded beside them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanochat.decode import running
from nanochat.decode.decoder import PlainDecoder
from nanochat.decode.graph_decoder import GraphDecoder, supports
from nanochat.decode.running import decoder_for
from nanochat.gpt import GPTConfig
from nanochat.sampling import SamplingParams
from tests.helpers.kernels import on_gpu
from tests.helpers.models import SECOND, random_model

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(temperature=0.0)
SMALL = GPTConfig(64, 100, 2, 2, 1, 2 * 16, 3, 3)
SMALL_SECOND = replace(SMALL, **SECOND)
LARGER = [
    GPTConfig(64, 300, 4, 3, 3, 3 * 32, 3, 3),
    GPTConfig(64, 300, 4, 4, 2, 4 * 16, 4, 2),
    GPTConfig(64, 3000, 2, 2, 2, 2 * 128, 3, 0),
]
SHAPES = [
    SMALL,
    SMALL_SECOND,
    *(
        pytest.param(shape, marks=pytest.mark.gpu)  # the interpreter would take minutes
        for shape in (
            *LARGER,
            replace(LARGER[0], **SECOND),
            replace(LARGER[1], **SECOND | {"residual_conv": 4}),
            replace(LARGER[2], **SECOND | {"residual_conv": 2}),
            *(replace(LARGER[0], **{name: value}) for name, value in SECOND.items()),
        )
    ),
]
# a second generation has the state of a published model, and more; the interpreter is slow
GENERATIONS = pytest.mark.parametrize("config", [on_gpu(SMALL), SMALL_SECOND], ids=["published", "second"])


def model_on(device, config, dtype=torch.float32):
    model = random_model(config).eval().to(device)
    model.compute_dtype = dtype
    return model


@torch.no_grad()
def greedy_by_full_forwards(model, prompt, n):
    """Return n greedy tokens after a prompt."""
    tokens = [*prompt]
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens], device=model.device))[0, -1].argmax()))
    return tokens[len(prompt) :]


def follow(decoder, last, n, drawn):
    for _ in range(n):
        last = dict(zip(last, decoder.step(last), strict=True))
        for slot, token in last.items():
            drawn[slot].append(token)
    return last


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [PlainDecoder, GraphDecoder])
def test_greedy_tokens_are_those_of_full_forwards_in_any_batch(device, kind, config):
    """Sequences join, fork and leave, slots are reused; prompts are fed whole, in parts or not at all."""
    model = model_on(device, config)
    decoder = kind(model, slots=7)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [20], [30, 31], [40, 41, 42, 43, 44]]
    slots = [decoder.open(GREEDY) for _ in prompts]
    decoder.feed(slots[0], prompts[0][:1])
    decoder.feed(slots[0], prompts[0][1:7])
    decoder.feed(slots[2], prompts[2][:-1])
    decoder.feed(slots[3], prompts[3][:-1])
    drawn = {slot: [] for slot in slots}
    last = {slot: prompt[-1] for slot, prompt in zip(slots, prompts, strict=True)}
    last = follow(decoder, last, 3, drawn)
    assert [drawn[slot] for slot in slots] == [
        greedy_by_full_forwards(model, prompt, 3) for prompt in prompts
    ]

    decoder.close(slots[1])
    del last[slots[1]]
    new_prompt = [60, 61, 62, 63]
    first = decoder.open(GREEDY)
    decoder.feed(first, new_prompt[:-1])
    new = [first, *(decoder.fork(first, GREEDY) for _ in range(3))]
    drawn.update((slot, []) for slot in new)
    follow(decoder, last | dict.fromkeys(new, 63), 3, drawn)
    for slot in new:
        assert drawn[slot] == greedy_by_full_forwards(model, new_prompt, 3)
    assert drawn[slots[0]] == greedy_by_full_forwards(model, prompts[0], 6)


@pytest.mark.parametrize("config", [shape for shape in SHAPES if shape is not SMALL_SECOND], ids=str)
def test_sampling_and_logits_equal_the_plain_decoder_s(device, config):
    model = model_on(device, config)
    found = []
    for kind in (PlainDecoder, GraphDecoder):
        decoder = kind(model, slots=6)
        a = decoder.open(SamplingParams(top_k=5, seed=3))
        decoder.feed(a, [1, 2, 3])
        rows = [
            a,
            decoder.fork(a, SamplingParams(repetition_penalty=1.4, seed=4)),
            decoder.fork(a, SamplingParams(top_p=0.7, temperature=0.9, seed=2**40 + 5)),
            decoder.open(SamplingParams(repetition_penalty=1.2, temperature=0.0)),
        ]
        last, drawn = dict.fromkeys(rows, 9), {row: [] for row in rows}
        last = follow(decoder, last, 5, drawn)
        logits = decoder.logits.clone()
        follow(decoder, {rows[2]: last[rows[2]]} if kind is GraphDecoder else last, 1, drawn)
        found.append(([drawn[row][:5] for row in rows], drawn[rows[2]][5], logits))
    assert found[0][:2] == found[1][:2]
    assert len({*map(tuple, found[0][0])}) == 4
    assert torch.allclose(found[0][2], found[1][2], atol=1e-4)


@pytest.mark.parametrize("taps", [4, on_gpu(2), on_gpu(3)])
@torch.no_grad()
def test_chunks_shorter_than_the_windows(device, taps):
    """Prompts of 1, 2 and 3 tokens at a time: a window then keeps values of the chunk before."""
    model = model_on(device, replace(SMALL, **SECOND | {"residual_conv": taps, "n_kernel": 4}))
    decoder = GraphDecoder(model, slots=3)
    chunks = {(1, 2, 3): [5, 6, 7, 8, 9, 10], (2, 1): [20, 21, 22], (1, 1): [30, 31]}
    slots = {decoder.open(GREEDY): (sizes, tokens) for sizes, tokens in chunks.items()}
    for slot, (sizes, tokens) in slots.items():
        for i, size in enumerate(sizes):
            decoder.feed(slot, tokens[sum(sizes[:i]) :][:size])
    for step in range(3):
        decoder.step(dict.fromkeys(slots, 40 + step))
        for logits, (_, tokens) in zip(decoder.logits, slots.values(), strict=True):
            tokens.append(40 + step)
            full = model(torch.tensor([tokens], device=device))[0, -1]
            torch.testing.assert_close(logits, full, rtol=0, atol=1e-4)


@pytest.mark.gpu
@torch.no_grad()
def test_a_batch_of_more_rows_than_a_tile_has():
    """Beyond 32 rows the MLP's output is convolved by a kernel of its own, which updates the windows."""
    model = model_on("cuda", SMALL_SECOND)
    decoder = GraphDecoder(model, slots=40)
    tokens = {decoder.open(GREEDY): [i] for i in range(35)}
    for step in range(4):
        decoder.step({slot: seen[-1] for slot, seen in tokens.items()})
        full = model(torch.tensor([*tokens.values()], device="cuda"))[:, -1]
        torch.testing.assert_close(decoder.logits, full, rtol=0, atol=1e-4)
        for i, seen in enumerate(tokens.values()):
            seen.append((7 * i + step) % 100)


@GENERATIONS
@pytest.mark.parametrize("kind", [PlainDecoder, GraphDecoder])
def test_launches_may_overlap(device, kind, config):
    """The next step is launched before the tokens of the last are known; a token may be forced into it."""
    model = model_on(device, config)
    decoder = kind(model, slots=3)
    a, b, c = (decoder.open(SamplingParams(temperature=0.0)) for _ in range(3))
    decoder.launch({a: 5, b: 6})
    decoder.launch({b: None, a: None, c: 7})
    first = decoder.collect()
    decoder.launch({a: 50, b: None, c: None})
    second, third = decoder.collect(), decoder.collect()
    assert [first[1], second[0], third[1]] == greedy_by_full_forwards(model, [6], 3)
    assert [second[2], third[2]] == greedy_by_full_forwards(model, [7], 2)
    assert [first[0], second[1]] == greedy_by_full_forwards(model, [5], 2)
    assert third[0] == greedy_by_full_forwards(model, [5, first[0], 50], 1)[0]


@GENERATIONS
@pytest.mark.parametrize("kind", [PlainDecoder, GraphDecoder])
def test_a_closed_slot_leaves_no_state(device, kind, config):
    """The convolution state, the tokens seen and the position of a slot must not reach its next sequence."""
    model = model_on(device, config)
    decoder, drawn = kind(model, slots=1), []
    params = SamplingParams(repetition_penalty=1.5, seed=1)
    for _ in range(2):
        slot = decoder.open(params)
        with pytest.raises(IndexError):
            decoder.open(params)
        tokens = {slot: []}
        follow(decoder, {slot: 8}, 4, tokens)
        drawn.append(tokens[slot])
        decoder.close(slot)
        busy = decoder.open(GREEDY)
        decoder.feed(busy, [33, 34, 35])
        decoder.close(busy)
    assert drawn[0] == drawn[1]


@GENERATIONS
def test_load_replaces_the_weights(device, config):
    model, other = model_on(device, config), random_model(config, seed=5).eval().to(device)
    assert greedy_by_full_forwards(model, [8], 3) != greedy_by_full_forwards(other, [8], 3)
    decoder = GraphDecoder(model, slots=1)
    for current in (model, other):
        current.compute_dtype = torch.float32
        decoder.load(current)
        slot = decoder.open(GREEDY)
        drawn = {slot: []}
        follow(decoder, {slot: 8}, 3, drawn)
        assert drawn[slot] == greedy_by_full_forwards(current, [8], 3)
        decoder.close(slot)


def test_the_context_is_not_exceeded(device):
    model = model_on(device, SMALL)
    decoder = GraphDecoder(model, slots=2)
    slot = decoder.open(GREEDY)
    decoder.feed(slot, [1] * 63)
    drawn = {slot: []}
    last = follow(decoder, {slot: 2}, 1, drawn)
    with pytest.raises(ValueError, match="context of 64"):
        decoder.step(last)
    with pytest.raises(ValueError, match="2 tokens after 64 do not fit a context of 64"):
        decoder.feed(slot, [1, 2])
    with pytest.raises(ValueError, match="slots=129"):
        GraphDecoder(model, slots=129)


def test_a_warning_without_graphs_for_so_many_rows(monkeypatch, caplog):
    """chat_eval -b 256 and chat_web --slots=200 were several times slower than with half, silently."""
    monkeypatch.setattr(running, "PlainDecoder", lambda *_: "plain")
    model = SimpleNamespace(device=torch.device("cuda"), config=SMALL)
    assert decoder_for(model, 129) == "plain"
    assert "no CUDA graphs for 129 rows" in caplog.text


def test_a_plain_decoder_on_request(monkeypatch, caplog):
    monkeypatch.setattr(running, "PlainDecoder", lambda *args: args)
    model = SimpleNamespace(device=torch.device("cuda"), config=SMALL)
    assert decoder_for(model, 129, 64, kind="plain") == (model, 129, 64)
    assert not caplog.text
    with pytest.raises(ValueError, match="decoder='fast' must be one of best, plain"):
        decoder_for(model, 1, kind="fast")


def test_decoder_for_a_cpu_is_plain():
    assert isinstance(decoder_for(random_model(SMALL).eval(), 2), PlainDecoder)


def test_graphs_need_a_window_for_each_convolution():
    assert supports(SMALL_SECOND, 2)
    assert not supports(replace(SMALL_SECOND, residual_conv=1), 2)
    assert not supports(replace(SMALL, n_kernel=1), 2)


@pytest.mark.gpu
def test_decoder_for_a_gpu_has_graphs_if_the_kernels_fit():
    assert isinstance(decoder_for(model_on("cuda", SMALL), 2), GraphDecoder)
    assert isinstance(decoder_for(model_on("cuda", SMALL_SECOND), 2), GraphDecoder)
    odd = GPTConfig(64, 300, 2, 2, 2, 2 * 24, 3, 3)
    assert isinstance(decoder_for(model_on("cuda", odd), 2), PlainDecoder)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, SECOND], ids=["published", "second"])
@torch.no_grad()
def test_graph_path_at_d20(fields):
    """256 greedy tokens are equal in float32; in bfloat16 the logits of all positions are close."""
    config = GPTConfig.from_depth(20, vocab_size=65_536, **fields)
    model = model_on("cuda", config)
    prompt = torch.randint(0, 65_536, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = {}
    for kind in (PlainDecoder, GraphDecoder):
        decoder = kind(model, slots=2)
        slot = decoder.open(GREEDY)
        decoder.feed(slot, prompt[:-1])
        drawn = {slot: []}
        follow(decoder, {slot: prompt[-1]}, 256, drawn)
        tokens[kind] = drawn[slot]
        del decoder
    assert tokens[PlainDecoder] == tokens[GraphDecoder]
    assert len({*tokens[GraphDecoder]}) > 16

    model.compute_dtype = torch.bfloat16
    forced = [prompt[-1], *tokens[GraphDecoder]]
    logits, choices = [], []
    for kind in (PlainDecoder, GraphDecoder):
        decoder = kind(model, slots=5)
        slots = [decoder.open(GREEDY) for _ in range(5)]
        decoder.feed(slots[0], prompt[:-1])
        one, many = [], []
        for i, token in enumerate(forced):
            used = slots if i % 2 and kind is GraphDecoder else slots[:1]
            one.append(decoder.step(dict.fromkeys(used, token))[0])
            many.append(decoder.logits[0].clone())
        logits.append(torch.stack(many))
        choices.append(one)
    assert (logits[0] - logits[1]).abs().max() < 0.35  # measured: see dev/LOG.md
    agree = sum(a == b for a, b in zip(*choices, strict=True)) / len(forced)
    assert agree > 0.9


@pytest.mark.gpu
def test_warm_up_records_all_graphs_and_changes_no_tokens():
    model = model_on("cuda", SMALL)
    cold, warm = GraphDecoder(model, slots=5), GraphDecoder(model, slots=5)
    warm.warm_up()
    assert sorted(warm._graphs) == sorted([(19,), (35,), (67,), (9, 1), (9, 2), (9, 4), (9, 8)])
    graphs, found = dict(warm._graphs), []
    for decoder in (cold, warm):
        slot = decoder.open(SamplingParams(repetition_penalty=1.3, seed=2))
        decoder.feed(slot, [4, 5, 6])
        drawn = {slot: []}
        follow(decoder, {slot: 7}, 6, drawn)
        found.append(drawn[slot])
    assert found[0] == found[1]
    assert warm._graphs == graphs
