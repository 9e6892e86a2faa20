"""A small run for tests of what every stage does with one."""

from dataclasses import dataclass, field

from nanochat.common import Runtime
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import Cadence, OptimizerConfig, Plan
from nanochat.train.run import Run
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings that a run reads."""

    run: str = "dummy"
    cadence: Cadence = field(default_factory=Cadence)
    resume: bool = False
    overwrite: bool = False


def open_run(model=None, optimizer=None, runtime=None, tokenizer=None, **settings):
    """Open the run "small" of stage base."""
    model = model or random_model(small_config())
    optimizer = optimizer or build_optimizer(model, OptimizerConfig())
    tokenizer, runtime = tokenizer or train_tokenizer(), runtime or Runtime.cpu()
    return Run.open("base", "small", model, tokenizer, optimizer, runtime, RunConfig(**settings))


def a_plan(num_steps, **changes):
    shape = {"accumulation": 1, "tokens_per_step": 1, "lr_multiplier": lambda progress: 1.0}
    return Plan(num_steps=num_steps, **{**shape, "momentum": OptimizerConfig().momentum_at, **changes})
