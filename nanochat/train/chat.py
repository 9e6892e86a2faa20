"""The settings that midtraining and supervised finetuning share.

Both start from the newest checkpoint of another stage, with its optimizer's state if the recipe says so
(nanochat/recipes.py), and end when every conversation has been seen `num_epochs` times;
nanochat/train/chat_data.py lays the conversations out. The stages differ in tasks, in whether rows are
packed, in the rows of a step and in the learning rates. All stages after pretraining take the optimizer's
constants from the recipe of their model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from nanochat.common import DType, parse, require_at_least, require_counts
from nanochat.decode import DecoderKind
from nanochat.optim.schedule import Cadence, OptimizerConfig
from nanochat.recipes import SAINT_IBERIS, chat_data, find_recipe, trained_recipe

if TYPE_CHECKING:
    from nanochat.train.run import WarmStartConfig


@dataclass(frozen=True, kw_only=True)
class ChatTrainConfig:
    """Settings that midtraining and SFT have in common."""

    run: str = "dummy"
    """name of the wandb run; "dummy" keeps the numbers in metrics.jsonl alone"""
    data: str = "auto"
    """conversations: auto (those of the model's last training; hub for a published model), hub, embedded, or
    your own: a .jsonl file, a folder or a glob"""
    add: str = ""
    """conversations of your own to learn beside those of `data`: a .jsonl file, a folder or a glob"""
    device_type: str = ""
    """cuda, mps or cpu; empty finds the best there is"""
    dtype: DType = "auto"
    """of activations: float32 or bfloat16; auto: bfloat16 on CUDA cards that have it, else float32"""
    compile: bool | None = None
    """compile the blocks with torch.compile; None: on CUDA only"""
    fused: bool | None = None
    """train by the kernels of nanochat/kernels; None: where they run, with bfloat16 on NVIDIA cards"""
    decoder: DecoderKind = "best"
    """of samples; best: CUDA graphs and kernels where model and GPU allow them; plain: PyTorch alone"""
    model_tag: str = ""
    """name of the checkpoint folder to start from and to write to; empty: the deepest dN there is"""
    step: int = -1
    """which checkpoint to start from; -1: the newest"""
    max_seq_len: int = -1
    """tokens of a row; -1: the model's context"""
    num_epochs: int = 1
    """passes over the conversations"""
    num_iterations: int = -1
    """optimizer steps; -1: as many as num_epochs take"""
    warm_start: bool = SAINT_IBERIS.warm_start
    """start with the optimizer state of the stage before, if it was saved"""
    init_lr_frac: float = 1.0
    """factor on all learning rates"""
    warmdown_ratio: float = 0.2
    """last share of training, over which the learning rates fall to 0"""
    recipe: str = ""
    """recipe that the optimizer's defaults are from; empty: that of the model to start from"""
    optimizer: OptimizerConfig = SAINT_IBERIS.chat_optimizer
    cadence: Cadence = field(default_factory=Cadence)
    val_conversations: int = 5000
    """validation conversations, at most all"""
    resume: bool = False
    """continue from the newest checkpoint of this stage, if any"""
    overwrite: bool = False
    """delete the checkpoints that this stage has under this model tag and start over"""
    dry_run: bool = False
    """train, but write no checkpoint, metrics or report"""

    def __post_init__(self) -> None:
        require_at_least(self, num_epochs=1, val_conversations=1)
        require_counts(self, "num_iterations", "max_seq_len")
        if not 0 < self.init_lr_frac < math.inf:
            raise ValueError(f"init_lr_frac={self.init_lr_frac} must be above 0 and finite")
        if not 0 < self.warmdown_ratio <= 1:
            raise ValueError(f"warmdown_ratio={self.warmdown_ratio} must be in (0, 1]")
        check_start(self)

    @property
    def device_batch_size(self) -> int:
        """Return the rows of one forward on one device; 0: as many as its memory holds."""
        raise NotImplementedError

    def rows_per_step(self, seq_len: int) -> int:
        """Return the rows of an optimizer step, over all devices, if each has seq_len tokens."""
        raise NotImplementedError

    def rows_per_validation(self, seq_len: int) -> int | None:
        """Return the most rows of a validation, of seq_len tokens each; None: all of val_conversations."""
        return None


StartConfig = TypeVar("StartConfig", bound="WarmStartConfig")


def check_start(config: WarmStartConfig) -> None:
    """Raise ValueError if the settings of how a run starts, and of what it writes, exclude each other."""
    if config.resume and config.overwrite:
        raise ValueError("resume and overwrite exclude each other")
    if config.dry_run and (config.resume or config.overwrite or config.run != "dummy"):
        raise ValueError("dry_run writes nothing: leave out resume, overwrite and run, or dry_run")


def follow_recipe(config: StartConfig, source: str, argv: Sequence[str] | None) -> StartConfig:
    """Parse argv again, with the optimizer's defaults by the recipe of the model that the run starts from.

    source is the stage of that model; config.recipe, if not empty, is the recipe to follow instead. Models of
    before recipes, and published ones, follow saint_iberis. For data see chat_data.
    """
    from nanochat.checkpoint_manager import read_settings

    saved = read_settings(source, config.model_tag, config.step)
    recipe = find_recipe(config.recipe) if config.recipe else trained_recipe(saved)
    default = replace(type(config)(), recipe=recipe.name, optimizer=recipe.chat_optimizer)
    if isinstance(default, ChatTrainConfig):  # reinforcement learning never starts warm by itself
        default = replace(default, warm_start=recipe.warm_start)
    config = parse(type(config), argv, None, default)
    return replace(config, data=chat_data(config.data, saved))
