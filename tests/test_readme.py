"""The documents hold: the README's commands run, those of others parse, both languages say the same.

The commands run in the order of the README, as a reader would run them, in one process and base directory.
SMALL holds what is added to those that would take long, ELSEWHERE those that another test runs: of these the
flags are parsed. A command in neither is run unchanged.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_dir, load_model
from nanochat.common import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import PEAK_FLOPS
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.train.memory import fit
from scripts import tok_eval
from tasks import embedded_mixtures
from tests.helpers.core_bundles import write_bundle
from tests.helpers.echo_model import echo_config, echo_model
from tests.helpers.hub_models import REPO, published
from tests.helpers.vocabulary import train_tokenizer
from tests.test_transformers_model import QUESTIONS, TASK

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "README.ja.md", "CONTRIBUTING.md", "dev/RESULTS.md", "dev/LOG.md")
}
README, JAPANESE, CONTRIBUTING, RESULTS, LOG = DOCUMENTS.values()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python|bash|torchrun|lm_eval)\b")
SHELL = ("git", "cd", "source", "export", "unset")  # nothing of ours runs

CPU = "--device-type=cpu"
STEPS = f"{CPU} --overwrite --num-iterations=2 --eval-every=0 --sample-every=0 --device-batch-size=2"
BASE = f"{STEPS} --total-batch-size=512 --depth=4 --max-seq-len=128 --eval-tokens=256"
TOKENIZER = "--vocab-size=300 --max-chars=50000"
RL = "--num-steps=1 --examples-per-step=2 --num-samples=2 --max-new-tokens=4 --eval-examples=2"
ANSWER = f"{CPU} -m 4"
BENCH = "--depth=2 --vocab-size=64"
SMALL = {  # what is added to commands, by the words that they begin with; the longest counts
    "python -m scripts.tok_train": TOKENIZER,
    "python -m scripts.tok_eval": "--max-chars=2000",
    "python -m scripts.base_train": BASE,
    "python -m scripts.base_loss": f"{CPU} --split-tokens=256 --device-batch-size=2",
    "python -m scripts.base_eval": f"{CPU} --bundle=BUNDLE",
    "python -m scripts.mid_train": f"{STEPS} --total-batch-size=512 --val-conversations=4",
    "python -m scripts.chat_sft": f"{STEPS} --conversations-per-step=2 --val-conversations=4",
    "python -m scripts.chat_rl": f"{CPU} {RL}",
    "python -m scripts.chat_eval": f"{CPU} -x 2 -m 4",
    "python -m scripts.chat_cli": ANSWER,
    "python -m scripts.doctor": "--device-type=cpu --data=embedded --depth=2 --ranks=1",
    "python -m scripts.bench_infer": f"{CPU} {BENCH} --batch-sizes 1 --contexts 16 --steps 2",
    "python -m scripts.bench_train": f"{BASE} {BENCH}",
    "python dev/gen_identity.py": "--num=20",
    "lm_eval": "--include_path . --device cpu",
}
ELSEWHERE = {
    "bash speedrun.sh": "tests/test_speedrun.py",
    "DEPTH=8 bash speedrun.sh": "tests/test_speedrun.py",
    "DEVICE_BATCH_SIZE=4 bash speedrun.sh": "tests/test_speedrun.py",
    "FP8=1 bash speedrun.sh": "tests/test_speedrun.py",
    "RECIPE=saint_iberis_2 bash speedrun.sh": "tests/test_speedrun.py",
    "DATA=PATH bash speedrun.sh": "tests/test_speedrun.py",
    "bash tests/run.sh": ".ci/run",
    "bash tests/run.sh tests/test_slc2.py tests/test_gpt.py tests/test_decode_law.py": ".ci/run",
    "bash tests/run.sh -m gpu": ".ci/run",
    "bash dev/setup.sh --tests": "tests/run.sh",
    "python -m nanochat.dataset -n 240": "tests/test_download.py",
    "python -m nanochat.dataset -n 8": "tests/test_download.py",
    "python -m nanochat.dataset -n 240 --data=hub:climbmix": "tests/test_download.py",
    "python -m scripts.chat_web": "tests/test_chat_web.py",
    "NANOCHAT_API_KEY=secret python -m scripts.chat_web --host 0.0.0.0 -p 8080": "tests/test_chat_web.py",
    "python -m scripts.chat_web -n 8": "tests/test_chat_web.py",
    "python -m scripts.bench_serve --url=http://127.0.0.1:8000 --clients=200 --seconds=60 --disconnect=0.2": (
        "tests/test_bench_serve.py"
    ),
    "python -m scripts.bench_kernels": "tests/test_bench_kernels.py",
    "python -m scripts.bench_tokenizer": "tests/test_rustbpe.py",
    "torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20": (
        "tests/test_base_train.py"
    ),
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=d20 --rdzv_endpoint=HOST0:29500 "
    "-m scripts.base_train -- --depth=20 --save-every=500 --resume": "tests/helpers/ranks.py",
}
NEEDED = {  # arguments without which a command is not even read
    "scripts.hub": ["push", "me/x"],
    "nanochat.report": ["plot", "x"],
    "scripts.import_hf": ["x"],
    "scripts.export_hf": ["-o", "x"],
    "scripts.bench_serve": ["--url=http://127.0.0.1:1"],
}


def blocks(text, *languages):
    return [code for language, code in FENCE.findall(text) if language in languages]


def spans(text):
    """Inline code, in order."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))]


def commands(text):
    """Every command, in order: lines of bash without comments and with their variables, and inline code."""
    found, variables = [], {}
    for match in re.finditer(
        r"^```bash\n(?P<code>.*?)^```$|^```.*?^```$|`(?P<span>[^`]+)`", text, re.M | re.S
    ):
        if match["span"]:
            span = " ".join(match["span"].split())
            found += [span] if COMMAND.match(span) else []
            continue
        lines = (match["code"] or "").replace("\\\n", " ").splitlines()
        for part in (part for line in lines for part in line.split("&&")):
            line = " ".join(re.sub(r"(^|\s)#.*", "", part).split())
            line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
            if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assignment[1]] = assignment[2]
            elif line:
                found.append(line)
    return found


COMMANDS = commands(README)


class Read(Exception):
    """Raised after the flags have been parsed, to run nothing."""


def script_of(name):
    """Return the module that `python -m name` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def read_flags(module, arguments):
    """Return the config that a command parses from its arguments; ValueError for wrong ones. Run nothing."""
    script, configs = script_of(module), []
    parse = script.parse

    def parse_only(config_class, *arguments):
        configs.append(parse(config_class, *arguments))
        raise Read

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Read):
        patch.setattr(script, "parse", parse_only)
        script.main(arguments)
    return configs[0]


def module_and_arguments(words):
    """Return the module of ours that a command runs by python or torchrun, and its arguments; or None."""
    for i, word in enumerate(words):
        if words[i - 1] == "-m" and word.startswith(("scripts.", "nanochat.")):
            return word, [argument for argument in words[i + 1 :] if argument != "--"]
    return None


def test_no_fence_goes_unread():
    assert {language for language, _ in FENCE.findall(README)} <= {"bash", "python", "text"}
    assert README.count("```") == 2 * len(FENCE.findall(README))
    assert len(COMMANDS) > 40


def test_elsewhere_is_somewhere():
    """Each command listed is in the README, and the named file runs it."""
    assert set(ELSEWHERE) - set(COMMANDS) == set()
    for command, file in ELSEWHERE.items():
        name = next(re.finditer(r"scripts\.(\w+)|nanochat\.(\w+)|([\w/]+\.sh)", command))
        assert next(filter(None, name.groups())) in (ROOT / file).read_text(), (
            f"{file} does not run {command}"
        )
        if known := module_and_arguments(shlex.split(command)):
            read_flags(*known)
    for start in SMALL:
        assert any(command.startswith(start) for command in COMMANDS), start


def test_flags_in_the_text():
    """A flag in the text belongs to a command of the README."""
    modules = {module_and_arguments(shlex.split(c))[0] for c in COMMANDS if " -m scripts." in c}

    def is_known(module, flag):
        try:
            read_flags(module, [*NEEDED.get(module, []), *flag])
        except ValueError as error:
            return "nrecognized" not in str(error)
        except SystemExit:
            return flag == ["--help"]
        return True

    flags = {span for span in spans(README) if span.startswith("-")}
    assert len(flags) > 15
    unknown = {flag for flag in flags if not any(is_known(module, shlex.split(flag)) for module in modules)}
    assert unknown == set()


# ---------------------------------------------------------------------------------------------------------
# The walk


@pytest.fixture
def reader(tmp_path, monkeypatch, model_hub):
    """A reader in an empty folder with texts at PATH; speedrun.sh has left, in small, what it leaves."""
    home = tmp_path / "home"
    (home / "PATH").mkdir(parents=True)
    monkeypatch.chdir(home)
    (home / "dev").symlink_to(ROOT / "dev")
    for i in range(30):
        (home / "PATH" / f"{i}.txt").write_text(f"A river flows under bridge number {i}. " * 40)
    write_bundle(home / "BUNDLE")
    (home / "river.yaml").write_text(TASK.format(path=home / "questions.jsonl"))
    (home / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    tokenizer = train_tokenizer()
    model = echo_model(echo_config(tokenizer.get_vocab_size()))
    model_hub.repo, model_hub.files = REPO, published(model, tokenizer, tmp_path)
    parts = embedded_mixtures._parts
    monkeypatch.setattr(embedded_mixtures, "_parts", lambda mix, split: parts(replace(mix, size=60), split))
    for stage in ("tok_train", "base_train"):
        run(f"python -m scripts.{stage}")
    shutil.copytree(checkpoint_dir("base", "d4"), checkpoint_dir("sft", "d4"))
    monkeypatch.setattr(tok_eval, "load_pretrained", offline)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is 12*7?\n")))
    return home


def offline(name, timeout=0):
    raise ConnectionError("no network")


def run(command):
    """Run a command of the README, made small."""
    start = max((start for start in SMALL if command.startswith(start)), key=len, default=None)
    words = shlex.split(f"{command} {SMALL.get(start, '')}")
    if words[0] == "lm_eval":
        words[words.index("arc_easy")] = "river"
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.tasks import TaskManager

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            # without lm_eval's own tasks, thousands of files to read
            patch.setattr(
                TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False)
            )
            cli_evaluate()
    elif known := module_and_arguments(words):
        assert words[:2] == ["python", "-m"], f"what is {command}?"
        assert script_of(known[0]).main(known[1]) == 0
    else:
        assert words[0] == "python", f"what is {command}?"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = shlex.split(f"{sys.executable} {words[1]} {SMALL.get(start, '')} {shlex.join(words[2:])}")
        out = words.index(">") if ">" in words else len(words)
        result = subprocess.run(words[:out], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        if words[out:]:
            Path(words[out + 1]).write_text(result.stdout)


@pytest.mark.slow
def test_the_walk(reader, capsys, monkeypatch, tmp_path):
    """Each command, in the order of the README; the last one printed is the one that failed."""
    base = os.environ["NANOCHAT_BASE_DIR"]
    for command in COMMANDS:
        word, *rest = command.split()
        if word == "export":
            monkeypatch.setenv(rest[0].split("=")[0], str(tmp_path / "elsewhere"))
        elif word == "unset":
            monkeypatch.setenv(rest[0], base)
        elif word not in SHELL and command not in ELSEWHERE:
            sys.stderr.write(f"README: {command}\n")
            run(command)
    assert load_model("sft", torch.device("cpu"), "eval", "back")[0].config.n_layer == 4
    assert (reader / "curves.png").stat().st_size > 10_000
    assert (reader / "units.jsonl").read_text().count("\n") > 1000
    assert "|river|" in capsys.readouterr().out.replace(" ", "")


def test_the_task_of_the_readme():
    (code,) = blocks(README, "python")
    names = {}
    exec(code, names)  # noqa: S102 - our own
    task = names["Double"]()
    answers = [conversation["messages"][-1]["content"] for conversation in task]
    assert answers == [str(2 * n) for n in range(10, 100)]
    assert task.evaluate(task[3], " 26\n")
    assert not task.evaluate(task[3], "25")


# ---------------------------------------------------------------------------------------------------------
# Figures, tables and links


MEASURED = {12: 576_961, 20: 188_590}  # tokens a second on an H100, dev/LOG.md


def rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]


def numbers(text):
    return re.findall(r"\d(?:[\d,.]*\d)?", text)


def test_the_hardware_table():
    """Hours and rows are those of nanochat/train/memory.py and of the cards' peaks, or of measured speeds.

    Rows were those of plain PyTorch on all cards but the H100, whose tiles only the MLP's kernels need.
    """
    table = [row for row in rows(README) if re.search(r"\d+ GB", row[0])]
    assert len(table) == 7
    for name, *cells in table:
        n_cards, card, gib = re.fullmatch(r"(?:(\d) x )?(.*), (\d+) GB", name).groups()
        for depth, cell in zip((8, 12, 20), cells, strict=False):
            if cell == "-":
                continue
            hours, n_rows = re.fullmatch(r"([\d.]+) h, (\d+) rows", cell).groups()
            config = GPTConfig.from_depth(depth, vocab_size=65_536)
            with torch.device("meta"):
                model = GPT(config)
            speed = 0.4 * PEAK_FLOPS[card] / model.flops_per_token()
            if card == "H100":
                speed = MEASURED.get(depth, speed)
            time = 20 * model.num_parameters()["total"] / speed / int(n_cards or 1) / 3600
            assert hours == f"{time:.{0 if time > 9.95 else 1}f}", (name, depth)
            found = fit(config, int(0.985 * int(gib) * 2**30), fused_mlp=card == "H100")
            assert found == (int(n_rows), False), (name, depth)


def test_the_table_of_many_gpus():
    """Computing at the measured speed, then all that is sent, empty slots of stacks included, in turn."""
    alone = 524_288 / MEASURED[20]
    table = [row for row in rows(RESULTS) if row[0] in ("1", "2", "8", "64")]
    assert table[0] == ["1", f"{alone:.2f} s", "-", "-", "1"]
    for (ranks, *cells), bandwidth in zip(table[1:], (300e9, 370e9, 45e9), strict=True):
        n = int(ranks)
        with torch.device("meta"):
            model = GPT(GPTConfig.from_depth(20, vocab_size=65_536))
        optimizer = build_optimizer(model, OptimizerConfig(), replace(Runtime.cpu(), world_size=n))
        gradients = 2 * sum(stack.weights.numel() for stack in optimizer.stacks) * (n - 1) / n / bandwidth
        times = [alone / n, gradients, 2 * gradients]
        for cell, value in zip(cells, [*times, alone / sum(times)], strict=True):
            number, unit = re.match(r"([\d.]+)( m?s)?", cell).groups()
            digits = len(number.replace(".", ""))
            assert float(number) == float(f"{value * (1e3 if unit == ' ms' else 1):.{digits}g}"), (n, cell)


def test_both_languages_say_the_same():
    """The same commands and code, and the same numbers in the same tables."""

    def code(text):
        return [re.sub(r"\s*#.*|<.*?>", "", block) for block in blocks(text, "bash", "python")]

    assert code(JAPANESE) == code(README)
    english, japanese = (Counter(c for c in commands(text) if c[:3] != "git") for text in (README, JAPANESE))
    assert japanese == english
    assert [numbers(" ".join(row)) for row in rows(JAPANESE)] == [
        numbers(" ".join(row)) for row in rows(README)
    ]
    assert JAPANESE.count("\n## ") == README.count("\n## ")


def anchor(heading):
    """Return the anchor that GitHub gives a heading."""
    return "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths_exist(name):
    text = DOCUMENTS[name]
    folder = (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = []
    for link in links:
        path, _, fragment = link.partition("#")
        file = folder / path if path else ROOT / name
        if not file.exists():
            missing.append(link)
        elif fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            missing += [link] * (f"#{fragment}" not in map(anchor, headings))
    if name != "dev/LOG.md":  # its entries name the files of their day
        assert len(links) > 3
        paths = (
            span for span in spans(text) if re.fullmatch(r"(nanochat|tasks|tests|dev|scripts)/[\w./]*", span)
        )
        missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("text", [README, JAPANESE], ids=["en", "ja"])
def test_the_tree_is_that_of_the_checkout(text):
    """Every file and folder of the tree exists, and every Python file and folder of nanochat/ is in it."""
    (tree,) = (block for block in blocks(text, "text") if block.startswith("speedrun.sh"))
    names = set(re.findall(r"(?<![\w./])[\w/]+(?:\.py|\.sh|\.html|/)", tree))
    package = ROOT / "nanochat"
    missing = {
        name
        for name in names
        if not any([*ROOT.glob(name), *ROOT.glob(f"*/{name}"), *package.glob(f"*/{name}")])
    }
    assert missing == set()
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")} - {"kernels/"}
    assert (files | folders) - names == set()


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "dev/RESULTS.md"])
def test_the_commands_of_other_documents_parse(name):
    known = [module_and_arguments(shlex.split(command)) for command in commands(DOCUMENTS[name])]
    for module, arguments in filter(None, known):
        read_flags(module, arguments)
    scripts = re.findall(r"bash ([\w/]+\.sh)", DOCUMENTS[name])
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_the_log_has_an_index_and_verdicts():
    """An entry a heading, in the order of the index, newest first, each with its verdict on top."""
    index, *entries = re.split(r"^## (?=\d)", LOG, flags=re.MULTILINE)
    dates = [row[0] for row in rows(index) if re.match(r"\d", row[0])]
    assert dates == [entry[:10] for entry in entries]
    assert dates == sorted(dates, reverse=True)
    assert [entry.splitlines()[0] for entry in entries if not re.match(r".*\n\n\*\*Verdict: ", entry)] == []


def test_the_points_of_the_figure_are_those_of_the_log(tmp_path):
    from dev import draw_minutes

    values = [value for system in draw_minutes.SYSTEMS for runs in system.runs.values() for value in runs]
    assert [value for value in values if f"{value:.4f}" not in LOG] == []
    assert draw_minutes.main([str(tmp_path / "minutes.png")]) == 0
    assert (tmp_path / "minutes.png").stat().st_size > 10_000


def test_the_figure_is_that_of_its_script(tmp_path):
    from dev import draw_slc2

    assert draw_slc2.main([str(tmp_path / "slc2.svg")]) == 0
    assert (tmp_path / "slc2.svg").read_text().count("<path") == (
        ROOT / "dev" / "slc2.svg"
    ).read_text().count("<path")
