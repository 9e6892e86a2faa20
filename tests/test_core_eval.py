from collections import defaultdict

import numpy as np
import pytest
import torch

from nanochat import core_eval
from nanochat.common import Runtime
from nanochat.core_bundle import Bundle, CoreTask, Example, load_bundle
from nanochat.core_eval import CoreGPT, evaluate_core, score_prompts
from nanochat.core_protocol import DCLM, NANOCHAT, crop, draw_shots, evaluated_rows, make_prompts
from tests.helpers.core_bundles import write_bundle
from tests.helpers.models import SECOND, random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def bundle(tmp_path):
    return load_bundle(write_bundle(tmp_path / "bundle"))


def model_for(tokenizer, **changes):
    shape = {"vocab_size": tokenizer.get_vocab_size(), "sequence_len": 256, **changes}
    return random_model(small_config(**shape))


def task(examples, **changes):
    settings = {"label": "t", "dataset_uri": "", "icl_task_type": "multiple_choice", "num_fewshot": 0}
    return CoreTask(**{**settings, "random_baseline": 0.0, "examples": tuple(examples), **changes})


# ---------------------------------------------------------------------------------------------------------
# Scores


def reference(model, ids, start):
    """Score one prompt in a float64 forward pass with all logits."""
    ids = torch.from_numpy(ids).long()
    log_probs = model(ids[None, :-1])[0].double().log_softmax(-1)[start - 1 :]
    nats = -log_probs.gather(1, ids[start:, None])
    return nats.mean().item(), bool((log_probs.argmax(-1) == ids[start:]).all())


def random_prompts(n=60, longest=40):
    """Return prompts of many lengths, some with the same input."""
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(n):
        ids = rng.integers(0, 50, rng.integers(2, longest), dtype=np.int32)
        prompts.append((ids, int(rng.integers(1, len(ids)))))
    for ids, start in prompts[:4]:
        prompts += [(np.append(ids[:-1], last).astype(np.int32), len(ids) - 1) for last in range(50)]
        prompts += [(ids, start)]
    return prompts


@pytest.mark.parametrize("changes", [{}, {"slc_rate": 0}, {"n_kv_head": 1, "n_kernel": 5}])
@pytest.mark.parametrize("batch_tokens", [1, 48, 200, 100_000])
def test_batched_scores_equal_scores_of_single_prompts(changes, batch_tokens, monkeypatch):
    monkeypatch.setattr(core_eval, "HEAD_POSITIONS", 7)
    config = small_config(sequence_len=40, **changes)
    prompts = random_prompts()
    losses, is_greedy = score_prompts(CoreGPT(random_model(config)), prompts, batch_tokens)
    double = random_model(config).double()
    expected = [reference(double, *prompt) for prompt in prompts]
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-5)
    assert is_greedy.tolist() == [hit for _, hit in expected]
    assert is_greedy.sum() >= 4  # one of the fifty last tokens is the argmax


def test_options_are_compared_in_float32():
    """Regression: on CUDA logits were rounded to bfloat16, and the first of equal options won."""
    model = random_model(small_config())
    model.compute_dtype = torch.bfloat16
    prompts = random_prompts(40)[:40]
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight[0] * (1 + 2**-12)
    pairs = [(np.append(ids, last).astype(np.int32), len(ids)) for ids, _ in prompts for last in (0, 1)]
    losses, _ = score_prompts(CoreGPT(model), pairs, 400)
    assert {bool(a > b) for a, b in zip(losses[::2], losses[1::2], strict=True)} == {True, False}
    assert (losses[::2] != losses[1::2]).all()


def test_forward_passes_have_limited_size_and_no_duplicate_inputs(monkeypatch):
    model, shapes = random_model(small_config()), []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda idx, cache: shapes.append(tuple(idx.shape)) or hidden(idx, cache)
    )
    ids = np.arange(30, dtype=np.int32)
    four = [(np.append(ids, last).astype(np.int32), 30) for last in (1, 2, 3, 4)]
    score_prompts(CoreGPT(model), [*four, (ids[:20], 3), (ids[5:25], 3), (ids[3:23], 3)], 64)
    assert shapes == [(2, 32), (2, 32)]
    assert all(rows * width <= 64 for rows, width in shapes)


def test_padding_uses_no_other_tokens():
    """Tokens that are in no prompt may have NaN embeddings: padding must not read them."""
    prompts = [(ids % 20 + 5, start) for ids, start in random_prompts()]
    model = random_model(small_config(sequence_len=40))
    clean = score_prompts(CoreGPT(model), prompts, 400)[0]
    with torch.no_grad():
        model.transformer.wte.weight[:5] = torch.nan
        model.transformer.wte.weight[25:] = torch.nan
    np.testing.assert_array_equal(score_prompts(CoreGPT(model), prompts, 400)[0], clean)


# ---------------------------------------------------------------------------------------------------------
# The metric


def slow_core(model, tokenizer, bundle, protocol):
    """Compute accuracies one example at a time, in float64."""
    double = model.double()
    tasks = {}
    for t in bundle.tasks:
        correct = defaultdict(list)
        for row, shots in draw_shots(t, evaluated_rows(t), protocol).items():
            prompts = make_prompts(tokenizer, t, {row: shots}, protocol)
            if protocol.cuts_prompts:
                prompts = [crop(prompt, model.config.sequence_len) for prompt in prompts]
            losses, hits = zip(*(reference(double, *prompt) for prompt in prompts), strict=True)
            is_language = t.icl_task_type == "language_modeling"
            is_correct = hits[0] if is_language else losses.index(min(losses)) == t.examples[row].gold
            correct[t.examples[row].category if protocol.by_category else ""].append(is_correct)
        tasks[t.label] = np.mean([np.mean(group) for group in correct.values()])
    return tasks


@pytest.mark.parametrize("sequence_len", [256, 24])  # nearly all prompts are longer than 24
@pytest.mark.parametrize("protocol", [NANOCHAT, DCLM], ids=["nanochat", "dclm"])
def test_core_equals_a_slow_evaluation(tokenizer, bundle, sequence_len, protocol, caplog):
    config = small_config(vocab_size=tokenizer.get_vocab_size(), sequence_len=sequence_len)
    results = [
        evaluate_core(random_model(config), tokenizer, bundle, Runtime.cpu(), -1, rows, protocol)
        for rows in (1, 9)
    ]
    assert results[0] == results[1]
    accuracies = {label: result["accuracy"] for label, result in results[0]["tasks"].items()}
    assert accuracies == pytest.approx(slow_core(random_model(config), tokenizer, bundle, protocol))
    assert 0 < accuracies["who"] < 1
    assert ("cropped at the start" in caplog.text) == (sequence_len == 24 and protocol is DCLM)


@pytest.mark.parametrize("changes", [{}, SECOND], ids=["published", "second"])
def test_prompts_beyond_the_context(tokenizer, bundle, changes):
    """Nothing in the model depends on the length that it was trained for: its rotary tables grow."""
    prompts = [
        prompt
        for t in bundle.tasks
        for prompt in make_prompts(tokenizer, t, draw_shots(t, evaluated_rows(t), NANOCHAT), NANOCHAT)
    ]
    assert max(len(ids) for ids, _ in prompts) > 6 * 16
    scores = [
        score_prompts(CoreGPT(model_for(tokenizer, **changes, sequence_len=length)), prompts, 16)
        for length in (16, 256)
    ]
    np.testing.assert_array_equal(scores[0][0], scores[1][0])
    np.testing.assert_array_equal(scores[0][1], scores[1][1])


def test_accuracy_is_centered_on_the_random_baseline(tokenizer):
    """A model with uniform predictions takes the first option."""
    golds = [0, 0, 1, 0]
    rows = [Example(((f"Q{i}", "a"), (f"Q{i}", "b")), gold) for i, gold in enumerate(golds)]
    tasks = [task(rows, label="half", random_baseline=50.0), task(rows, label="none", random_baseline=0.0)]
    model = model_for(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate_core(model, tokenizer, Bundle(tasks, ["lost"]), Runtime.cpu())
    assert result == {
        "tasks": {
            "half": {"accuracy": 0.75, "centered": 0.5, "n": 4, "random_baseline": 50.0},
            "none": {"accuracy": 0.75, "centered": 0.75, "n": 4, "random_baseline": 0.0},
        },
        "core": 0.625,
        "missing_tasks": ["lost"],
    }


def test_language_modeling_needs_every_token(tokenizer, monkeypatch):
    """The model always predicts " river"."""
    (river,) = tokenizer.encode(" river")
    logits = torch.zeros(tokenizer.get_vocab_size())
    logits[river] = 1
    monkeypatch.setattr(core_eval, "head_logits", lambda x, weight: logits.expand(len(x), -1))
    texts = ["river", "river river", "river bridge", "bridge river"]
    rows = task([Example((("the", text),), 0) for text in texts], icl_task_type="language_modeling")
    result = evaluate_core(model_for(tokenizer), tokenizer, Bundle([rows], []), Runtime.cpu())
    assert result["core"] == 0.5


def test_a_subset_is_fixed_and_shuffled(tokenizer, bundle, monkeypatch):
    calls = []
    real = core_eval.make_prompts
    monkeypatch.setattr(
        core_eval,
        "make_prompts",
        lambda tokenizer, task, shots, protocol: (
            calls.extend((task.label, row) for row in shots) or real(tokenizer, task, shots, protocol)
        ),
    )
    rounds = []
    for max_per_task in (3, 3, 5, 100, -1):
        calls.clear()
        result = evaluate_core(model_for(tokenizer), tokenizer, bundle, Runtime.cpu(), max_per_task)
        rounds.append([i for label, i in calls if label == "pick"])
        assert result["tasks"]["pick"]["n"] == len(rounds[-1])
    three, three_again, five, hundred, unlimited = rounds
    assert three == three_again == five[:3]
    assert three != [0, 1, 2]
    assert hundred == unlimited
    assert sorted(unlimited) == list(range(9))


def test_ranks_share_the_work(tokenizer, bundle, monkeypatch):
    """Each row is evaluated on one rank, and the counts add up to those of a single rank."""
    monkeypatch.setattr(core_eval, "CHUNK_EXAMPLES", 2)
    counts = {}

    class Rank(Runtime):
        def sum_(self, tensor):
            counts[self.world_size, self.rank] = tensor.clone()
            return tensor

    cpu = Runtime.cpu()
    for world_size in (1, 3):
        for rank in range(world_size):
            runtime = Rank(
                device=cpu.device, compute_dtype=cpu.compute_dtype, rank=rank, world_size=world_size
            )
            evaluate_core(model_for(tokenizer), tokenizer, bundle, runtime)
    assert torch.equal(counts[1, 0], sum(counts[3, rank] for rank in range(3)))
    assert counts[1, 0][:, 1].tolist() == [9, 7, 8]
    assert counts[3, 0][:, 1].tolist() == [3, 3, 3]


def test_non_finite_losses_are_an_error(tokenizer, bundle):
    model = model_for(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="of 24 examples is not finite"):
        evaluate_core(model, tokenizer, bundle, Runtime.cpu())


def test_blocks_are_not_recompiled_and_no_random_number_is_drawn(tokenizer, bundle):
    """Training compiles blocks for one shape; CORE has dozens."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = model_for(tokenizer)
    for block in model.transformer.h:
        block.compile(backend=backend, dynamic=False)
    state = torch.get_rng_state()
    evaluate_core(model, tokenizer, bundle, Runtime.cpu())
    assert compiled == []
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.zeros(1, 8, dtype=torch.long))
    assert compiled
