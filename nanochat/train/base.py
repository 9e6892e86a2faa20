"""Pretraining's settings, and the model and plan that follow from them.

Nothing here imports torch before a function is called, so that --help answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from nanochat.common import DType, Runtime, require_at_least, require_counts
from nanochat.config import GPTConfig
from nanochat.dataset import source
from nanochat.optim.schedule import Cadence, Plan, lr_multiplier, require_interval
from nanochat.recipes import SAINT_IBERIS, RecipeSettings, asked_recipe, find_recipe

if TYPE_CHECKING:
    from nanochat.core_bundle import Bundle
    from nanochat.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class BaseTrainConfig(RecipeSettings):
    """Settings of pretraining."""

    recipe: str = SAINT_IBERIS.name
    """saint_iberis (published) or saint_iberis_2 (second generation): defaults of what belongs to it"""
    run: str = "dummy"
    """name of the wandb run; "dummy" keeps the numbers in metrics.jsonl alone"""
    data: str = "auto"
    """source of text: auto, hub (the recipe's; or hub:fineweb, hub:climbmix), embedded, or a path of parquet,
    jsonl or txt files"""
    device_type: str = ""
    """cuda, mps or cpu; empty finds the best there is"""
    dtype: DType = "auto"
    """of activations: float32 or bfloat16; auto: bfloat16 on CUDA cards that have it, else float32"""
    compile: bool | None = None
    """compile the blocks with torch.compile; None: on CUDA only"""
    fused: bool | None = None
    """train by the kernels of nanochat/kernels; None: where they run, with bfloat16 on NVIDIA cards"""
    fp8: bool = False
    """products in 8 bits where they pay; faster, and a little less exact (dev/LOG.md)"""
    seed: int = 42
    """of the initial weights, and of the order that row groups of text come in"""

    depth: int = 20
    """number of layers; the width is 64 times that"""
    max_seq_len: int = 2048
    """tokens of context"""
    slc_rate: int = 3
    """layer i is attention if i % slc_rate == 1 or it is the last, else SLC2; 0: all are attention"""

    num_iterations: int = -1
    """optimizer steps; -1 derives them from target_flops or target_param_data_ratio"""
    target_flops: float = -1.0
    """total training FLOPs; -1 derives the steps from target_param_data_ratio"""
    target_param_data_ratio: float = 20.0
    """training tokens a parameter"""
    device_batch_size: int = 0
    """sequences of one forward on one device; 0: as many as its memory holds, at most 32"""

    eval_tokens: int = 20 * 524_288
    """tokens of a validation, at most once through the validation shard"""
    cadence: Cadence = field(default_factory=Cadence)
    core_every: Annotated[int, tyro.conf.arg(aliases=["--core-metric-every"])] = 2000
    """steps between evaluations of CORE on the way, where its bundle is there; 0 or -1: none"""
    core_max_per_task: Annotated[int, tyro.conf.arg(aliases=["--core-metric-max-per-task"])] = 500
    """examples of each of its tasks; -1: all"""
    core_bundle: str = ""
    """folder of the CORE bundle; empty: eval_bundle in the base directory, if it is there"""
    model_tag: str = ""
    """name of the checkpoint folder; empty: d<depth>"""
    resume: bool = False
    """continue from the newest checkpoint, if any"""
    overwrite: bool = False
    """delete the checkpoints that this model tag has and start over"""

    def __post_init__(self) -> None:
        super().__post_init__()
        find_recipe(self.recipe)
        require_at_least(self, depth=1, max_seq_len=1, device_batch_size=0, total_batch_size=1, eval_tokens=1)
        require_counts(self, "core_max_per_task")
        require_interval("core_every", self.core_every)
        if self.core_bundle and self.core_every < 1:
            raise ValueError(f"core_bundle={self.core_bundle} needs core_every above 0; leave one out")
        for name in ("num_iterations", "target_flops"):
            if not getattr(self, name) > 0 and getattr(self, name) != -1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, or -1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")


Config = TypeVar("Config", bound=BaseTrainConfig)


def with_recipe(config_class: type[Config], argv: Sequence[str] | None) -> Config:
    """Return the default settings by the recipe that the arguments name (argv None: sys.argv[1:])."""
    recipe = find_recipe(asked_recipe(sys.argv[1:] if argv is None else argv))
    settings = {**vars(recipe.settings), "value_embeds": None}  # depends on the text, too
    return config_class(recipe=recipe.name, **settings)


def with_text(config: Config) -> Config:
    """Return the config with hub and auto in data replaced by the name of the text, for all that is saved."""
    return replace(config, data=source(config.data, find_recipe(config.recipe).text))


def read_bundle(config: BaseTrainConfig, plan: Plan) -> Bundle | None:
    """Read the CORE bundle: that of the settings, or the default one if it exists and will be used."""
    from nanochat.core_bundle import bundle_folder, load_bundle

    folder = bundle_folder(config.core_bundle)
    is_needed = 0 < config.core_every < plan.num_steps
    return load_bundle(folder) if config.core_bundle or (is_needed and folder.exists()) else None


def model_shape(config: BaseTrainConfig, vocab_size: int) -> GPTConfig:
    """Return the shape of the model; value_embeds, if left open, is the recipe's choice."""
    shape = {"vocab_size": vocab_size, "sequence_len": config.max_seq_len, "slc_rate": config.slc_rate}
    parts = config.model_fields
    if config.value_embeds is None:
        parts["value_embeds"] = find_recipe(config.recipe).settings.value_embeds
    return GPTConfig.from_depth(config.depth, **shape, **parts)


def build_model(config: BaseTrainConfig, vocab_size: int, runtime: Runtime) -> GPT:
    """Make the model of these settings, with its initial weights."""
    import torch

    from nanochat.gpt import GPT

    torch.manual_seed(config.seed)
    with runtime.device:
        model = GPT(model_shape(config, vocab_size), runtime.compute_dtype)
    model.init_weights()
    return model


def with_rows(config: Config, model: GPT, runtime: Runtime) -> Config:
    """Return the config with device_batch_size chosen by memory, if it was left open."""
    from nanochat.train.memory import choose_rows

    rows_per_step = config.total_batch_size // config.max_seq_len
    rows = choose_rows(config.device_batch_size, model, rows_per_step, runtime, fused=config.fused)
    return replace(config, device_batch_size=rows)


def make_plan(config: BaseTrainConfig, model: GPT, runtime: Runtime) -> Plan:
    """Derive accumulation and steps from the settings; ValueError if the batch does not divide."""
    micro_batch = config.device_batch_size * config.max_seq_len * runtime.world_size
    total = config.total_batch_size
    if total % micro_batch:
        raise ValueError(
            f"total_batch_size={total} must be a multiple of device_batch_size x max_seq_len x ranks = "
            f"{config.device_batch_size} x {config.max_seq_len} x {runtime.world_size} = {micro_batch}; "
            f"try {max(1, total // micro_batch) * micro_batch}"
        )
    num_steps = count_steps(config, model)
    warmup = {"warmup": round(config.warmup_ratio * num_steps) / num_steps, "step": 1 / num_steps}
    fall = {"warmdown": config.warmdown_ratio, "final": config.final_lr_frac}
    return Plan(
        num_steps=num_steps,
        accumulation=total // micro_batch,
        tokens_per_step=total,
        lr_multiplier=partial(lr_multiplier, **warmup, **fall),
        momentum=config.optimizer.momentum_at,
    )


def count_steps(config: BaseTrainConfig, model: GPT) -> int:
    """Derive the number of steps; ValueError if it is 0."""
    total = config.total_batch_size
    if config.num_iterations > 0:
        num_steps = config.num_iterations
    elif config.target_flops > 0:
        num_steps = round(config.target_flops / (model.flops_per_token() * total))
    else:
        num_steps = round(config.target_param_data_ratio * model.num_scaling_parameters() / total)
    if num_steps < 1:
        raise ValueError(
            "these settings make a run of 0 steps: raise num_iterations, target_flops or the ratio"
        )
    return num_steps
