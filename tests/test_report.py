import json
import logging
import math
import os
import sys
import time

import pytest

from nanochat import report
from nanochat.report.__main__ import main
from nanochat.report.markdown import duration, fence, table
from nanochat.report.text import STAGES, chat_table, render, rewards_table, summary, wall_clock
from scripts import chat_eval as scripts_chat_eval
from tests.helpers.reports import RESULTS, generate, unpadded_lines, write_results


@pytest.fixture
def folder(base_dir):
    return write_results(base_dir / "report")


def test_summary_has_a_row_per_metric_and_a_column_per_stage(folder):
    lines = unpadded_lines(generate(folder))
    start = lines.index("| Metric | Chance | n | BASE | MID | SFT | RL |")
    assert lines[start + 2 : start + 7] == [
        "| CORE | - | - | 0.1796 | - | - | - |",
        "| ARC-Easy | 0.2500 | 2,376 / 400 | - | 0.3800 +- 0.0100 | 0.3864 | - |",
        "| GSM8K | 0.0000 | 1,319 | - | 0.0341 +- 0.0050 | - | - |",
        "| ChatCORE | - | - | - | 0.2348 | - | - |",
        "| ChatCORE without SpellingBee | - | - | - | 0.1100 | - | - |",
    ]


def test_published_figures_are_beside_the_same_tasks_only(folder):
    task = {"accuracy": 0.5, "strict": 0.4, "chance": 0.25, "n": 8}
    names = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
    result = {"tasks": dict.fromkeys(names, task), "chatcore": 0.2, "chatcore_without_spellingbee": 0.19}
    lines = unpadded_lines(summary({"chat_eval_sft": result}))
    assert lines[0] == "| Metric | Chance | n | BASE | MID | SFT | RL | article | nanochat |"
    assert lines[-3:] == [
        "| SpellingBee | 0.2500 | 8 | - | - | 0.5000 | - | - | - |",
        "| ChatCORE | - | - | - | - | 0.2000 | - | 0.2322 | - |",
        "| ChatCORE without SpellingBee | - | - | - | - | 0.1900 | - | 0.0817 | 0.0884 |",
    ]
    others = [{**result["tasks"], "Arithmetic": task}, {"SpellingBee": task}, {**result["tasks"], "MMLU": {}}]
    for tasks in others:  # of other data, and of a version that did not judge strictly
        assert "article" not in summary({"chat_eval_sft": {**result, "tasks": tasks}})
    core = scripts_chat_eval.published("chatcore_without_spellingbee", result["tasks"])
    assert core == " (article 0.0817, nanochat 0.0884)"
    assert scripts_chat_eval.published("chatcore", others[1]) == ""


def test_tasks_of_a_chat_evaluation(folder):
    """With pass@k where replies were sampled, and "-" for what older versions did not write."""
    new = {"accuracy": 0.5, "strict": 0.25, "n": 4, "chance": 0, "pass@2": 0.75, "pass@4": 1.0}
    old = {"accuracy": 0.5, "n": 4, "chance": 0.25}
    lines = unpadded_lines(chat_table({"tasks": {"new": new, "old": old}}))
    assert lines[0] == "| task | accuracy | strict | chance | pass@2 | pass@4 | n |"
    assert lines[2:] == [
        "| new | 0.5000 | 0.2500 | 0.0000 | 0.7500 | 1.0000 | 4 |",
        "| old | 0.5000 | - | 0.2500 | - | - | 4 |",
    ]
    assert chat_table({}) == ""
    assert "| GSM8K | 0.0341 | - | 0.0000 | 1,319 |" in unpadded_lines(generate(folder))


def test_stage_sections(folder):
    text = generate(folder)
    for line in (
        "| bytes per token, mean | 6.62 |",
        "| vocabulary | | 65,536 | 50,257 |",
        "| news | 1,819 | 4.00 | 4.50 (+12.5%) |",
        "| parameters | 542,035,200 |",
        "| training time | 2h30m |",
        "| MFU (median) | - |",
        "| peak memory per device | 1.5 GiB |",
        "| validation bits per byte, last | 0.8287 |",
        "| squad | 0.4000 | 0.2500 | 0.2000 | 500 |",
        "Not evaluated, so this CORE is not comparable to others: coqa, lambada.",
        "The capital of France is Paris.",
    ):
        assert line in unpadded_lines(text)
    settings = '<details><summary>settings</summary>\n\n```json\n{\n  "depth": 20\n}\n```\n\n</details>'
    assert settings in text
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Summary", "Environment", "Wall clock and cost", *RESULTS]


def test_wall_clock_and_cost(folder):
    """9,300 + 300 + 2,100 s = 3 h 15 min, at $24 an hour 62 + 2 + 14 = $78."""
    lines = unpadded_lines(generate(folder))
    for line in (
        "| base_train | 1970-01-01 02:46 UTC | 2h35m | $62.00 |",
        "| base_eval | - | 5m00s | $2.00 |",
        "| base_loss | - | - | - |",
        "| chat_eval_sft | - | 35m00s | $14.00 |",
        "| chat_rl | - | not run | - |",
        "| total | | 3h15m | $78.00 |",
    ):
        assert line in lines
    assert "| total | | 3h15m | $9.75 |" in unpadded_lines(generate(folder, "--dollars-per-hour=3"))


def test_time_from_the_start_to_the_last_result(folder):
    (folder / "start.json").write_text('{"started_at": 2800}')
    expected = "From the start to the last result: 2h00m, $48.00, including set-up, downloads and pauses."
    assert expected in generate(folder).splitlines()
    (folder / "start.json").write_text('{"started_at": 99999}')  # the results are older: of an earlier run
    assert "last result" not in generate(folder)


def test_generate_logs_the_summary(folder, caplog):
    caplog.set_level(logging.INFO)
    generate(folder)
    assert "| CORE " in caplog.text
    assert "\nchat_rl: not run\n" in caplog.text
    assert caplog.messages[-1] == f"report: 7 of 11 stages, 3h15m, $78.00; {folder / 'report.md'}"


def test_report_without_results(base_dir):
    text = generate(base_dir / "report")
    for stage in STAGES:
        assert f"| {stage} | - | not run | - |" in unpadded_lines(text)
    assert "reset: not run" in text
    assert os.listdir(base_dir / "report") == ["report.md"]


@pytest.mark.parametrize("damage", [b'{"steps": 1', b"\xff\xfe", b"[1, 2]", b""])
def test_damaged_results_are_reported(folder, caplog, damage):
    caplog.set_level(logging.INFO)
    (folder / "base_train.json").write_bytes(damage)
    text = generate(folder)
    assert "| base_train | - | damaged file (" in "\n".join(unpadded_lines(text))
    assert "base_train: damaged file (" in caplog.text
    assert "## base_train" not in text
    assert "## base_loss" in text


JUNK = [None, 7, "x", [1], {"a": 1}, {"a": {"b": None}}, math.nan, math.inf, True, -1, 1e18, 10**400]


@pytest.mark.parametrize("junk", JUNK)
def test_any_field_may_hold_junk(folder, junk):
    fields = (
        "settings config hardware model parameters steps tokens train_seconds val_bpb metrics samples bpb"
    )
    fields += " tasks core missing_tasks chatcore wall_seconds finished_at vocab_size texts seconds gpus cpu"
    fields += " started_at first_reward token_bytes median_mfu memory_bytes"
    for stage in ("start", *STAGES):
        (folder / f"{stage}.json").write_text(json.dumps(dict.fromkeys(fields.split(), junk)))
    text = generate(folder)
    for stage in STAGES:
        assert f"## {stage}\n" in text


def test_any_number_may_be_junk(folder):
    """Regression: a negative standard error made the report fail."""
    for junk in (number for number in JUNK if isinstance(number, (int, float))):
        task = {"accuracy": junk, "standard_error": junk, "n": junk, "chance": junk}
        (folder / "chat_eval_mid.json").write_text(json.dumps({"tasks": {"a": task}}))
        assert "| a " in generate(folder)


def test_model_samples_cannot_break_the_report():
    text = "```\n</details>\n| a |\n# Title\n````` \x1b[31m\r\ud800\u3000" + "word " * 50
    rendered = render({"base_loss": {"samples": [text]}}, dict.fromkeys(("start", *STAGES), "not run"), [], 1)
    quoted = rendered.split("``````")[1]  # a fence longer than the longest run of backticks in it
    assert quoted.startswith(
        "text\n```\n</details>\n| a |\n# Title\n````` \\x1b[31m\\r\\ud800\u3000word word"
    )
    assert max(map(len, quoted.splitlines())) <= 100 + 3 * 5  # three characters are escaped
    rendered.encode()
    assert fence("a") == "```text\na\n```"


def test_names_cannot_break_a_table():
    text = summary({"chat_eval_mid": {"tasks": {"a|b\n<b>`": {"accuracy": 0.5}}}})
    assert "| a\\|b \\<b>\\` " in text
    assert table(("x", "y"), [("long", "1")]) == "| x    | y |\n|------|--:|\n| long | 1 |"


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 11_700)] == [
        "0m00s",
        "1m00s",
        "59m59s",
        "1h00m",
        "3h15m",
    ]


def test_rewards_table():
    rewards = {"A": {"first": 0.5, "last": 0.75}, "B": {"first": 1.0, "last": 1.0}}
    assert "| B | 1.0000 | 1.0000 |" in unpadded_lines(rewards_table({"rewards": rewards}))
    assert rewards_table({"rewards": {"A": rewards["A"]}}) == rewards_table({}) == ""


def test_a_stage_without_a_time_costs_nothing():
    lines = unpadded_lines(wall_clock({"tok_train": {}, "tok_eval": {"wall_seconds": math.nan}}, {}, 24.0))
    assert {"| tok_train | - | - | - |", "| tok_eval | - | - | - |"} < set(lines)
    assert lines[-1] == "| total | | 0m00s | $0.00 |"


def test_reset_removes_only_the_last_report(folder, monkeypatch):
    generate(folder)
    kept = [folder / "notes.txt", folder / "other.json", folder / "other.png"]
    for path in kept:
        path.write_text("mine")
    (folder / "chat_eval_sft_part.json").write_text("{}")
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert main(["reset"]) == 0
    assert sorted(folder.iterdir()) == sorted([*kept, folder / "start.json"])

    start = json.loads((folder / "start.json").read_text())
    assert abs(start["started_at"] - time.time()) < 60
    assert start["cpu_cores"] == os.cpu_count()
    assert start["memory_bytes"] > 2**28
    lines = unpadded_lines(generate(folder))
    assert f"| Python | {sys.version.split()[0]} |" in lines
    assert "| NPROC_PER_NODE | 8 |" in lines


def test_reset_since_removes_later_stages(folder):
    """Regression: an interrupted run, or one without RL, was shown beside later stages of the run before."""
    (folder / "start.json").write_text('{"started_at": 1}')
    assert main(["reset", "--since=base_eval"]) == 0
    assert {path.stem for path in folder.iterdir()} == {"start", *list(RESULTS)[:4]}
    assert json.loads((folder / "start.json").read_text()) == {"started_at": 1}
    main(["reset", "--since=base_train"])  # was finished: a new run starts
    assert {path.stem for path in folder.iterdir()} == {"start", "tok_train", "tok_eval"}
    started = json.loads((folder / "start.json").read_text())["started_at"]
    assert started > 1
    main(["reset", "--since=base_train"])  # was interrupted: the run continues
    assert json.loads((folder / "start.json").read_text())["started_at"] == started


def test_default_rent_counts_the_gpus(folder):
    """Regression: it was $24 an hour on a laptop, too."""
    argv = ["generate"]
    for gpus, price in (([], "$0.00"), ([{"name": "H100"}] * 8, "$24.00"), ("junk", "$0.00")):
        (folder / "start.json").write_text(json.dumps({"gpus": gpus}))
        main(argv)
        assert f"at {price}/h" in (folder / "report.md").read_text()


def test_environment_without_git_or_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    environment = report.environment()
    assert (environment["commit"], environment["dirty"]) == (None, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--dollars-per-hour=-1"], "dollars_per_hour=-1.0 must be finite and at least 0"),
        (["generate", "--dollars-per-hour=nan"], "dollars_per_hour=nan must be finite and at least 0"),
        (["plot"], "plot needs at least one run"),
        (["plot", "a", "--out=b.gif"], r"out='b\.gif' must end in"),
        (
            ["plot", "a", "--out=/nowhere/b.png"],
            r"out='/nowhere/b\.png': create folder /nowhere first",
        ),
        (["reset", "--since=download"], "since='download' must be one of tok_train, "),
        (["draw"], r"draw.*\(see --help\)"),
    ],
)
def test_bad_arguments(argv, message):
    with pytest.raises(ValueError, match=message):
        main(argv)
