"""The order of events between the steps of a run."""

import logging
import os
import signal

import pytest

from nanochat.common import Runtime
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import Cadence, OptimizerConfig
from nanochat.train.progress import Progress
from nanochat.train.run import DryRun
from nanochat.train.steps import (
    Stop,
    check_finite,
    finish_step,
    is_due,
    set_schedule,
    steps,
    stop_on_sigterm,
)
from tests.helpers.models import random_model, small_config
from tests.helpers.runs import RunConfig, a_plan


@pytest.fixture(scope="module")
def parts():
    model = random_model(small_config())
    return {"model": model, "optimizer": build_optimizer(model, OptimizerConfig()), "runtime": Runtime.cpu()}


def events_of(parts, start, num_steps, stop_after=None, **cadence):
    """Do steps from `start` on and return the events in order."""
    events = []

    class RecordedRun(DryRun):
        def save(self):
            events.append(f"save {self.progress.step}")

    config = RunConfig(cadence=Cadence(**{"log_every": 0, **cadence}))
    run, stop = RecordedRun(**parts, config=config, progress=Progress(step=start)), Stop()

    def note(event):
        return lambda: events.append(f"{event} {run.progress.step}")

    extras = [(2, note("extra"))]
    hooks = {"evaluate": note("evaluate"), "sample": note("sample")}
    for step in steps(run, a_plan(num_steps), stop, extras=extras, **hooks):
        events.append(f"step {step}")
        finish_step(run, a_plan(num_steps), {"step": step, "seconds": 1.0}, lambda *_: "")
        stop.anywhere = step == stop_after
    return events


def test_checkpoint_then_evaluation_then_sample_then_extras(parts):
    found = events_of(parts, 0, 5, eval_every=2, sample_every=4, save_every=2)
    assert found == [
        *("evaluate 0", "step 0", "step 1", "save 2", "evaluate 2", "extra 2", "step 2", "step 3"),
        *("save 4", "evaluate 4", "sample 4", "extra 4", "step 4", "save 5", "evaluate 5", "sample 5"),
    ]


def test_without_a_cadence_all_happens_at_the_end(parts):
    found = events_of(parts, 0, 1, eval_every=0, sample_every=0, save_every=0)
    assert found == ["evaluate 0", "step 0", "save 1", "evaluate 1", "sample 1"]


def test_a_resumed_run_does_not_save_again_where_it_starts(parts):
    found = events_of(parts, 2, 3, eval_every=0, sample_every=0, save_every=2)
    assert found == ["extra 2", "step 2", "save 3", "evaluate 3", "sample 3"]
    assert events_of(parts, 3, 3) == ["evaluate 3", "sample 3"]


def test_a_stop_saves_and_does_nothing_else(parts, caplog):
    with caplog.at_level(logging.INFO):
        found = events_of(parts, 0, 9, stop_after=2, eval_every=3, sample_every=3, save_every=0)
    assert found[-2:] == ["step 2", "save 3"]
    assert "SIGTERM: saved step 3, stopping" in caplog.text
    last = events_of(parts, 0, 3, stop_after=2, eval_every=0, sample_every=0, save_every=0)
    assert last[-3:] == ["save 3", "evaluate 3", "sample 3"]  # it was the last step: the run is complete


def test_sigterm_is_noted_and_the_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.here
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.here, stop.anywhere) == (True, False)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_step_is_counted_logged_and_printed(parts, caplog):
    run = DryRun(
        **parts, config=RunConfig(cadence=Cadence(log_every=2)), progress=Progress(train_seconds=5.0)
    )
    with caplog.at_level(logging.INFO):
        for step in range(3):
            record = {"step": step, "seconds": 2.0}
            finish_step(run, a_plan(3), record, lambda run, plan, record: f"record of {record['step']}")
    assert run.records == [{"step": i, "seconds": 2.0, "train_seconds": 7.0 + 2 * i} for i in range(3)]
    assert [r.message for r in caplog.records] == [
        "step 00002/3 (67 %) | record of 1",
        "step 00003/3 (100 %) | record of 2",
    ]


def test_rates_and_momentum_of_a_step(parts):
    optimizer, plan = parts["optimizer"], a_plan(8, lr_multiplier=lambda progress: 1 - progress)
    assert set_schedule(optimizer, plan, 2) == 0.75
    for group in optimizer.param_groups:
        assert group["lr"] == 0.75 * group["initial_lr"]
        if group["kind"] == "muon":
            assert group["momentum"] == pytest.approx(0.85 + 0.1 * 2 / 300)
    assert set_schedule(optimizer, plan, 2, 0.5) == 0.375
    assert all(group["lr"] == 0.375 * group["initial_lr"] for group in optimizer.param_groups)


def test_momentum_and_weight_decay_of_the_second_generation():
    settings = OptimizerConfig(momentum=0.9, momentum_warmup=10, weight_decay=0.2)
    optimizer = build_optimizer(random_model(small_config()), settings)
    plan = a_plan(8, momentum=settings.momentum_at)
    for step, momentum, decay in ((0, 0.85, 0.2), (6, 0.88, 0.05)):
        set_schedule(optimizer, plan, step)
        found = {(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups if g["kind"] == "muon"}
        assert [*found] == [pytest.approx((momentum, decay))]


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_loss_or_norm_that_is_not_finite_is_an_error(loss, norm):
    check_finite(3, 1.0, 1.0, 0.5)
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*, rates x 0.500; stopped before"):
        check_finite(3, loss, norm, 0.5)


def test_due():
    assert [is_due(step, 3) for step in range(5)] == [True, False, False, True, False]
    assert not any(is_due(step, 0) for step in range(5))
