"""Recipes: under one name, what a generation of the model is made of, how it is pretrained, and on what text.

    saint_iberis      the published models; FineWeb-EDU
    saint_iberis_2    residual convolutions, value embeddings, the embedding mixed into the residual stream;
                      NorMuon, cautious weight decay, higher rates and a long warmdown (dev/LOG.md); ClimbMix

A recipe's values are the defaults of the trainer's command line, and its text is that of --data=hub
(nanochat/dataset.py); explicit flags override them. Checkpoints name their recipe and their text. The stages
after pretraining take the constants of the optimizer from the recipe too, with a momentum of Muon that is
constant in saint_iberis, as published, and rises again in saint_iberis_2. Midtraining and finetuning start
with fresh optimizer state in saint_iberis, and with that of the stage before in saint_iberis_2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanochat.dataset import CLIMBMIX, FINEWEB, HubText, find_hub_text, source
from nanochat.optim.schedule import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """What a recipe decides, as settings of pretraining; the defaults are those of the published models."""

    residual_conv: int = 0
    """taps of the convolutions added to keys and output of attention and to the MLP's output; 0: none"""
    value_embeds: bool | None = None
    """tables of values by token in attention layers; None: as the recipe, but not for text that repeats"""
    x0_mix: bool = False
    """scale the residual stream before each layer, and add the embedding to it"""
    score_scale: float = 1.0
    """factor on attention's scores"""
    total_batch_size: int = 524_288
    """tokens of one optimizer step, over all devices"""
    warmup_ratio: float = 0.0
    """first share of training, over which the learning rates rise"""
    warmdown_ratio: float = 0.2
    """last share of training, over which the learning rates fall"""
    final_lr_frac: float = 0.0
    """what they fall to, as a share of the peak"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if not 0 < self.warmdown_ratio <= 1:
            raise ValueError(f"warmdown_ratio={self.warmdown_ratio} must be in (0, 1]")
        if not 0 <= self.warmup_ratio <= 1 - self.warmdown_ratio:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} must be 0 or more, and with "
                f"warmdown_ratio={self.warmdown_ratio} at most 1"
            )
        if not 0 <= self.final_lr_frac <= 1:
            raise ValueError(f"final_lr_frac={self.final_lr_frac} must be in [0, 1]")

    @property
    def model_fields(self) -> dict[str, Any]:
        """The settings that are fields of GPTConfig, under their names."""
        names = ("residual_conv", "value_embeds", "x0_mix", "score_scale")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings and a data set of the hub under a name."""

    name: str
    text: HubText
    settings: RecipeSettings
    chat_momentum_warmup: int  # of the stages after pretraining
    warm_start: bool  # midtraining and finetuning start with the optimizer state of the stage before

    @property
    def chat_optimizer(self) -> OptimizerConfig:
        """The constants of the optimizer in the stages after pretraining."""
        return replace(self.settings.optimizer, momentum_warmup=self.chat_momentum_warmup)


SAINT_IBERIS = Recipe(
    name="saint_iberis",
    text=FINEWEB,
    settings=RecipeSettings(value_embeds=False),
    chat_momentum_warmup=0,
    warm_start=False,
)
SAINT_IBERIS_2 = Recipe(
    name="saint_iberis_2",
    text=CLIMBMIX,
    settings=RecipeSettings(
        residual_conv=3,
        value_embeds=True,
        x0_mix=True,
        score_scale=1.44,
        # 65,536 was the best for 36 M tokens with a d12; what is best at full length has not been measured
        total_batch_size=524_288,
        warmdown_ratio=0.65,
        final_lr_frac=0.05,
        optimizer=OptimizerConfig(
            embedding_lr=0.4,
            unembedding_lr=0.012,
            table_beta2=0.99,
            matrix_lr=0.04,
            momentum=0.90,
            normuon=True,
            weight_decay=0.1,
        ),
    ),
    chat_momentum_warmup=300,
    warm_start=True,
)
RECIPES = (SAINT_IBERIS, SAINT_IBERIS_2)


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name; ValueError for an unknown one."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise ValueError(f"recipe={name!r} is none of {', '.join(recipe.name for recipe in RECIPES)}")


def trained_recipe(saved: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint with these settings; published ones have none, and saint_iberis."""
    return find_recipe(saved.get("recipe") or SAINT_IBERIS.name)


def trained_text(saved: Mapping[str, Any]) -> HubText:
    """Return the hub's data set for a checkpoint with these settings: the one they name, or its recipe's."""
    data = str(saved.get("data"))
    return find_hub_text(data) if data.startswith("hub:") else trained_recipe(saved).text


def chat_data(data: str, saved: Mapping[str, Any]) -> str:
    """Return the source of conversations for a model of a checkpoint with these settings: data, but for auto.

    auto is the source of the model's last training, hub or embedded, and hub for a published model, which
    says none. Otherwise (own text) it is hub if the hub's text has been downloaded, else embedded.
    """
    if data == "auto":
        trained = str(saved.get("data") or "hub")
        data = trained if trained == "embedded" or trained.startswith("hub") else "auto"
    return source(data, trained_text(saved))


def asked_recipe(arguments: Sequence[str]) -> str:
    """Return the last value of --recipe among arguments, by default the name of the published recipe."""
    name = SAINT_IBERIS.name
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--recipe":
            name = value if equals else "".join(arguments[i + 1 : i + 2])
    return name
