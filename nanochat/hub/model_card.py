"""The model card: README.md of a model's repository on the hub.

All figures come from the report; the card says which of them are missing.
"""

from __future__ import annotations

from typing import Any

import torch
import yaml

from nanochat.cache import state_bytes
from nanochat.config import GPTConfig
from nanochat.dataset import hub_text, source
from nanochat.gpt import GPT
from nanochat.report.markdown import dig, escape, fence, show, table
from nanochat.report.text import count, fixed4, summary, task_names

CHAT_DATASETS = {
    "mid_train": ["HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k"],
    "chat_sft": ["allenai/ai2_arc", "openai/gsm8k", "HuggingFaceTB/smol-smoltalk"],
    "chat_rl": ["openai/gsm8k"],
}
STAGE_NAMES = {"base": "pretrained", "mid": "midtrained", "sft": "finetuned", "rl": "reinforcement-learned"}
PROMPT = "<|bos|><|user_start|>QUESTION<|user_end|><|assistant_start|>ANSWER<|assistant_end|>"


def model_card(
    repo: str,
    stage: str,
    meta: dict[str, Any],
    config: GPTConfig,
    results: dict[str, dict],
    license: str,
) -> str:
    """Return the card: YAML front matter and Markdown.

    repo: "owner/name"; meta: the checkpoint's metadata; results: the results of nanochat.report.read_results,
    {} if unknown; license: an identifier of the hub ("mit").
    """
    with torch.device("meta"):
        model = GPT(config)
    datasets = [name for names in _data(results).values() for name in names if "/" in name]
    front_matter = {
        "license": license,
        "library_name": "nanochat",
        "pipeline_tag": "text-generation",
        "tags": ["nanochat", "saint-iberis", "slc2"],
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
    }
    millions = model.num_parameters()["total"] / 1e6
    parts = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---",
        f"# {repo.rsplit('/', 1)[-1]}",
        f"A language model of {millions:,.1f} M parameters ({STAGE_NAMES[stage]}, step {meta.get('step')}), "
        "trained with Saint Iberis: nanochat's pipeline around a hybrid of attention and SLC2, a gated short "
        "causal convolution.",
        _origin(meta),
        "## Architecture",
        _generation(config, model.num_parameters()),
        _architecture(model),
        "## Data and training",
        _training(results) or "Not recorded with these weights.",
        "## Results",
        f"{summary(results)}\n\nAccuracy +- its standard error; n is the number of items."
        if task_names(results) or "base_eval" in results
        else "No evaluation came with these weights.",
        "## How to use",
        "In a checkout of Saint Iberis:",
        fence(
            f"python -m scripts.hub pull {repo} -i {stage}\n"
            f"python -m scripts.chat_cli -i {stage} -g {repo.rsplit('/', 1)[-1]}"
        ),
        "The format of a conversation; each special token is a single token, the rest is plain text:",
        fence(PROMPT),
        "## Limits",
        "A model of this size makes false statements with confidence, reproduces the biases of its training "
        "data, and has had no safety training. Verify its answers.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _origin(meta: dict[str, Any]) -> str:
    origin = dig(meta, "pulled_from", "repo")
    return f"These weights were pulled from {escape(str(origin))}." if origin else ""


def _generation(config: GPTConfig, parameters: dict[str, int]) -> str:
    """Return a sentence that names the generation and what the second adds, with its papers."""
    added = []
    if config.residual_conv:
        added.append(
            f"convolutions of {config.residual_conv} taps, added to keys and output of attention and to the "
            "output of the MLP (Primer, So et al. 2021; Canon layers, Allen-Zhu 2025)"
        )
    if config.value_embeds:
        added.append(
            f"value embeddings, {parameters['value_embeds'] / 1e6:,.1f} M of the parameters: gated tables by "
            "token, added to the values of attention (after value residual learning, Zhou et al. 2024)"
        )
    if config.x0_mix:
        added.append(
            "the embedding mixed into the stream before each layer (modded-nanogpt, Jordan et al. 2024)"
        )
    if config.score_scale != 1:
        added.append(f"scores of attention times {config.score_scale:g}")
    if not added:
        return "First generation: the layers as published."
    return f"Second generation. It has, besides the layers as published: {'; '.join(added)}."


def _architecture(model: GPT) -> str:
    config, parameters, state = model.config, model.num_parameters(), state_bytes(model.config)
    kinds = config.layer_kinds
    layers = [str(i) for i, kind in enumerate(kinds) if kind == "attention"]
    attention = f"{len(layers)} attention ({', '.join(layers)})"
    rows = (
        ("layers", f"{config.n_layer}: {kinds.count('slc2')} SLC2, {attention}"),
        ("width, heads, key-value heads", f"{config.n_embd}, {config.n_head}, {config.n_kv_head}"),
        ("convolution width (taps)", str(config.n_kernel)),
        ("vocabulary", count(config.vocab_size)),
        ("context", f"{config.sequence_len:,} tokens"),
        *((f"parameters: {part}", count(n)) for part, n in parameters.items()),
        ("decode state, bfloat16", f"{state['per_token']:,} bytes per token + {state['per_sequence']:,}"),
    )
    return table(("", "value"), rows)


def _data(results: dict[str, dict]) -> dict[str, list[str]]:
    """Return the training data of each stage; paths of the author's own data are not disclosed."""
    data_of = {}
    for stage in ("base_train", *CHAT_DATASETS):
        data = dig(results, stage, "settings", "data")
        if isinstance(data, str):
            if text := hub_text(data):
                data_of[stage] = [*CHAT_DATASETS.get(stage, [text.repo])]
            elif source(data) == "embedded":
                synthetic = "" if stage == "base_train" else " and synthetic tasks"
                data_of[stage] = [f"documentation of Python{synthetic}"]
            else:
                data_of[stage] = ["data of the author's own"]
            if dig(results, stage, "settings", "add"):
                data_of[stage].append("conversations of the author's own")
    return data_of


def _training(results: dict[str, dict]) -> str:
    rows = [
        (
            stage,
            ", ".join(data),
            show(dig(results, stage, "steps"), count),
            show(dig(results, stage, "tokens"), count),
            show(dig(results, stage, "hardware", "device")),
            show(dig(results, stage, "val_bpb"), fixed4),
        )
        for stage, data in _data(results).items()
    ]
    header = ("stage", "data", "steps", "tokens", "device", "validation bits per byte")
    return table(header, rows) if rows else ""
