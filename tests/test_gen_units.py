"""The README's example of a new identity and a new skill: what its commands write can be learned."""

import subprocess
import sys
from pathlib import Path

import torch

from dev import gen_identity, gen_units
from nanochat.calculator import calculate
from nanochat.checkpoint_manager import load_model
from tasks.customjson import CustomJSON
from tests.helpers import chats

ROOT = Path(__file__).parent.parent


def write_units(path):
    with open(path, "w") as file:
        subprocess.run([sys.executable, "dev/gen_units.py"], cwd=ROOT, stdout=file, check=True)
    return CustomJSON(path)


def test_help_and_unknown_arguments_write_no_conversations():
    for flag, status in (("--help", 0), ("--num=5", 2)):
        command = [sys.executable, "dev/gen_units.py", flag]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, "messages" in done.stdout) == (status, False)


def test_the_calculator_says_what_the_conversations_say(tmp_path):
    task = write_units(tmp_path / "units.jsonl")
    assert len(task) > 1000
    for i in range(len(task)):
        call, result, said = task[i]["messages"][1]["content"]
        assert calculate(call["text"]) == result["text"]
        assert said["text"].split()[0] == result["text"]


def test_what_is_kept_back_is_not_learned():
    kept, learned = ([m[0]["content"] for m in gen_units.conversations(back)] for back in (True, False))
    assert len(kept) > 200
    assert len({*kept, *learned}) == len(kept) + len(learned)


def test_identity_and_skill_are_learned_together(base_dir, tmp_path):
    chats.write_base_checkpoint(base_dir)
    gen_identity.main(
        [str(ROOT / "dev" / "persona.yaml"), "--num=50", f"--out={tmp_path / 'identity.jsonl'}"]
    )
    write_units(tmp_path / "units.jsonl")
    data = [f"--data={tmp_path / 'identity.jsonl'}", f"--add={tmp_path / 'units.jsonl'}"]
    for stage in ("mid", "sft"):
        assert chats.train(stage, *data, "--num-iterations=2") == 0
    assert load_model("sft", torch.device("cpu"), "eval", "d2")[2]["step"] == 2
