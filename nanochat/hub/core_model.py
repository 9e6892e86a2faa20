"""Any causal language model of Transformers as CORE reads it, with its own tokenizer.

A prompt begins with the tokenizer's bos token, once, whatever its post-processor would add. Where it has none
it is the eos token, which then separates documents in training (GPT-2's is both); a tokenizer with neither is
refused. Special tokens spelled out in a text are text.

Weights and activations are float32, since logits in bfloat16 would tie. The context is the config's
max_position_embeddings. A model with a table of positions cannot read beyond it, so its longer prompts are
cut under every protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nanochat.core_eval import HEAD_POSITIONS
from nanochat.data.download import one_line

LOGITS_PER_PASS = 1 << 28  # 1 GiB in float32: a forward pass returns those of all its tokens
DEFAULT_CONTEXT = 2048  # of a model that states none, such as a recurrent one


@dataclass(frozen=True)
class TransformersTokenizer:
    """A tokenizer of Transformers as a CoreTokenizer."""

    tokenizer: Any
    bos_token_id: int

    def get_bos_token_id(self) -> int:
        return self.bos_token_id

    def encode(self, text: Sequence[str], prepend: int) -> list[list[int]]:
        settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [[prepend, *ids] for ids in self.tokenizer(list(text), **settings)["input_ids"]]


@dataclass(frozen=True)
class TransformersModel:
    """A causal model of Transformers as a CoreModel."""

    model: Any
    sequence_len: int
    is_bounded: bool

    @property
    def device(self) -> torch.device:
        return self.model.device

    def batch_tokens(self, n_rows: int) -> int:
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        return min(n_rows * self.sequence_len, LOGITS_PER_PASS // vocab_size)

    def position_logits(self, idx: Tensor, positions: Tensor) -> Iterator[Tensor]:
        # no mask: rows are padded at the end, which a causal model does not see before it
        logits = self.model(input_ids=idx, use_cache=False).logits.flatten(0, 1)
        for part in positions.split(HEAD_POSITIONS):
            yield logits[part].float()


def load_transformers(path: str, device: torch.device) -> tuple[TransformersModel, TransformersTokenizer]:
    """Return model and tokenizer of a folder, or of a repository of the hub that HF_ENDPOINT names.

    A folder's own model code is run, a repository's is not. Raise ValueError without transformers or for a
    tokenizer with neither bos nor eos token, OSError if they cannot be loaded.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"hf_path={path!r} needs transformers, which is not installed: uv pip install transformers"
        ) from error
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    name = str(folder) if is_folder else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=is_folder)
        settings = {"trust_remote_code": is_folder, "dtype": torch.float32}
        model = cast("Any", AutoModelForCausalLM.from_pretrained(name, **settings)).eval().to(device)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot load hf_path={path!r} with transformers: {one_line(error)}") from error
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None:
        raise ValueError(
            f"the tokenizer of hf_path={path!r} has neither a bos nor an eos token to begin prompts with; "
            "set bos_token in its tokenizer_config.json"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
    is_bounded = _has_position_table(model, context)
    return TransformersModel(model, context, is_bounded), TransformersTokenizer(tokenizer, bos)


def _has_position_table(model: torch.nn.Module, context: int) -> bool:
    """Return whether a table, learned or not, has a row for each position of the context and no more.

    Tables are called wpe, embed_positions or the like; OPT's has two more rows.
    """
    tables = [*model.named_parameters(), *model.named_buffers()]
    return any(
        ("wpe" in name or "pos" in name) and table.ndim > 1 and context <= table.shape[0] <= context + 2
        for name, table in tables
    )
