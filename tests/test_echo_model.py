"""The model for load tests: its answers are known at any size, and depend on the state of their own row."""

import random

import pytest
import torch

from nanochat.serve.worker import Worker
from tests.helpers.echo_model import KEYS, echo, echo_config, echo_model
from tests.helpers.vocabulary import WORDS, train_tokenizer
from tests.helpers.workers import Reader

TOKENIZER = train_tokenizer()


def prompt(rng, num_words):
    words = rng.choices(WORDS, k=num_words)
    words.insert(rng.randrange(num_words + 1), rng.choice(KEYS))
    return TOKENIZER.encode(" ".join(words))


def model_of(dtype=torch.float32, **changes):
    model = echo_model(echo_config(TOKENIZER.get_vocab_size(), **changes))
    model.compute_dtype = dtype
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"n_layer": 6, "n_head": 4, "n_kv_head": 2, "n_embd": 256}])
def test_answers_in_a_batch(dtype, changes):
    rng = random.Random(0)
    prompts = [prompt(rng, num_words) for num_words in (1, 2, 9, 40, 3, 1, 200, 7)]
    worker = Worker(model_of(dtype, **changes), TOKENIZER, "echo", slots=3, prefill_chunk=16)
    readers = [Reader(worker, tokens=p, max_tokens=30, temperature=0.0) for p in prompts]
    worker.start()
    found = [TOKENIZER.decode(reader.all().tokens[0]) for reader in readers]
    worker.close(drain=True)
    assert found == [echo(TOKENIZER, p, 30) for p in prompts]
    assert len(set(found)) == len(prompts)


def test_logits_are_far_apart():
    model = model_of(torch.bfloat16)
    tokens = torch.tensor([prompt(random.Random(1), 300)])
    best, second = model.next_logits(tokens, model.new_cache(1, 1024))[0].topk(2).values
    assert best - second > 10


@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_the_state_of_another_row_changes_the_answer(kind):
    """Swap the state of one layer between two rows."""
    model = model_of()
    ids = TOKENIZER.encode("a K river"), TOKENIZER.encode("of B light")
    cache, first = model.new_cache(2, 64), []
    for row, prompt_ids in enumerate(ids):
        alone = model.new_cache(1, 64)
        first.append(model.next_logits(torch.tensor([prompt_ids]), alone).argmax(-1))
        cache.copy_row(row, alone, 0)
    tokens = torch.cat(first)
    layer = cache.layers[kind == "attention"]
    for state in layer.windows.values() if kind == "conv" else layer.kv:
        state.copy_(state.flip(0))
    drawn = [tokens]
    for _ in range(5):
        drawn.append(model.next_logits(drawn[-1][:, None], cache).argmax(-1))
    for row, prompt_ids in enumerate(ids):
        expected = echo(TOKENIZER, prompt_ids, 6)
        found = TOKENIZER.decode([int(column[row]) for column in drawn])
        assert found[0] == expected[0]
        assert found[1:] != expected[1:]


def test_invalid_shapes_and_prompts():
    with pytest.raises(ValueError, match="106 wide"):
        model_of(n_embd=64)
    with pytest.raises(ValueError, match="slc2, attention"):
        model_of(slc_rate=0)
    for text in ("A river B", "the river", "A"):
        with pytest.raises(ValueError, match="one of the letters"):
            echo(TOKENIZER, TOKENIZER.encode(text), 5)
