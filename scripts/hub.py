"""Pull a model from the Hugging Face hub, or push one.

    python -m scripts.hub pull RikkaBotan/nanochat_d20_saint_iberis
    python -m scripts.chat_cli -g nanochat_d20_saint_iberis
    python -m scripts.hub push me/my-d12 -g d12 --dry-run      # writes the card, lists the files
    HF_TOKEN=... python -m scripts.hub push me/my-d12 -g d12

A pulled model is checked and keeps its own tokenizer; it replaces another one only with --overwrite. A pull
that broke resumes. HF_ENDPOINT is honoured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.common import atomic_write, parse, run

Stage = Annotated[Literal["sft", "rl", "mid", "base"], tyro.conf.arg(aliases=["-i"])]
ModelTag = Annotated[str, tyro.conf.arg(aliases=["-g", "--tag"])]
Step = Annotated[int, tyro.conf.arg(aliases=["-s"])]


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Download a checkpoint with its tokenizer, check both, and make it ready to chat."""

    repo: tyro.conf.Positional[str]
    """repository, as in owner/name"""
    source: Stage = "sft"
    """stage to store the model as"""
    model_tag: ModelTag = ""
    """name for the checkpoint folder; empty: that of the repository"""
    step: Step = -1
    """step of the checkpoint; -1: the newest"""
    folder: str | None = None
    """folder of the repository, if several hold checkpoints"""
    revision: str | None = None
    """branch, tag or commit; the default branch if omitted"""
    overwrite: bool = False
    """replace the checkpoint folder that has this name"""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a checkpoint, its tokenizer, the report and a model card; needs a token in HF_TOKEN."""

    repo: tyro.conf.Positional[str]
    """repository, as in owner/name; created if it does not exist"""
    source: Stage = "sft"
    """stage of the model"""
    model_tag: ModelTag = ""
    """name of the checkpoint folder; empty: the deepest dN"""
    step: Step = -1
    """step of the checkpoint; -1: the newest"""
    license: str = "mit"
    """license of the weights, by its name on the hub"""
    card: Path | None = None
    """a model card of your own, instead of the generated one"""
    private: bool = False
    """make a new repository private"""
    overwrite: bool = False
    """add to a repository that holds files, and replace those with the same names"""
    dry_run: bool = False
    """upload nothing: list the files, and write the card to README.md beside the checkpoint if it has none"""


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """The command and its settings."""

    command: (
        Annotated[Pull, tyro.conf.subcommand("pull", prefix_name=False)]
        | Annotated[Push, tyro.conf.subcommand("push", prefix_name=False)]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Pull or push."""
    command = parse(HubConfig, argv).command
    if isinstance(command, Pull):
        pull(command)
    else:
        push(command)
    return 0


def pull(config: Pull) -> None:
    """Pull, and print the command to talk to the model."""
    from nanochat.hub import repository

    tag = config.model_tag or config.repo.rsplit("/", 1)[-1]
    directory = repository.pull(
        config.repo,
        config.source,
        tag,
        step=config.step,
        folder=config.folder,
        revision=config.revision,
        overwrite=config.overwrite,
    )
    print(f"pulled to {directory}; talk to it: python -m scripts.chat_cli -i {config.source} -g {tag}")


def push(config: Push) -> None:
    """Push, or list the files of a push."""
    from nanochat.checkpoint_manager import checkpoint_dir, resolve_tag
    from nanochat.hub import repository

    tag = resolve_tag(config.source, config.model_tag)
    selection = {"step": config.step, "card": config.card, "license": config.license}
    if not config.dry_run:
        address = repository.push(
            config.repo,
            config.source,
            tag,
            **selection,
            private=config.private,
            overwrite=config.overwrite,
        )
        print(f"pushed: {address}")
        return
    files = repository.gather(config.repo, config.source, tag, **selection)
    for name, source in files.items():
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        print(f"{size:14,d}  {name}")
    path = checkpoint_dir(config.source, tag) / "README.md"
    if not path.exists():  # it may have been edited
        with atomic_write(path) as file:
            file.write(files["README.md"])
    print(f"nothing was uploaded; the card is {path}: to change it, edit it and push with --card={path}")


if __name__ == "__main__":
    run(main)
