import itertools
import math
import os
import signal
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from nanochat.common import Runtime
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import Cadence, OptimizerConfig, Plan, lr_multiplier
from nanochat.sampling import filter_logits
from nanochat.train.rl import accumulate, policy_loss, train
from nanochat.train.rollouts import Sample, advantages
from nanochat.train.run import DryRun
from tasks.common import TaskMixture
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer
from tests.helpers.wordtask import WordTask, rollouts_of

RUNTIME = Runtime.cpu()


def a_sample(ids, mask, advantage):
    return Sample(task="WordTask", ids=ids, mask=mask, has_ended=True, reward=0.0, advantage=advantage)


@pytest.fixture
def samples():
    """Of several lengths and advantages; the second has a forced token, the third no advantage."""
    return [
        a_sample([3, 4, 5, 6, 7], [0, 0, 0, 1, 1], 0.75),
        a_sample([3, 9, 8, 7, 6, 5, 4, 3, 2], [0, 0, 1, 1, 0, 1, 1, 1, 1], -0.25),
        a_sample([1, 2, 3], [0, 1, 1], 0.0),
        a_sample([11, 12, 13, 14], [0, 0, 1, 1], -0.5),
        a_sample([21, 22, 1, 49, 0, 2], [0, 1, 1, 1, 1, 1], 1.5),
    ]


def model_64():
    return random_model(small_config()).double()


def slow_gradients(samples):
    """Return loss and gradients, computed with one unpadded forward for each token."""
    model = model_64()
    terms, n_tokens = [], 0
    for sample in samples:
        for t, is_sampled in enumerate(sample.mask):
            if is_sampled:
                log_p = model(torch.tensor([sample.ids[:t]]))[0, -1].log_softmax(-1)[sample.ids[t]]
                terms.append(-sample.advantage * log_p)
                n_tokens += 1
    loss = sum(terms) / n_tokens
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()], n_tokens


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_gradients_equal_a_slow_reference_for_any_micro_batch(samples, batch_size):
    expected_loss, expected, n_tokens = slow_gradients(samples)
    model = model_64()
    loss = accumulate(model, samples, n_tokens, batch_size)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)  # summed in float32
    assert_same([p.grad for p in model.parameters()], expected)


def test_gradients_of_ranks_add_up(samples):
    """Each rank divides by the tokens of all; one without samples adds nothing."""
    _, expected, n_tokens = slow_gradients(samples)
    parts = [model_64() for _ in range(3)]
    for model, share in zip(parts, (samples[:2], samples[2:], []), strict=True):
        accumulate(model, share, n_tokens, 8)
    assert all(p.grad is None for p in parts[2].parameters())
    sums = [a.grad + b.grad for a, b in zip(parts[0].parameters(), parts[1].parameters(), strict=True)]
    assert_same(sums, expected)


def test_only_sampled_tokens_are_learned(samples):
    """Tokens of mask 1: the one that ends the answer is among them, the calculator's result is not."""
    head_rows = {}
    for masked in ([0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]):
        model = model_64()
        policy_loss(model, [a_sample([3, 4, 30, 40], masked, 1.0)], 2).backward()
        head_rows[tuple(masked)] = model.lm_head.weight.grad
    whole, without_end, without_first = head_rows.values()
    assert_same([whole], [without_end + without_first])
    assert not torch.equal(whole[40], without_end[40])


def test_samples_without_advantage_cost_no_forward(samples):
    model = model_64()
    widths = []
    model.register_forward_pre_hook(lambda module, inputs: widths.append(tuple(inputs[0].shape)))
    accumulate(model, samples, 20, 2)
    assert widths == [(2, 8), (2, 4)]  # the longest first; the one of length 3 is not there


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.0, 2), (0.5, 0)])
def test_without_top_k_the_expected_gradient_is_that_of_the_expected_reward(temperature, top_k):
    """Over all pairs of answers, of two tokens out of five; top_k or a temperature sample from another p."""
    answers = list(itertools.product(range(5), repeat=2))
    rewards = [float((a + 2 * b) % 3 == 0) for a, b in answers]

    def probabilities(model, temperature, top_k):
        logits = model(torch.tensor([[3, a] for a in range(5)]))  # (5,2,5)
        p = filter_logits(logits.flatten(0, 1) / temperature, top_k).softmax(-1).view_as(logits)
        return [p[0, 0, a] * p[a, 1, b] for a, b in answers]

    model = random_model(small_config(vocab_size=5)).double()
    expected_reward = sum(p * r for p, r in zip(probabilities(model, 1.0, 0), rewards, strict=True))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(expected_reward, list(model.parameters()))])

    with torch.no_grad():
        drawn = [p.item() for p in probabilities(model, temperature, top_k)]
    weights = [0.0] * len(answers)  # expected advantages, times how often a pair has the answer
    for pair in itertools.product(range(len(answers)), repeat=2):
        for i, advantage in zip(pair, advantages([rewards[i] for i in pair]), strict=True):
            weights[i] += drawn[pair[0]] * drawn[pair[1]] * advantage
    samples = [a_sample([3, *a], [0, 1, 1], w) for a, w in zip(answers, weights, strict=True)]
    policy_loss(model, samples, 1).backward()
    found = -torch.cat([p.grad.flatten() for p in model.parameters()])
    error = (found - exact).norm() / exact.norm()
    assert error < 1e-9 if (temperature, top_k) == (1.0, 0) else error > 0.1


# ---------------------------------------------------------------------------------------------------------
# The loop


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@dataclass(frozen=True)
class Config:
    cadence: Cadence


def run_steps(
    rollouts,
    num_steps,
    *,
    peak=0.05,
    scaled=False,
    cadence=Cadence(eval_every=2),  # noqa: B008 - frozen
    evaluate=lambda: {"accuracy": 0.5, "standard_error": 0.1},
    sample=lambda: None,
    save=lambda run: None,
    log=lambda record: None,
):
    """Train; return whether it finished, and the run. save gets the run, log each record."""
    model = rollouts.engine.model
    optimizer = build_optimizer(model, OptimizerConfig())

    class HookedRun(DryRun):
        def save(self):
            save(self)

        def log(self, record):
            super().log(record)
            log(record)

    run = HookedRun(model=model, optimizer=optimizer, runtime=RUNTIME, config=Config(cadence))
    plan = Plan(
        num_steps=num_steps,
        accumulation=1,
        tokens_per_step=1,
        lr_multiplier=partial(lr_multiplier, peak=peak, warmdown=1.0),
        momentum=OptimizerConfig().momentum_at,
    )
    settings = {"batch_size": 3, "scale_lr_by_contrast": scaled}
    return train(run, rollouts, plan, **settings, evaluate=evaluate, sample=sample), run


def test_reward_rises(tokenizer):
    """The sign and position of the gradient: a few steps teach a random model to say e."""
    rollouts = rollouts_of(tokenizer, examples_per_step=8, num_samples=8, max_new_tokens=4)
    _, run = run_steps(rollouts, 15, peak=1.0)
    rewards = [r["reward"] for r in run.records if "reward" in r]
    assert sum(rewards[:2]) / 2 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9


def test_the_record_of_a_step(tokenizer):
    rollouts = rollouts_of(tokenizer, examples_per_step=3)
    samples = rollouts.sample(0, 0, RUNTIME)
    is_finished, run = run_steps(rollouts, 2)
    assert is_finished
    records, record = run.records, run.records[1]  # after the first evaluation
    n_tokens = sum(sum(s.mask) for s in samples)
    assert record["reward"] == pytest.approx(sum(s.reward for s in samples) / 12)
    assert record["length"] == pytest.approx(n_tokens / 12)
    assert record["ended"] == pytest.approx(sum(s.has_ended for s in samples) / 12)
    assert record["contrast"] == pytest.approx(sum(s.advantage != 0 for s in samples) / 12)
    assert record["tokens_per_second"] == pytest.approx(n_tokens / record["seconds"])
    assert record["grad_norm"] > 0
    assert [r["lr_multiplier"] for r in records if "reward" in r] == pytest.approx([0.05, 0.025])
    assert [r["step"] for r in records if "accuracy" in r] == [0, 2]
    assert run.progress.loader_state["next_question"] == 6


def test_the_reward_of_each_task(tokenizer):
    """A single mean hid that arithmetic got better."""

    class Never(WordTask):
        def evaluate(self, conversation, completion):
            return False

    rollouts = rollouts_of(tokenizer, task=TaskMixture([WordTask(6), Never(6)]), examples_per_step=3)
    records = [record for record in run_steps(rollouts, 4)[1].records if "reward" in record]
    for step, record in enumerate(records):
        tasks = [sample.task for sample in rollouts.sample(step, 3 * step, RUNTIME)]
        assert set(record["rewards"]) == set(tasks)
        of_words = record["rewards"].get("WordTask", 0.0)
        assert record["reward"] == pytest.approx(of_words * tasks.count("WordTask") / 12)
    assert {task for record in records for task in record["rewards"]} == {"WordTask", "Never"}
    assert any(record["reward"] for record in records)


def test_checkpoint_first_evaluation_after(tokenizer):
    """An evaluation that failed used to lose the run."""
    events = []
    run_steps(
        rollouts_of(tokenizer, examples_per_step=1),
        3,
        cadence=Cadence(eval_every=2, save_every=2),
        save=lambda run: events.append(("save", run.progress.step)),
        evaluate=lambda: events.append("evaluate") or {"accuracy": 0.0, "standard_error": 0.0},
        sample=lambda: events.append("sample"),
    )
    assert events == ["evaluate", ("save", 2), "evaluate", ("save", 3), "evaluate", "sample"]


def test_a_step_is_as_large_as_its_contrast(tokenizer):
    """One question of which anything could be learned moved the weights as far as a step full of them."""

    class Lenient(WordTask):
        def evaluate(self, conversation, completion):
            return conversation["messages"][0]["content"] > "3" or super().evaluate(conversation, completion)

    moves, records = [], []
    for scaled in (False, True):
        rollouts = rollouts_of(tokenizer, task=Lenient(), examples_per_step=8)
        model = rollouts.engine.model
        before = [p.clone() for p in model.parameters()]
        _, run = run_steps(rollouts, 1, peak=0.5, scaled=scaled)
        moves.append([p - old for p, old in zip(model.parameters(), before, strict=True)])
        records.append(next(r for r in run.records if "reward" in r))
    contrast = records[0]["contrast"]
    assert 0 < contrast < 0.6
    assert [r["lr_multiplier"] for r in records] == [0.5, 0.5 * contrast]
    for full, scaled in zip(*moves, strict=True):
        torch.testing.assert_close(scaled, contrast * full, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_teaches_nothing_changes_nothing(scaled, tokenizer):
    """Not even by the momentum of the step before."""

    class Fickle(WordTask):
        is_pleased = False

        def evaluate(self, conversation, completion):
            return self.is_pleased or super().evaluate(conversation, completion)

    rollouts = rollouts_of(tokenizer, task=Fickle())
    model, records, after_first = rollouts.engine.model, [], []

    def log(record):
        if "reward" not in record:
            return
        records.append(record)
        if not rollouts.task.is_pleased:
            rollouts.task.is_pleased = True
            after_first.extend(p.clone() for p in model.parameters())

    _, run = run_steps(rollouts, 3, peak=1.0, scaled=scaled, log=log)
    assert records[0]["grad_norm"] > 0
    assert all(map(torch.equal, after_first, model.parameters()))
    nothing = [(r["reward"], r["contrast"], r["loss"], r["grad_norm"]) for r in records[1:]]
    assert nothing == [(1.0, 0, 0, 0)] * 2
    assert {stack.n_steps for stack in run.optimizer.stacks} == {1}
    assert run.progress.step == 3


def test_not_a_number_stops_before_the_update(tokenizer):
    class Infinite(WordTask):
        def reward(self, conversation, completion):
            return math.inf if self.evaluate(conversation, completion) else 0.0

    rollouts = replace(rollouts_of(tokenizer, examples_per_step=4), task=Infinite())
    before = [p.clone() for p in rollouts.engine.model.parameters()]
    with pytest.raises(FloatingPointError, match="stopped before the update"):
        run_steps(rollouts, 3)
    assert all(map(torch.equal, before, rollouts.engine.model.parameters()))


def test_sigterm_saves_and_stops(tokenizer):
    saved = []
    is_finished, _ = run_steps(
        rollouts_of(tokenizer, examples_per_step=1),
        9,
        cadence=Cadence(eval_every=0),
        save=lambda run: saved.append(run.progress.step),
        log=lambda record: record["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM),
    )
    assert not is_finished
    assert saved == [4]
