"""The two protocols of CORE on rows written here: texts, token ids, scored tokens and outcomes by hand."""

import random
from dataclasses import fields, replace
from math import log

import numpy as np
import pytest

from nanochat.common import Runtime
from nanochat.core_bundle import Bundle, CoreTask, Example
from nanochat.core_eval import evaluate_core, score_prompts
from nanochat.core_protocol import (
    DCLM,
    NANOCHAT,
    PROTOCOLS,
    crop,
    differing_starts,
    draw_shots,
    evaluated_rows,
    find_protocol,
    groups_of,
    make_prompts,
    prompt_texts,
    tokenize_prompts,
)
from tests.helpers.core_bundles import PLAIN_WORDS
from tests.helpers.core_models import BOS, ByteTokenizer, PairModel
from tests.helpers.vocabulary import train_tokenizer

BYTES = ByteTokenizer()
both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def task(examples, **changes):
    settings = {"label": "t", "dataset_uri": "", "icl_task_type": "multiple_choice", "num_fewshot": 0}
    return CoreTask(**{**settings, "random_baseline": 0.0, "examples": tuple(examples), **changes})


def choices(query, *texts, gold=0, category=""):
    return Example(tuple((query, text) for text in texts), gold, category)


def numbered(n, categories=""):
    """Return rows "Q0", "Q1", ... with the right answers "yes0", "yes1", ..."""
    return [choices(f"Q{i}", f"no{i}", f"yes{i}", gold=1, category=categories[i : i + 1]) for i in range(n)]


def scored(task, protocol, row=0, shots=()):
    """Return the text of each prompt of a row in bytes, as (before the scored tokens, scored tokens)."""
    prompts = make_prompts(BYTES, task, {row: list(shots)}, protocol)
    assert all(ids[0] == BOS and start >= 1 and ids.dtype == np.int32 for ids, start in prompts)
    return [(bytes(ids[1:start].tolist()), bytes(ids[start:].tolist())) for ids, start in prompts]


def test_names():
    assert [find_protocol(name) for name in ("nanochat", "dclm")] == [NANOCHAT, DCLM]
    with pytest.raises(ValueError, match=r"protocol='lm-eval' is not one of nanochat, dclm"):
        find_protocol("lm-eval")
    differing = [f.name for f in fields(NANOCHAT) if getattr(NANOCHAT, f.name) == getattr(DCLM, f.name)]
    assert differing == []  # a rule that both have is no rule of a protocol


# ---------------------------------------------------------------------------------------------------------
# White space and scored tokens

LETTERS = choices("A. Jabem\nB. Angor\nAnswer: ", "A", "B ")
SHARED = choices(" Who?\n", "the cat", " the dog ")
WHO = Example(((" the cat is ", "big "), ("the dog is", "big ")), 1)
SUM = Example(((" 2 + 2 =\n", "4 "),), 0)


def test_token_ids_in_full():
    """The query ends in a space, the delimiter is one: two spaces for one protocol, one for the other."""
    letter = task([choices("Q: ", "A", "B")])
    assert [(ids.tolist(), start) for ids, start in make_prompts(BYTES, letter, {0: []}, NANOCHAT)] == [
        ([256, 81, 58, 32, 32, 65], 5),
        ([256, 81, 58, 32, 32, 66], 5),
    ]
    assert [(ids.tolist(), start) for ids, start in make_prompts(BYTES, letter, {0: []}, DCLM)] == [
        ([256, 81, 58, 32, 65], 3),
        ([256, 81, 58, 32, 66], 3),
    ]


def test_multiple_choice():
    letters, shared = task([LETTERS]), task([SHARED], continuation_delimiter="\nA: ")
    assert scored(letters, NANOCHAT) == [
        (b"A. Jabem\nB. Angor\nAnswer:  ", b"A"),
        (b"A. Jabem\nB. Angor\nAnswer:  ", b"B "),
    ]
    assert scored(letters, DCLM) == [
        (b"A. Jabem\nB. Angor\nAnswer:", b" A"),
        (b"A. Jabem\nB. Angor\nAnswer:", b" B"),
    ]
    assert scored(shared, NANOCHAT) == [(b" Who?\n\nA: ", b"the cat"), (b" Who?\n\nA: ", b" the dog ")]
    assert scored(shared, DCLM) == [(b"Who?\nA:", b" the cat"), (b"Who?\nA:", b" the dog")]
    same = task([choices("Who?", "the cat", "the dog")])
    assert scored(same, NANOCHAT) == [(b"Who? the ", b"cat"), (b"Who? the ", b"dog")]
    assert scored(same, DCLM) == [(b"Who?", b" the cat"), (b"Who?", b" the dog")]


def test_schema():
    """The common end reaches back into the contexts."""
    who = task([WHO], icl_task_type="schema")
    assert scored(who, NANOCHAT) == [(b" the cat is ", b" big "), (b"the dog is", b" big ")]
    assert scored(who, DCLM) == [(b"the cat is", b" big"), (b"the dog is", b" big")]
    plain = task([Example((("the cat is", "big"), ("the dog is", "big")), 1)], icl_task_type="schema")
    assert scored(plain, NANOCHAT) == [(b"the cat", b" is big"), (b"the dog", b" is big")]
    assert scored(plain, DCLM) == [(b"the cat is", b" big"), (b"the dog is", b" big")]


def test_language_modeling():
    """nanochat's protocol strips the context here too, but not the continuation."""
    total = task([SUM], icl_task_type="language_modeling")
    assert scored(total, NANOCHAT) == [(b"2 + 2 =", b" 4 ")]
    assert scored(total, DCLM) == [(b"2 + 2 =", b" 4")]
    empty = task([Example((("", "light"),), 0)], icl_task_type="language_modeling")
    assert scored(empty, NANOCHAT) == scored(empty, DCLM) == [(b"", b" light")]


def test_an_option_that_begins_another_has_a_scored_token():
    """Nothing of it would differ, and the mean over no tokens is not a number."""
    assert scored(task([choices("Q", "ab", "abc")]), NANOCHAT) == [(b"Q a", b"b"), (b"Q ab", b"c")]
    assert scored(task([choices("Q", "ab", "ab")]), NANOCHAT) == [(b"Q a", b"b"), (b"Q a", b"b")]
    same = np.arange(4, dtype=np.int32)
    assert differing_starts([same, same], "schema") == [1, 1]
    assert differing_starts([same, same + 9], "schema") == [3, 3]
    assert differing_starts([same, same + 9], "multiple_choice") == [1, 1]


# ---------------------------------------------------------------------------------------------------------
# Solved examples

CATEGORIES = "aabbba"
SIX = task(numbered(6, CATEGORIES), num_fewshot=2, continuation_delimiter="\nAnswer: ")


def test_the_evaluated_list():
    """As random.Random(1337).shuffle gives it; in both protocols a cut keeps its start."""
    assert evaluated_rows(SIX) == evaluated_rows(SIX, 99) == [1, 0, 3, 2, 5, 4]
    assert evaluated_rows(SIX, 4) == [1, 0, 3, 2]


def test_nanochat_draws_from_the_evaluated_list():
    """Categories are ignored, and a cut list gives other examples: only rows of the list are drawn."""
    draws = {1: [5, 0], 0: [5, 4], 3: [4, 5], 2: [0, 5], 5: [1, 2], 4: [1, 3]}
    assert draw_shots(SIX, evaluated_rows(SIX), NANOCHAT) == draws
    assert draw_shots(SIX, evaluated_rows(SIX, 4), NANOCHAT) == {1: [3, 0], 0: [2, 3], 3: [2, 0], 2: [1, 0]}
    assert draw_shots(replace(SIX, label="other"), evaluated_rows(SIX), NANOCHAT) == draws
    large = task(numbered(300), num_fewshot=10)
    rows = evaluated_rows(large)
    for i, (row, shots) in enumerate(draw_shots(large, rows, NANOCHAT).items()):
        assert row == rows[i]
        assert shots == random.Random(1234 + i).sample([other for other in rows if other != row], 10)


def test_dclm_draws_within_the_category():
    """One generator for all rows of the file, so a cut changes nothing."""
    draws = {0: [5, 1], 1: [0, 5], 5: [0, 1], 2: [3, 4], 3: [2, 4], 4: [2, 3]}
    assert draw_shots(SIX, evaluated_rows(SIX), DCLM) == draws
    assert draw_shots(SIX, evaluated_rows(SIX, 2), DCLM) == draws


def test_solved_examples_and_what_separates_them():
    assert prompt_texts(SIX, 1, [5, 0], NANOCHAT) == [
        ("Q5\nAnswer: yes5\n\nQ0\nAnswer: yes0\n\nQ1\nAnswer: ", "no1"),
        ("Q5\nAnswer: yes5\n\nQ0\nAnswer: yes0\n\nQ1\nAnswer: ", "yes1"),
    ]
    assert prompt_texts(SIX, 1, [5, 0], DCLM)[0] == (
        "Q5\nAnswer: yes5\nQ0\nAnswer: yes0\nQ1\nAnswer: ",
        "no1",
    )


def test_white_space_of_solved_examples():
    letters = task([LETTERS, choices("Q ", "x ", "y ", gold=1)])
    assert scored(letters, NANOCHAT, 0, [1])[0][0] == b"Q  y \n\nA. Jabem\nB. Angor\nAnswer:  "
    assert scored(letters, DCLM, 0, [1])[0][0] == b"Q y\nA. Jabem\nB. Angor\nAnswer:"
    sums = task([SUM, Example(((" 1 + 1 = ", " 2"),), 0)], icl_task_type="language_modeling")
    assert scored(sums, NANOCHAT, 0, [1]) == [(b"1 + 1 =  2\n\n2 + 2 =", b" 4 ")]
    assert scored(sums, DCLM, 0, [1]) == [(b"1 + 1 = 2\n2 + 2 =", b" 4")]
    who = task([WHO, replace(WHO, gold=0)], icl_task_type="schema")
    assert scored(who, NANOCHAT, 0, [1])[1] == (b" the cat is  big \n\nthe dog is", b" big ")
    assert scored(who, DCLM, 0, [1])[1] == (b"the cat is big\nthe dog is", b" big")


@both_protocols
@pytest.mark.parametrize("n", [1, 2, 4, 5, 6])
def test_a_small_pool_yields_fewer_shots(n, protocol):
    """random.sample raised if a task had fewer rows than shots."""
    small = task(numbered(n, "a" * n), num_fewshot=5)
    shots = draw_shots(small, evaluated_rows(small), protocol)
    for row in range(n):
        assert len(shots[row]) == len(set(shots[row])) == min(5, n - 1)
        assert set(shots[row]) <= set(range(n)) - {row}
    none = draw_shots(replace(small, num_fewshot=0), range(n), protocol)
    assert none == {row: [] for row in range(n)}


# ---------------------------------------------------------------------------------------------------------
# Tokens of a real vocabulary


def test_the_continuation_starts_at_the_first_different_token(tokenizer):
    texts = [
        ("over the ", "river"),
        ("over the\nAnswer: ", "1887"),
        ("the riv", "er of"),
        ("", "light"),
        ("a", "b"),
    ]
    prompts = tokenize_prompts(tokenizer, texts)
    rest = [tokenizer.decode(ids[start:].tolist()) for ids, start in prompts]
    # the space belongs to the continuation, as a separate token or not; " river" spans the boundary
    assert rest == [" river", " 1887", " river of", "light", "b"]
    for (ids, start), (before, continuation) in zip(prompts, texts, strict=True):
        assert ids.tolist() == tokenizer.encode(before + continuation, prepend="<|bos|>")
        assert 1 <= start < len(ids)


def test_any_boundary_leaves_a_prefix_and_a_continuation(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        text = " ".join(rng.choices(PLAIN_WORDS, k=6))
        cut = rng.randrange(len(text))
        ((ids, start),) = tokenize_prompts(tokenizer, [(text[:cut], text[cut:])])
        context = tokenizer.encode(text[:cut].rstrip(), prepend="<|bos|>")
        assert context[:start] == ids[:start].tolist()
        assert start < len(ids)
        assert tokenizer.decode(ids[start:].tolist()).endswith(text[cut:])


def test_crop():
    ids = np.arange(10, dtype=np.int32)
    for sequence_len, kept, start in [(20, 10, 7), (9, 10, 7), (8, 9, 6), (4, 5, 2), (3, 4, 1)]:
        cropped, new_start = crop((ids, 7), sequence_len)
        assert (cropped.tolist(), new_start) == (list(range(10 - kept, 10)), start)
        assert cropped[new_start:].tolist() == [7, 8, 9]  # the whole continuation
    cropped, start = crop((ids, 7), 2)  # it is too long: its last two tokens are scored
    assert (cropped.tolist(), start) == ([7, 8, 9], 1)


# ---------------------------------------------------------------------------------------------------------
# Outcomes


def accuracy(model, rows, protocol, **settings):
    bundle = Bundle([task(rows, **settings)], [])
    result = evaluate_core(model, BYTES, bundle, Runtime.cpu(), protocol=protocol)
    return result["tasks"]["t"]["accuracy"]


def test_scored_tokens_decide():
    """After "Q", " a" has a loss of 2 ln 4, which the longer option spreads over more tokens."""
    model = PairModel({"Q ": 1 / 4, " a": 1 / 4, "ab": 1 / 2, "ac": 1 / 4, "cd": 3 / 4})
    row = choices("Q", "ab", "acd")
    losses = {}
    for protocol in PROTOCOLS:
        prompts = make_prompts(BYTES, task([row]), {0: []}, protocol)
        losses[protocol.name] = score_prompts(model, prompts, 100)[0]
    np.testing.assert_allclose(losses["nanochat"], [log(2), (log(4) + log(4 / 3)) / 2], rtol=1e-6)
    np.testing.assert_allclose(
        losses["dclm"], [(2 * log(4) + log(2)) / 3, (3 * log(4) + log(4 / 3)) / 4], rtol=1e-6
    )
    assert [accuracy(model, [row], protocol) for protocol in PROTOCOLS] == [1, 0]


def test_white_space_decides():
    """With its space the context ends in " ", after which "A" is likely, else in "x", after which "B" is."""
    model = PairModel({"xA": 0.1, "xB": 0.8, " A": 0.8, " B": 0.1})
    rows = [choices("x ", "A", "B")]
    assert [accuracy(model, rows, protocol, continuation_delimiter="") for protocol in PROTOCOLS] == [1, 0]


def test_every_token_of_language_modeling_is_the_likeliest():
    model = PairModel({"= ": 0.9, " 4": 0.9, "4 ": 0.1, "42": 0.8, " 5": 0.05})
    settings = {"icl_task_type": "language_modeling"}
    right, wrong, first_only, last_only = (
        [Example((("2 + 2 =", text),), 0)] for text in ("42", "5", "4 ", "52")
    )
    for protocol in PROTOCOLS:
        assert accuracy(model, right, protocol, **settings) == 1
        assert accuracy(model, wrong, protocol, **settings) == 0
        assert accuracy(model, last_only, protocol, **settings) == 0
    # the space at the end is a token that is not the likeliest, and is stripped by the other
    assert [accuracy(model, first_only, protocol, **settings) for protocol in PROTOCOLS] == [0, 1]


def test_accuracy_over_categories():
    """Three rows of one category are right, the one of the other is not: 3 of 4, or the mean of 1 and 0."""
    model = PairModel({" y": 0.9})
    rows = [choices("Q", "y", "n", gold=int(i == 3), category="aaab"[i]) for i in range(4)]
    assert [accuracy(model, rows, protocol) for protocol in PROTOCOLS] == [0.75, 0.5]
    categorised = task(rows)
    assert groups_of(categorised, [3, 1, 0], NANOCHAT) == [[3, 1, 0]]
    assert groups_of(categorised, [3, 1, 0], DCLM) == [[1, 0], [3]]
    assert groups_of(categorised, [0, 2], DCLM) == [[0, 2]]  # none is empty


@pytest.mark.parametrize(("is_bounded", "lengths"), [(False, [1008, 16]), (True, [16, 16])])
def test_long_prompts(is_bounded, lengths, caplog):
    """The one protocol never cuts, unless the model has no more positions; the other does at the context."""
    model = PairModel({" y": 0.9}, sequence_len=16, is_bounded=is_bounded)
    rows = [choices(1000 * "Q", "y", "n")]
    for protocol, length in zip(PROTOCOLS, lengths, strict=True):
        assert accuracy(model, rows, protocol) == 1
        assert model.lengths.pop() == length
        is_cut = "1 of 1 examples exceed the context of 16 tokens and were cropped" in caplog.text
        assert is_cut == (length == 16)
        caplog.clear()
