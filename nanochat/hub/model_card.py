"""The model card: what a stranger has to know of a model, as the README.md of its repository.

Figures are those of the report; where there is none, the card says so and claims nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import yaml

from nanochat.config import GPTConfig
from nanochat.dataset import REPO_ID, source
from nanochat.gpt import GPT
from nanochat.report.markdown import dig, escape, fence, show, table
from nanochat.report.text import count, fixed4, summary, task_names

HUB_SETS = {
    "base_train": [REPO_ID],
    "mid_train": ["HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k"],
    "chat_sft": ["allenai/ai2_arc", "openai/gsm8k", "HuggingFaceTB/smol-smoltalk"],
    "chat_rl": ["openai/gsm8k"],
}
STAGES = {"base": "pretrained", "mid": "midtrained", "sft": "finetuned", "rl": "reinforcement-learned"}
PROMPT = "<|bos|><|user_start|>QUESTION<|user_end|><|assistant_start|>ANSWER<|assistant_end|>"


def model_card(
    repo: str,
    stage: str,
    meta: dict[str, Any],
    config: GPTConfig,
    results: dict[str, dict],
    license: str,
) -> str:
    """Return the card: YAML front matter and Markdown. `results` are those of the report, {} if unknown."""
    with torch.device("meta"):
        model = GPT(config)
    sets = [name for sets in _data(results).values() for name in sets if "/" in name]
    front = {
        "license": license,
        "library_name": "nanochat",
        "pipeline_tag": "text-generation",
        "tags": ["nanochat", "saint-iberis", "slc2"],
        **({"datasets": list(dict.fromkeys(sets))} if sets else {}),
    }
    millions = model.num_parameters()["total"] / 1e6
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo.rsplit('/', 1)[-1]}",
        f"A language model of {millions:,.1f} M parameters ({STAGES[stage]}, step {meta.get('step')}), made "
        "with Saint Iberis: nanochat's pipeline around a hybrid of attention and SLC2, a gated short causal "
        "convolution.",
        _origin(meta),
        "## Architecture",
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
        "What the model reads and writes in a conversation, as single tokens around plain text:",
        fence(PROMPT),
        "## Limits",
        "A model of this size states wrong things with confidence, repeats what its data holds, good and "
        "bad, and was not made safe for the public. Check what it says.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _origin(meta: dict[str, Any]) -> str:
    origin = dig(meta, "pulled_from", "repo")
    return f"These weights were pulled from {escape(str(origin))}." if origin else ""


def _architecture(model: GPT) -> str:
    config, parameters, state = model.config, model.num_parameters(), model.state_bytes()
    kinds = config.layer_kinds
    at = [str(i) for i, kind in enumerate(kinds) if kind == "attention"]
    rows = (
        ("layers", f"{config.n_layer}: {kinds.count('slc2')} SLC2, {len(at)} attention ({', '.join(at)})"),
        ("width, heads, key-value heads", f"{config.n_embd}, {config.n_head}, {config.n_kv_head}"),
        ("taps of the convolution", str(config.n_kernel)),
        ("vocabulary", count(config.vocab_size)),
        ("context", f"{config.sequence_len:,} tokens"),
        *((f"parameters: {part}", count(n)) for part, n in parameters.items()),
        ("decode state, bfloat16", f"{state['per_token']:,} bytes a token + {state['per_sequence']:,}"),
    )
    return table(("", "value"), rows)


def _data(results: dict[str, dict]) -> dict[str, list[str]]:
    """Return what each stage learned from; of data of the author's own only that it was."""
    found = {}
    for stage, sets in HUB_SETS.items():
        data = dig(results, stage, "settings", "data")
        if isinstance(data, str):
            embedded = "documentation of Python" + ("" if stage == "base_train" else " and synthetic tasks")
            kinds = {"hub": sets, "embedded": [embedded]}
            found[stage] = list(kinds.get(source(data), ["data of the author's own"]))
            if dig(results, stage, "settings", "add"):
                found[stage].append("conversations of the author's own")
    return found


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
    head = ("stage", "data", "steps", "tokens", "device", "validation bits per byte")
    return table(head, rows) if rows else ""
