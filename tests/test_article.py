"""The two programs of the article that the project was created from, unchanged, on our checkpoints.

The hub is a server on 127.0.0.1. The directory that the first program would clone into already exists and
holds this package. In the second program the base directory replaces the author's home directory, as the
article instructs its readers.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_dir, load_model, save_checkpoint
from scripts import hub
from tests.helpers.echo_model import echo, echo_config, echo_model
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
REPO = "RikkaBotan/nanochat_d20_saint_iberis"

TALK = """
import os
import sys
import torch
import json
import time
from huggingface_hub import hf_hub_download

if not os.path.exists("Liquid_Time_nanochat"):
    os.system("git clone https://github.com/Rikka-Botan/Liquid_Time_nanochat")

os.chdir("Liquid_Time_nanochat")
sys.path.append(os.getcwd())

from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer

repo_id = "RikkaBotan/nanochat_d20_saint_iberis"
model_file = "model_000700.pt"
meta_file = "meta_000700.json"
tokenizer_file = "tokenizer.pkl"

local_pt_path = hf_hub_download(repo_id=repo_id, filename=model_file)
local_meta_path = hf_hub_download(repo_id=repo_id, filename=meta_file)
local_tokenizer_path = hf_hub_download(repo_id=repo_id, filename=tokenizer_file, local_dir=os.getcwd())

with open(local_meta_path, "r", encoding="utf-8") as f:
    meta_data = json.load(f)

model_config = GPTConfig(**meta_data["model_config"])

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = GPT(model_config).to(device)

state_dict = torch.load(local_pt_path, map_location=device)
state_dict = {k.removeprefix("_orig_mod."): v for k, v in state_dict.items()}
model.load_state_dict(state_dict, strict=True)
model.eval()

tokenizer = RustBPETokenizer.from_directory(os.getcwd())

try:
    tokenizer.bos_token_id = tokenizer.enc.encode_single_token("<|bos|>")
except KeyError:
    tokenizer.bos_token_id = tokenizer.enc.encode_single_token("<|endoftext|>")

tokenizer.user_start_id = tokenizer.enc.encode_single_token("<|user_start|>")
tokenizer.user_end_id = tokenizer.enc.encode_single_token("<|user_end|>")
tokenizer.assistant_start_id = tokenizer.enc.encode_single_token("<|assistant_start|>")
tokenizer.assistant_end_id = tokenizer.enc.encode_single_token("<|assistant_end|>")
tokenizer.stop_tokens = {tokenizer.assistant_end_id, tokenizer.bos_token_id}

def format_conversation(tokenizer, history):
    tokens = [tokenizer.bos_token_id]
    for message in history:
        role = message["role"]
        content = message["content"]
        content_tokens = tokenizer.encode(content)
        if role == "user":
            tokens.extend([tokenizer.user_start_id, *content_tokens, tokenizer.user_end_id])
        elif role == "assistant":
            tokens.extend([tokenizer.assistant_start_id, *content_tokens, tokenizer.assistant_end_id])
    tokens.append(tokenizer.assistant_start_id)
    return tokens

def generate_reply(prompt, conv_history, temperature=0.7, top_k=20, top_p=0.8,
                   repetition_penalty=1.15, max_new_tokens=64):
    conv_history.append({"role": "user", "content": prompt})
    tokens = format_conversation(tokenizer, conv_history)
    input_ids = torch.tensor(tokens, dtype=torch.long).unsqueeze(0).to(device)

    stream = model.generate(
        input_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )

    buffer_text = ""
    for token_id in stream:
        text_piece = tokenizer.decode([token_id])
        if text_piece == "<|assistant_end|>":
            break
        buffer_text += text_piece
    conv_history.append({"role": "assistant", "content": buffer_text})
    return buffer_text

if __name__ == "__main__":
    print("\U0001f338 NanoChat - Saint Iberis CLI")
    print("Type 'exit' to quit.\\n")
    conv_history = []

    while True:
        prompt = input("You: ")
        if prompt.lower() in {"exit", "quit"}:
            print("Goodbye!")
            break

        reply = generate_reply(prompt, conv_history)
        print(f"AI: {reply}\\n")
"""

UPLOAD = """
from huggingface_hub import login, upload_folder
login(token="your token")
upload_folder(
    folder_path="/home/ubuntu/.cache/nanochat/chatsft_checkpoints/d20",
    path_in_repo="model",  # Default model checkpoint name
    repo_id="RikkaBotan/nanochat_d20_saint_iberis",  # Replace with your username/repo name
    repo_type="model"
)
upload_folder(
    folder_path="/home/ubuntu/.cache/nanochat/tokenizer",
    path_in_repo="tokenizer",  # Default model checkpoint name
    repo_id="RikkaBotan/nanochat_d20_saint_iberis",  # Replace with your username/repo name
    repo_type="model"
)
upload_folder(
    folder_path="/home/ubuntu/.cache/nanochat/report",
    path_in_repo="report",  # Default model checkpoint name
    repo_id="RikkaBotan/nanochat_d20_saint_iberis",  # Replace with your username/repo name
    repo_type="model"
)
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def checkpoint(base_dir, tokenizer):
    """The directory of a run named d20; the base directory also has its tokenizer and a report."""
    tokenizer.save(base_dir / "tokenizer")
    (base_dir / "report").mkdir()
    (base_dir / "report" / "report.md").write_text("# report")
    directory = checkpoint_dir("sft", "d20")
    model = echo_model(echo_config(tokenizer.get_vocab_size()))
    save_checkpoint(directory, 700, model, {"state": {}}, {"user_config": {}})
    return directory


def run_program(text, folder, typed=""):
    """Run a program in a directory with `typed` as its standard input; return its output."""
    (folder / "program.py").write_text(text, encoding="utf-8")
    settings = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env={**os.environ, **settings},
        input=typed,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("is_published", [False, True], ids=["ours", "published"])
def test_the_chat_program(model_hub, checkpoint, tokenizer, tmp_path, is_published):
    """Our format, and the published one: prefixes from torch.compile and a bfloat16 embedding."""
    state = torch.load(checkpoint / "model_000700.pt")
    if is_published:
        state = {f"_orig_mod.{key}": value for key, value in state.items()}
        state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
        torch.save(state, checkpoint / "model_000700.pt")
    model_hub.repo = REPO
    model_hub.files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    model_hub.files["tokenizer.pkl"] = pickle.dumps(tokenizer.enc)
    (tmp_path / "Liquid_Time_nanochat").mkdir()
    (tmp_path / "Liquid_Time_nanochat" / "nanochat").symlink_to(ROOT / "nanochat")

    out = run_program(TALK, tmp_path, "the river B\nand the bridge\nEXIT\n")
    messages, replies = [], []
    for question in ("the river B", "and the bridge"):
        messages.append({"role": "user", "content": question})
        replies.append(echo(tokenizer, tokenizer.render_for_completion({"messages": messages}), 64))
        messages.append({"role": "assistant", "content": replies[-1]})
    assert out == (
        "\U0001f338 NanoChat - Saint Iberis CLI\nType 'exit' to quit.\n\n"
        f"You: AI: {replies[0]}\n\nYou: AI: {replies[1]}\n\nYou: Goodbye!\n"
    )


def test_the_upload_program(model_hub, checkpoint, tokenizer, base_dir, tmp_path):
    """scripts.hub pulls the uploaded files, with the same weights and tokenizer."""
    model_hub.repo, model_hub.token = REPO, "your token"
    run_program(UPLOAD.replace("/home/ubuntu/.cache/nanochat", str(base_dir)), tmp_path)
    assert sorted(model_hub.files) == [
        "model/meta_000700.json",
        "model/model_000700.pt",
        "model/optim_000700_rank0.pt",
        "report/report.md",
        "tokenizer/tokenizer.pkl",
        "tokenizer/tokenizer_nanochat.json",
    ]
    assert hub.main(["pull", REPO, "--tag=pulled"]) == 0
    uploaded, pulled = (load_model("sft", torch.device("cpu"), "eval", tag) for tag in ("d20", "pulled"))
    for a, b in zip(uploaded[0].parameters(), pulled[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert pulled[1].is_same_as(tokenizer)
