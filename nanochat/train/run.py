"""A training run as one object: how it starts or resumes, saves, logs and reports.

    run = Run.open("base", tag, model, tokenizer, optimizer, runtime, config)
    run.begin(plan)
    is_finished = train(run, batches, plan, ...)
    run.close()

A resumed run continues exactly: weights, optimizer, position in the data and moving average come back, and
there is no random state to restore, since training itself draws no random numbers. The loader's position is
kept by stream and the optimizer's state by tensor or row, neither by rank, so a run may resume with another
number of ranks.
"""

from __future__ import annotations

import logging
from dataclasses import Field, asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from nanochat.checkpoint_manager import (
    REPORTS,
    DamagedError,
    check_bytes,
    checkpoint_dir,
    complete_steps,
    delete_checkpoint,
    load_for,
    load_optimizer_shards,
    load_tensors,
    load_tokenizer,
    load_weights,
    model_config,
    model_path,
    read_meta,
    remove_partial_files,
    resolve_tag,
    save_checkpoint,
    tokenizer_dir,
)
from nanochat.common import Runtime, write_report
from nanochat.gpt import GPT
from nanochat.metrics import MetricsLog, read_metrics
from nanochat.optim.muon_adamw import MuonAdamW, build_optimizer
from nanochat.optim.schedule import Cadence, OptimizerConfig, Plan
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.progress import Progress

logger = logging.getLogger(__name__)


class RunConfig(Protocol):
    """The settings that every run reads; a stage's config is a dataclass that has them and others."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def run(self) -> str: ...  # name of the wandb run
    @property
    def cadence(self) -> Cadence: ...
    @property
    def resume(self) -> bool: ...
    @property
    def overwrite(self) -> bool: ...


class WarmStartConfig(RunConfig, Protocol):
    """The same, and the settings of a run that starts from the model of another stage."""

    @property
    def data(self) -> str: ...
    @property
    def recipe(self) -> str: ...
    @property
    def model_tag(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def warm_start(self) -> bool: ...
    @property
    def dry_run(self) -> bool: ...


Config = TypeVar("Config", bound=RunConfig)
StartConfig = TypeVar("StartConfig", bound=WarmStartConfig)
OwnConfig = TypeVar(
    "OwnConfig", bound=RunConfig, covariant=True
)  # Run[MidTrainConfig] is a Run[ChatTrainConfig]


@dataclass(kw_only=True)
class Run(Generic[OwnConfig]):
    """All that a training loop, its checkpoints and its report need of a run."""

    stage: str  # base, mid, sft or rl
    directory: Path  # of the checkpoints and metrics.jsonl
    model: GPT
    tokenizer: RustBPETokenizer
    optimizer: MuonAdamW
    runtime: Runtime
    config: OwnConfig
    progress: Progress = field(default_factory=Progress)
    metrics: MetricsLog = field(init=False, repr=False)  # open from `begin` to `close`

    @classmethod
    def open(
        cls,
        stage: str,
        model_tag: str,
        model: GPT,
        tokenizer: RustBPETokenizer,
        optimizer: MuonAdamW,
        runtime: Runtime,
        config: Config,
    ) -> Run[Config]:
        """Start a run, or load model and optimizer from its newest intact checkpoint if config.resume is set.

        With config.overwrite nothing is deleted yet: `begin` does that, once everything else has worked.
        Raises ValueError when there are checkpoints and neither is set, or when they do not fit the model or
        were made with another tokenizer.
        """
        kind = cast("type[Run[Config]]", cls)  # OwnConfig is that of a run, and there is none yet
        run = kind(
            stage=stage,
            directory=checkpoint_dir(stage, model_tag),
            model=model,
            tokenizer=tokenizer,
            optimizer=optimizer,
            runtime=runtime,
            config=config,
        )
        steps = run._saved_steps()
        if steps and not config.overwrite:
            run._resume(steps)
        return run

    @staticmethod
    def open_from(source: str, stage: str, config: StartConfig, runtime: Runtime) -> Run[StartConfig]:
        """Open a run of `stage` that starts from a model of stage `source`, under that model's tag.

        With config.dry_run it writes nothing, and checkpoints that `stage` has do not matter.
        """
        tag = resolve_tag(source, config.model_tag)
        model, tokenizer, meta = load_for(runtime, source, "train", tag, config.step)
        optimizer = build_optimizer(model, config.optimizer, runtime)
        if config.warm_start:
            warm_start(checkpoint_dir(source, tag), meta["step"], optimizer, runtime)
        kind = DryRun if config.dry_run else Run
        return kind.open(stage, tag, model, tokenizer, optimizer, runtime, config)

    def _saved_steps(self) -> list[int]:
        steps = complete_steps(self.directory)
        if any(found != steps for found in self.runtime.gather(steps)):
            raise ValueError(
                f"the ranks do not all see the same checkpoints in {self.directory}: "
                "put NANOCHAT_BASE_DIR on a disk that all nodes share"
            )
        if self.runtime.is_main:
            remove_partial_files(self.directory)
        return steps

    def _resume(self, steps: list[int]) -> None:
        if not self.config.resume:
            raise ValueError(
                f"{self.directory} has checkpoints up to step {steps[-1]}: continue with --resume, "
                "start over with --overwrite, or choose another --model-tag"
            )
        if not load_tokenizer(self.directory).is_same_as(self.tokenizer):
            raise ValueError(
                f"{self.directory} was started with another tokenizer than the present one: start over with "
                "--overwrite, or choose another --model-tag"
            )
        for step in reversed(steps):
            try:
                with self.runtime.together():
                    self._load(step)
            except (DamagedError, FileNotFoundError) as error:
                logger.warning(f"warning: {error}; trying the checkpoint before")
            else:
                logger.info(f"resuming from step {step} of {self.directory}")
                return
        raise ValueError(f"no checkpoint in {self.directory} can be read: start over with --overwrite")

    def _load(self, step: int) -> None:
        check_bytes(self.directory, step, self.runtime)
        meta = read_meta(self.directory, step)
        if model_config(meta) != self.model.config:
            raise ValueError(
                f"{self.directory} holds {model_config(meta)}, these settings make {self.model.config}: "
                "give the settings that it was started with, or another --model-tag"
            )
        load_weights(self.model, load_tensors(model_path(self.directory, step), self.model.device))
        self.optimizer.load_shards(load_optimizer_shards(self.directory, step))
        self.progress = Progress.from_dict(meta["progress"])

    def begin(self, plan: Plan) -> None:
        """Open the metrics, and if the run is at step 0 delete the checkpoints in its directory.

        To be called when everything is ready to train, so that a run that cannot start deletes nothing.
        Raises ValueError if the run is beyond the end of its plan, where learning rates would be negative.
        """
        if self.progress.step > plan.num_steps:
            raise ValueError(
                f"{self.directory} has a checkpoint of step {self.progress.step}, but these settings end at "
                f"step {plan.num_steps}: resume for as many steps at least, or start over with --overwrite"
            )
        with self.runtime.together():
            self.metrics = MetricsLog(
                self.directory / "metrics.jsonl",
                self.runtime,
                resume_step=self.progress.step,
                wandb_run=self.config.run,
                config=asdict(self.config),
            )
            if self.runtime.is_main and self.progress.step == 0:
                for step in complete_steps(self.directory):
                    delete_checkpoint(self.directory, step)
                self.tokenizer.save(tokenizer_dir(self.directory))

    def save(self) -> None:
        """Write a checkpoint that `open` can resume from. Every rank must call this."""
        meta = {"user_config": asdict(self.config), "progress": self.progress.to_dict(self.runtime)}
        keep_last, step = self.config.cadence.keep_last, self.progress.step
        state = self.optimizer.state_dict()
        save_checkpoint(self.directory, step, self.model, state, meta, keep_last, self.runtime)
        logger.info(f"step {step:05d} | saved to {self.directory}")

    def log(self, record: dict[str, Any]) -> None:
        """Write a record, which must have a `step`, to metrics.jsonl and wandb."""
        self.metrics(record)

    def logged(self) -> list[dict[str, Any]]:
        """Return the records of all steps, however often the run was resumed."""
        return read_metrics(self.directory / "metrics.jsonl")

    def close(self) -> None:
        """Close the metrics."""
        self.metrics.close()

    def report(self, figures: dict[str, Any]) -> None:
        """Write report/<stage>.json: the settings, `figures`, and the path of the metrics."""
        metrics = str(self.directory / "metrics.jsonl")
        result = {"settings": asdict(self.config), **figures, "metrics": metrics}
        write_report(REPORTS[self.stage], result, self.progress.earlier_seconds)


@dataclass(kw_only=True)
class DryRun(Run[OwnConfig]):
    """A run that writes nothing and keeps its records, for trials and benchmarks."""

    stage: str = "base"
    directory: Path = Path()
    tokenizer: RustBPETokenizer = field(default=cast("Any", None), repr=False)  # none in benchmarks
    records: list[dict[str, Any]] = field(default_factory=list)

    def _saved_steps(self) -> list[int]:
        """Return none: existing checkpoints do not matter."""
        return []

    def begin(self, plan: Plan) -> None:
        """Do nothing."""

    def save(self) -> None:
        """Do nothing."""

    def log(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        self.records.append(record)

    def logged(self) -> list[dict[str, Any]]:
        """Return the records."""
        return self.records

    def close(self) -> None:
        """Do nothing."""

    def report(self, figures: dict[str, Any]) -> None:
        """Do nothing."""


def warm_start(directory: Path, step: int, optimizer: MuonAdamW, runtime: Runtime) -> None:
    """Load the optimizer state of another stage's checkpoint, if it was saved."""
    try:
        with runtime.together():
            optimizer.load_shards(load_optimizer_shards(directory, step))
    except FileNotFoundError:
        logger.info(f"no optimizer state beside step {step} in {directory}: its momentum starts at zero")
