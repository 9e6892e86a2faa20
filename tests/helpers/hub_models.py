"""Models as published for the stand-in hub, and a question to a pulled one."""

import json
import pickle

import torch

from scripts import chat_cli
from tests.helpers.echo_model import echo

REPO = "RikkaBotan/nanochat_d20_saint_iberis"
TAG = "nanochat_d20_saint_iberis"
QUESTION = "the river B"
CPU = torch.device("cpu")


def published(model, tokenizer, tmp_path, state=None):
    """Return the files as published: prefixed keys, a bf16 embedding, no layer plan, a pickled tokenizer."""
    state = {f"_orig_mod.{key}": value for key, value in (state or model.state_dict()).items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    config = {k: v for k, v in vars(model.config).items() if k not in ("n_kernel", "slc_rate")}
    torch.save(state, tmp_path / "published.pt")
    return {
        "model_000700.pt": (tmp_path / "published.pt").read_bytes(),
        "meta_000700.json": json.dumps({"step": 700, "val_loss": 1.0657, "model_config": config}).encode(),
        "tokenizer.pkl": pickle.dumps(tokenizer.enc),
    }


def in_folders(files):
    return {("tokenizer/" if "tok" in name else "model/") + name: data for name, data in files.items()}


def ask(capsys, *flags):
    capsys.readouterr()
    assert chat_cli.main(["-p", QUESTION, "-t", "0", "-m", "12", "--device-type=cpu", *flags]) == 0
    return capsys.readouterr().out.strip()


def expected(tokenizer):
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": QUESTION}]})
    return echo(tokenizer, prompt, 12)
