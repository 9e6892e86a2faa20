"""The engine: rows do not depend on the batch, results of the calculator are forced, ended rows leave."""

import itertools
from collections import Counter, deque
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from nanochat import engine as engine_module
from nanochat.decode.decoder import Decoder, PlainDecoder
from nanochat.engine import Engine
from nanochat.sampling import GREEDY, SamplingParams
from nanochat.tokenizer import SPECIAL_TOKENS
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer

PLANS = [
    {"slc_rate": 3},
    {"slc_rate": 0, "n_layer": 2, "n_kv_head": 1},
    {"slc_rate": 2, "n_kernel": 5},
    {"slc_rate": 9, "n_layer": 3},
]

SEEDED = SamplingParams(seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def engine(tokenizer):
    return Engine(random_model(small_config(vocab_size=VOCAB_SIZE)), tokenizer)


@pytest.fixture(scope="module")
def spell(tokenizer):
    """Return the ids of texts and of names of special tokens."""

    def spelled(*pieces):
        parts = [
            [tokenizer.encode_special(p)] if p in SPECIAL_TOKENS else tokenizer.encode(p) for p in pieces
        ]
        return [id for part in parts for id in part]

    return spelled


def random_prompts(n=7):
    torch.manual_seed(1)
    return [torch.randint(0, 300, (length,)).tolist() for length in (5, 1, 20, 2, 3, 9, 5)[:n]]


# ---------------------------------------------------------------------------------------------------------
# With real models


@torch.no_grad()
def greedy_by_full_forwards(model, prompt, n, ends):
    """Return greedy tokens, each from a forward over all tokens before it, and the end token."""
    found = []
    for _ in range(n):
        token = int(model(torch.tensor([[*prompt, *found]]))[0, -1].argmax())
        if token in ends:
            return found, token
        found.append(token)
    return found, None


@pytest.mark.parametrize("plan", PLANS)
def test_rows_do_not_depend_on_the_batch(plan, tokenizer):
    model = random_model(small_config(vocab_size=VOCAB_SIZE, **plan))
    engine, prompts = Engine(model, tokenizer), random_prompts()
    ends = {tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")}
    expected = [greedy_by_full_forwards(model, prompt, 12, ends) for prompt in prompts]
    for batch_size in (64, 2, 1):
        found = engine.complete(prompts, max_tokens=12, batch_size=batch_size, sampling=GREEDY)
        assert [(row.tokens, row.end_token) for row in found] == expected
    for prompt, (tokens, _) in zip(prompts, expected, strict=True):
        assert list(model.generate(torch.tensor([prompt]), 12, temperature=0)) == tokens
        columns = list(engine.generate(prompt, max_tokens=12, temperature=0))
        assert [column[0] for column, _ in columns][: len(tokens)] == tokens
        both, masks = engine.generate_batch(prompt, num_samples=2, max_tokens=12, temperature=0)
        assert both == 2 * [[*prompt, *tokens]]
        assert masks == 2 * [[0] * len(prompt) + [1] * len(tokens)]


def test_the_right_rows_continue_when_others_end(engine, monkeypatch):
    """A random model rarely ends a row, so a token that it samples often becomes the end token."""
    prompts = random_prompts()
    plain = engine.complete(prompts, max_tokens=14, sampling=GREEDY)
    frequent = Counter(token for row in plain for token in set(row.tokens[1:])).most_common(4)
    sizes = []
    launch = PlainDecoder.launch
    monkeypatch.setattr(
        PlainDecoder, "launch", lambda self, last: (sizes.append(len(last)), launch(self, last))
    )
    for end, n_rows in frequent:
        engine.special["<|assistant_end|>"] = end
        ends = {end, engine.special["<|bos|>"]}
        found = engine.complete(prompts, max_tokens=14, sampling=GREEDY)
        expected = [greedy_by_full_forwards(engine.model, prompt, 14, ends) for prompt in prompts]
        assert [(row.tokens, row.end_token) for row in found] == expected
        assert sum(row.end_token == end for row in found) >= n_rows
    assert len(set(sizes)) > 1


def test_every_sample_draws_its_own_first_token(engine):
    """The first token was drawn once and copied to all samples."""
    column, masks = next(engine.generate([1, 2, 3], num_samples=4000, seed=0))
    assert masks == [1] * 4000
    with torch.no_grad():
        probabilities = engine.model(torch.tensor([[1, 2, 3]]))[0, -1].softmax(-1)
    shares = torch.bincount(torch.tensor(column), minlength=VOCAB_SIZE) / 4000
    assert (shares - probabilities).abs().sum() / 2 < 0.15
    assert (
        shares - 1 / VOCAB_SIZE
    ).abs().sum() / 2 > 0.2  # a uniform distribution does not meet the bound above
    results, _ = engine.generate_batch([1, 2, 3], num_samples=64, max_tokens=2, seed=0)
    assert len({tuple(row[3:4]) for row in results}) > 20


def test_seeds(engine):
    """A fixed default seed made all answers of a chat the same at any temperature."""

    def draw(seed):
        return engine.generate_batch([5, 6], num_samples=3, max_tokens=8, seed=seed)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is untouched


def test_samples_of_several_prompts(engine):
    prompts = random_prompts()
    done = []
    settings = {"num_samples": 3, "batch_size": 7, "on_done": done.append}
    found = engine.complete(prompts, max_tokens=6, sampling=GREEDY, **settings)
    alone = engine.complete(prompts, max_tokens=6, sampling=GREEDY)
    assert [row.tokens for row in found] == [row.tokens for row in alone for _ in range(3)]
    assert done == [6, 6, 6, 3]
    assert engine.complete([], max_tokens=6, sampling=GREEDY) == []


def test_interleaved_generations_do_not_mix_and_leave_the_model_trainable(engine):
    one = engine.generate([1, 2], max_tokens=6, temperature=0)
    two = engine.generate([3, 4, 5], max_tokens=6, temperature=0)
    mixed = list(zip(one, two, strict=True))
    for prompt, which in (([1, 2], 0), ([3, 4, 5], 1)):
        assert [pair[which] for pair in mixed] == list(engine.generate(prompt, max_tokens=6, temperature=0))
    assert not torch.is_inference_mode_enabled()
    engine.model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()


def test_an_interrupted_prompt_frees_its_slots(engine, monkeypatch):
    """Ctrl-C during a prefill left no slot for the next prompt."""
    wanted = engine.complete([[1, 2, 3]], max_tokens=5, num_samples=3, sampling=SEEDED)
    decoder = engine._idle[0]
    for name in ("feed", "fork"):

        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(decoder, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.complete([[1, 2, 3]], max_tokens=5, num_samples=3, sampling=SEEDED)
        assert engine._idle == [decoder]
        assert engine.complete([[1, 2, 3]], max_tokens=5, num_samples=3, sampling=SEEDED) == wanted


def test_idle_decoders_do_not_accumulate(engine):
    """Each larger request kept the previous decoder, with its weights, state and graphs."""
    for num_samples in (2, 1, 3, 4):
        engine.complete([[1, 2]], max_tokens=2, sampling=GREEDY, num_samples=num_samples)
    assert [decoder.slots for decoder in engine._idle] == [4]
    engine.complete(
        [[1] * 30], max_tokens=engine.model.config.sequence_len, sampling=GREEDY
    )  # few rows, but a long context
    assert [decoder.slots for decoder in engine._idle] == [4, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": []}, "length of a prompt must be"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_settings_out_of_range(engine, settings, message):
    settings = {"tokens": [1], **settings}
    with pytest.raises(ValueError, match=message):
        next(engine.generate(**settings))
    with pytest.raises(ValueError, match=message):
        engine.generate_batch(**settings)


def test_batch_size_must_hold_the_samples_of_a_prompt(engine):
    with pytest.raises(ValueError, match="num_samples=3 must fit into batch_size=2"):
        engine.complete([[1]], max_tokens=1, sampling=GREEDY, num_samples=3, batch_size=2)


def test_max_tokens_defaults_to_the_rest_of_the_context(engine):
    engine.special["<|bos|>"] = engine.special["<|assistant_end|>"] = -1  # rows never end
    for n_prompt, n_new in ((30, 2), (31, 1), (40, 1)):  # the context has 32
        assert len(list(engine.generate([1] * n_prompt, temperature=0))) == n_new
        assert len(engine.generate_batch([1] * n_prompt, temperature=0)[0][0]) == n_prompt + n_new


# ---------------------------------------------------------------------------------------------------------
# With a scripted model


class ScriptedDecoder(Decoder):
    """The i-th sequence that is opened or forked draws scripts[i]; `given` has the inputs of each launch."""

    device, overlaps = torch.device("cpu"), False

    def __init__(self, scripts, given):
        self.slots, self.context, self.scripts, self.given = 100, 100, scripts, given
        self.places, self.drawn, self.last_slot = {}, deque(), itertools.count()

    def open(self, params):
        slot = next(self.last_slot)
        self.places[slot] = 0
        return slot

    def feed(self, slot, tokens):
        pass

    def fork(self, slot, params):
        return self.open(params)

    def launch(self, last):
        assert set(last) == set(self.places)
        drawn = [self.scripts[slot][min(self.places[slot], len(self.scripts[slot]) - 1)] for slot in last]
        inputs = [self.latest[slot] if token is None else token for slot, token in last.items()]
        self.given.append(inputs)
        self.latest = dict(zip(last, drawn, strict=True))
        for slot in last:
            self.places[slot] += 1
        self.drawn.append(drawn)

    def collect(self):
        return self.drawn.popleft()

    def close(self, slot):
        del self.places[slot]

    def load(self, model):
        self.last_slot = itertools.count()


class ScriptedModel:
    """Row i draws scripts[i], whatever its input."""

    config, device = SimpleNamespace(sequence_len=64), torch.device("cpu")

    def __init__(self, *scripts):
        self.scripts, self.given = scripts, []


@pytest.fixture(params=[False, True], ids=["synchronous", "overlapping"])
def scripted(request, monkeypatch):
    """Give engines of scripted models a synchronous or an overlapping decoder; return if it overlaps."""
    monkeypatch.setattr(ScriptedDecoder, "overlaps", request.param)
    monkeypatch.setattr(
        engine_module, "decoder_for", lambda model, *_: ScriptedDecoder(model.scripts, model.given)
    )
    return request.param


@pytest.fixture
def write(tokenizer, spell, scripted):
    """Let a row draw pieces, where None is a token that will be forced; return its completion."""

    def written(*pieces, n_more=0):
        script = [id for piece in pieces for id in ([0] if piece is None else spell(piece))]
        model = ScriptedModel(script)
        (row,) = Engine(model, tokenizer).complete([[1]], max_tokens=len(script) + n_more, sampling=GREEDY)
        fed = [inputs[0] for inputs in model.given[1:]]
        expected = row.tokens[:-1] if row.end_token is None else row.tokens  # forced ones are inputs, too
        assert fed[: len(expected)] == expected
        assert len(fed) - len(expected) <= scripted  # an overlapping decoder runs one step too many
        return row

    return written


def test_the_result_of_a_call_is_forced(write, spell):
    call = spell("Is ", "<|python_start|>", "12 * (3 + 4)", "<|python_end|>")
    result = spell("<|output_start|>", "84", "<|output_end|>")
    forced = [None] * len(result)
    row = write(
        *("Is ", "<|python_start|>", "12 * (3 + 4)", "<|python_end|>"), *forced, "ok", "<|assistant_end|>"
    )
    assert row.tokens == [*call, *result, *spell("ok")]
    assert row.mask == [1] * len(call) + [0] * len(result) + [1] * len(spell("ok"))
    assert [row.end_token] == spell("<|assistant_end|>")


def test_an_end_token_sampled_where_a_token_is_forced_is_ignored(write, spell):
    result = spell("<|output_start|>", "5", "<|output_end|>")
    row = write("<|python_start|>", "2+3", "<|python_end|>", *["<|bos|>"] * len(result), "ok", "<|bos|>")
    assert row.tokens == [*spell("<|python_start|>", "2+3", "<|python_end|>"), *result, *spell("ok")]
    assert [row.end_token] == spell("<|bos|>")


@pytest.mark.parametrize(
    "pieces",
    [
        ("<|python_start|>", "2+3"),  # no end
        ("<|python_start|>", "2+3", "<|assistant_end|>"),
        ("<|python_start|>", "<|python_end|>", "ok"),
        ("<|python_start|>", "1/0", "<|python_end|>", "ok"),
        ("<|python_start|>", "import os", "<|python_end|>", "ok"),
        ("2+3", "<|python_end|>", "ok"),  # no start
        ("<|python_start|>", "2+", "<|python_end|>", "3", "<|python_end|>", "ok"),
        ("<|output_start|>", "2+3", "<|output_end|>", "ok"),
    ],
)
def test_calls_that_force_nothing(write, spell, pieces):
    row = write(*pieces)
    assert row.tokens == spell(*(piece for piece in pieces if piece != "<|assistant_end|>"))
    assert row.mask == [1] * len(row.tokens)


def test_a_restarted_call_and_a_second_call(write, spell):
    result = spell("<|output_start|>", "7", "<|output_end|>")
    call = ("<|python_start|>", "3+4", "<|python_end|>")
    row = write("<|python_start|>", "1+", *call, *[None] * len(result), *call, *[None] * len(result), "ok")
    first = spell("<|python_start|>", "1+", *call)
    assert row.tokens == [*first, *result, *spell(*call), *result, *spell("ok")]
    assert row.mask.count(0) == 2 * len(result)
    cut = write(*call, n_more=1)  # max_tokens is reached in the middle of the result
    assert cut.tokens == [*spell(*call), result[0]]
    assert (cut.mask[-1], cut.end_token) == (0, None)


def test_ended_rows_free_their_slots(tokenizer, spell, scripted):
    """They used to run through the model until the last row ended."""
    (end,) = spell("<|assistant_end|>")
    lengths = [1, 9, 2, 5, 3, 5, 2, 16]
    scripts = [[100 + row] * length + [end] for row, length in enumerate(lengths)]
    model = ScriptedModel(*scripts)
    found = Engine(model, tokenizer).complete(
        [[row + 1] for row in range(8)], max_tokens=40, sampling=GREEDY, batch_size=3
    )
    assert [row.tokens for row in found] == [script[:-1] for script in scripts]
    assert {row.end_token for row in found} == {end}
    sizes = [len(inputs) for inputs in model.given]
    assert max(sizes) == 3
    surplus = len(scripts) if scripted else 0  # overlapping: one step too many for each row
    assert sum(sizes) == sum(map(len, scripts)) + surplus


def test_columns_have_every_sample_and_ended_ones_repeat_their_end_token(tokenizer, spell, scripted):
    (end,) = spell("<|assistant_end|>")
    model = ScriptedModel([50, 51, end], [50, end], [50, 52, 53, 54, end])
    columns = list(Engine(model, tokenizer).generate([1, 2], num_samples=3, temperature=0))
    assert [tokens for tokens, _ in columns] == [
        [50, 50, 50],
        [51, end, 52],
        [end, end, 53],
        [end, end, 54],
        [end, end, end],
    ]
    assert [masks for _, masks in columns] == [[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1]]
    two = islice(Engine(model, tokenizer).generate([1, 2], num_samples=3, max_tokens=2, temperature=0), 9)
    assert len(list(two)) == 2
    results, masks = Engine(model, tokenizer).generate_batch([1, 2], num_samples=3, temperature=0)
    assert results == [[1, 2, 50, 51], [1, 2, 50], [1, 2, 50, 52, 53, 54]]
    assert masks == [[0, 0, 1, 1], [0, 0, 1], [0, 0, 1, 1, 1, 1]]


def test_positional_settings_are_in_nanochat_s_order(engine):
    """top_p came before seed: a positional seed of 42 was an invalid top_p."""
    named = {"num_samples": 2, "max_tokens": 5, "temperature": 0.6, "top_k": 50, "seed": 42}
    assert list(engine.generate([1, 2], 2, 5, 0.6, 50, 42)) == list(engine.generate([1, 2], **named))
    assert engine.generate_batch([1, 2], 2, 5, 0.6, 50, 42) == engine.generate_batch([1, 2], **named)
