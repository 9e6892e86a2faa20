import json
import logging
import math
import os
import sys
import time

import pytest
from matplotlib.image import imread

from nanochat import report
from nanochat.report import plots as report_plots
from nanochat.report.__main__ import main
from nanochat.report.markdown import duration, fence, table
from nanochat.report.text import PICTURES, STAGES, render, rewards_table, summary, wall_clock

TASKS = {
    "ARC-Easy": {"accuracy": 0.38, "standard_error": 0.01, "n": 2376, "chance": 0.25},
    "GSM8K": {"accuracy": 0.0341, "standard_error": 0.005, "n": 1319, "chance": 0},
}
RESULTS = {
    "tok_train": {"config": {"vocab_size": 65536}, "vocab_size": 65536, "token_bytes": {"mean": 6.625}},
    "tok_eval": {
        "vocab_size": {"ours": 65536, "gpt2": 50257},
        "texts": {"news": {"bytes": 1819, "bytes_per_token": {"ours": 4.0, "gpt2": 4.5}}},
    },
    "base_train": {
        "settings": {"depth": 20},
        "parameters": {"total": 542_035_200},
        "train_seconds": 9000.0,
        "median_mfu": None,
        "peak_memory_bytes": 3 << 29,
        "val_bpb": 0.8287,
        "wall_seconds": 9300.0,
        "finished_at": 10_000.0,
    },
    "base_loss": {"bpb": {"train": 0.81, "val": 0.8287}, "samples": ["The capital of France is Paris."]},
    "base_eval": {
        "core": 0.1796,
        "tasks": {"squad": {"accuracy": 0.4, "centered": 0.2, "n": 500, "random_baseline": 25.0}},
        "missing_tasks": ["coqa", "lambada"],
        "wall_seconds": 300,
    },
    "chat_eval_mid": {"tasks": TASKS, "chatcore": 0.2348, "chatcore_without_spellingbee": 0.11},
    "chat_eval_sft": {"tasks": {"ARC-Easy": {"accuracy": 0.3864, "n": 400}}, "wall_seconds": 2100},
}


@pytest.fixture
def folder(base_dir):
    """report/ with the results of a run that was never finished."""
    (base_dir / "report").mkdir(parents=True)
    for stage, result in RESULTS.items():
        (base_dir / "report" / f"{stage}.json").write_text(json.dumps(result))
    return base_dir / "report"


def generated(folder, *flags):
    assert main(["generate", *(flags or ["--dollars-per-hour=24"])]) == 0
    return (folder / "report.md").read_text(encoding="utf-8")


def lines_of(text):
    """The lines, with the padding of tables taken out."""
    return [" ".join(line.split()) for line in text.splitlines()]


def write_metrics(path, n_steps=40, evals=(0, 20, 40)):
    steps = [
        {"step": i, "loss": 5.0, "smooth_loss": 9 / (i + 1), "tokens_per_second": 900 + i, "train_seconds": i}
        for i in range(n_steps)
    ]
    evals = [{"step": i, "val_bpb": 2 - i / 99, "train_seconds": float(i)} for i in evals]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in steps + evals))
    return str(path)


def assert_is_a_picture(path):
    assert path.stat().st_size < 200_000
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.02  # a blank one has 0


def test_summary_has_a_row_a_metric_and_a_column_a_stage(folder):
    lines = lines_of(generated(folder))
    start = lines.index("| Metric | Chance | n | BASE | MID | SFT | RL |")
    assert lines[start + 2 : start + 7] == [
        "| CORE | - | - | 0.1796 | - | - | - |",
        "| ARC-Easy | 0.2500 | 2,376 / 400 | - | 0.3800 +- 0.0100 | 0.3864 | - |",
        "| GSM8K | 0.0000 | 1,319 | - | 0.0341 +- 0.0050 | - | - |",
        "| ChatCORE | - | - | - | 0.2348 | - | - |",
        "| ChatCORE without SpellingBee | - | - | - | 0.1100 | - | - |",
    ]


def test_sections_of_stages(folder):
    text = generated(folder)
    for line in (
        "| bytes of a token, mean | 6.62 |",
        "| vocabulary | | 65,536 | 50,257 |",
        "| news | 1,819 | 4.00 | 4.50 (+12.5%) |",
        "| parameters | 542,035,200 |",
        "| time of training | 2h30m |",
        "| MFU (median) | - |",
        "| peak memory of a device | 1.5 GiB |",
        "| validation bits per byte, last | 0.8287 |",
        "| squad | 0.4000 | 0.2500 | 0.2000 | 500 |",
        "Not evaluated, so this CORE compares with no other: coqa, lambada.",
        "The capital of France is Paris.",
    ):
        assert line in lines_of(text)
    folded = '<details><summary>settings</summary>\n\n```json\n{\n  "depth": 20\n}\n```\n\n</details>'
    assert folded in text
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Summary", "Environment", "Wall clock and cost", *RESULTS]


def test_wall_clock_and_cost(folder):
    """9,300 + 300 + 2,100 s = 3 h 15 min, at $24 an hour 62 + 2 + 14 = $78."""
    lines = lines_of(generated(folder))
    for line in (
        "| base_train | 1970-01-01 02:46 UTC | 2h35m | $62.00 |",
        "| base_eval | - | 5m00s | $2.00 |",
        "| base_loss | - | - | - |",
        "| chat_eval_sft | - | 35m00s | $14.00 |",
        "| chat_rl | - | not run | - |",
        "| total | | 3h15m | $78.00 |",
    ):
        assert line in lines
    assert "| total | | 3h15m | $9.75 |" in lines_of(generated(folder, "--dollars-per-hour=3"))


def test_time_from_the_start_to_the_last_result(folder):
    (folder / "start.json").write_text('{"started_at": 2800}')
    expected = "From the start to the last result: 2h00m, $48.00, set-up, downloads and pauses included."
    assert expected in generated(folder).splitlines()
    (folder / "start.json").write_text('{"started_at": 99999}')  # results are older: of another run
    assert "last result" not in generated(folder)


def test_card_ends_with_the_result(folder, caplog):
    caplog.set_level(logging.INFO)
    generated(folder)
    assert "| CORE " in caplog.text
    assert "\nchat_rl: not run\n" in caplog.text
    assert caplog.messages[-1] == f"report: 7 of 11 stages, 3h15m, $78.00; {folder / 'report.md'}"


def test_nothing_was_run(base_dir):
    text = generated(base_dir / "report")
    for stage in STAGES:
        assert f"| {stage} | - | not run | - |" in lines_of(text)
    assert "reset: not run" in text
    assert os.listdir(base_dir / "report") == ["report.md"]


@pytest.mark.parametrize("damage", [b'{"steps": 1', b"\xff\xfe", b"[1, 2]", b""])
def test_damaged_results_are_told(folder, caplog, damage):
    caplog.set_level(logging.INFO)
    (folder / "base_train.json").write_bytes(damage)
    text = generated(folder)
    assert "| base_train | - | damaged file (" in "\n".join(lines_of(text))
    assert "base_train: damaged file (" in caplog.text
    assert "## base_train" not in text
    assert "## base_loss" in text


JUNK = [None, 7, "x", [1], {"a": 1}, {"a": {"b": None}}, math.nan, math.inf, True, -1, 1e18, 10**400]


@pytest.mark.parametrize("junk", JUNK)
def test_no_field_is_taken_for_granted(folder, junk):
    fields = (
        "settings config hardware model parameters steps tokens train_seconds val_bpb metrics samples bpb"
    )
    fields += " tasks core missing_tasks chatcore wall_seconds finished_at vocab_size texts seconds gpus cpu"
    fields += " started_at first_reward token_bytes median_mfu memory_bytes"
    for stage in ("start", *STAGES):
        (folder / f"{stage}.json").write_text(json.dumps(dict.fromkeys(fields.split(), junk)))
    text = generated(folder)
    for stage in STAGES:
        assert f"## {stage}\n" in text


def test_no_number_is_taken_for_granted(folder):
    """A negative standard error ended the report."""
    for junk in (number for number in JUNK if isinstance(number, (int, float))):
        task = {"accuracy": junk, "standard_error": junk, "n": junk, "chance": junk}
        (folder / "chat_eval_mid.json").write_text(json.dumps({"tasks": {"a": task}}))
        assert "| a " in generated(folder)


def test_text_of_a_model_cannot_break_the_report():
    text = "```\n</details>\n| a |\n# Title\n````` \x1b[31m\r\ud800\u3000" + "word " * 50
    rendered = render({"base_loss": {"samples": [text]}}, dict.fromkeys(("start", *STAGES), "not run"), [], 1)
    quoted = rendered.split("``````")[1]  # a fence longer than the longest run of backticks in it
    assert quoted.startswith(
        "text\n```\n</details>\n| a |\n# Title\n````` \\x1b[31m\\r\\ud800\u3000word word"
    )
    assert max(map(len, quoted.splitlines())) <= 100 + 3 * 5  # three characters are spelt out
    rendered.encode()
    assert fence("a") == "```text\na\n```"


def test_names_cannot_break_a_table():
    text = summary({"chat_eval_mid": {"tasks": {"a|b\n<b>`": {"accuracy": 0.5}}}})
    assert "| a\\|b \\<b>\\` " in text
    assert table(("x", "y"), [("long", "1")]) == "| x    | y |\n|------|--:|\n| long | 1 |"


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 11_700)] == [
        "0m00s",
        "1m00s",
        "59m59s",
        "1h00m",
        "3h15m",
    ]


def test_a_stage_without_a_time_costs_nothing():
    lines = lines_of(wall_clock({"tok_train": {}, "tok_eval": {"wall_seconds": math.nan}}, {}, 24.0))
    assert {"| tok_train | - | - | - |", "| tok_eval | - | - | - |"} < set(lines)
    assert lines[-1] == "| total | | 0m00s | $0.00 |"


def test_pictures(folder, tmp_path):
    for stage in ("base_train", "mid_train", "chat_sft"):
        metrics = write_metrics(tmp_path / f"{stage}.jsonl")
        (folder / f"{stage}.json").write_text(json.dumps({"metrics": metrics}))
    with open(tmp_path / "base_train.jsonl", "a") as file:
        file.write('{"step": 20, "core": 0.1}\n')
    rewards = "".join(json.dumps({"step": i, "reward": i % 5 / 9}) + "\n" for i in range(30))
    (tmp_path / "rl.jsonl").write_text(rewards)
    (folder / "chat_rl.json").write_text(json.dumps({"metrics": str(tmp_path / "rl.jsonl")}))
    text = generated(folder)
    for name, title in PICTURES.items():
        assert f"![{title}]({name})" in text.splitlines()
        assert_is_a_picture(folder / name)

    (folder / "chat_rl.json").unlink()
    (tmp_path / "base_train.jsonl").unlink()
    assert "reward.png" not in generated(folder)
    assert not (folder / "reward.png").exists()


def test_core_on_the_way():
    records = [{"step": 2, "loss": 1.0}, {"step": 2, "core": 0.1}, {"step": 4, "core": 0.2}]
    way, end = report_plots.core(records, {"step": 5, "core": 0.25}).axes[0].lines
    assert [[*line.get_xydata().ravel()] for line in (way, end)] == [[2, 0.1, 4, 0.2], [5, 0.25]]
    assert len(report_plots.core(records, {}).axes[0].lines[1].get_xdata()) == 0
    assert report_plots.core(records[:1], {"step": 5, "core": 0.25}) is None


def test_rewards_of_several_tasks(tmp_path):
    rewards = [{"A": 0.5, "B": 1.0}, {"A": 1.0}]
    records = [{"step": i, "reward": 0.75, "rewards": rewards[i % 2]} for i in range(4)]
    _, mean, *tasks = report_plots.reward(records, window=2).axes[0].lines
    assert [[*line.get_xdata()] for line in tasks] == [[0, 1, 2, 3], [0, 2]]
    assert [[*line.get_ydata()] for line in tasks] == [[0.5, 0.75, 0.75, 0.75], [1.0, 1.0]]
    assert len({line.get_color() for line in (mean, *tasks)}) == 3
    assert [line.get_label() for line in (mean, *tasks)] == ["mean of 2 steps", "of these A", "of these B"]
    assert len(report_plots.reward([r | {"rewards": {"A": 1.0}} for r in records]).axes[0].lines) == 2

    of_tasks = {"A": {"first": 0.5, "last": 0.75}, "B": {"first": 1.0, "last": 1.0}}
    assert "| B | 1.0000 | 1.0000 |" in lines_of(rewards_table({"rewards": of_tasks}))
    assert rewards_table({"rewards": {"A": of_tasks["A"]}}) == rewards_table({}) == ""


def test_the_bars_are_the_accuracies():
    axis = report_plots.chat_tasks(RESULTS).axes[0]
    errors, groups = axis.containers[0::2], axis.containers[1::2]
    bars = {group.get_label(): [bar.get_height() for bar in group.patches] for group in groups}
    assert bars["MID"] == [0.38, 0.0341]
    assert bars["SFT"][0] == 0.3864
    assert math.isnan(bars["SFT"][1])
    assert errors[0].lines[2][0].get_segments()[0][:, 1] == pytest.approx([0.37, 0.39])
    assert [line[0, 1] for line in axis.collections[-1].get_segments()] == [0.25, 0]  # chance
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["ARC-Easy", "GSM8K"]


def test_the_view_is_not_spoilt_by_the_first_steps(tmp_path):
    records = report_plots.read_metrics(write_metrics(tmp_path / "m.jsonl"))
    loss_axis, bpb_axis = report_plots.losses({"BASE": records}).axes
    assert len(loss_axis.lines[0].get_ydata()) == 40
    assert 3 <= loss_axis.get_ylim()[1] < 5  # 9 at step 0, 3 after a twentieth
    assert list(bpb_axis.lines[0].get_xdata()) == [0, 20, 40]
    assert bpb_axis.get_ylim()[1] > 2  # three evaluations are too few to leave one out
    falling = [{"step": i, "smooth_loss": 1, "val_bpb": bpb} for i, bpb in enumerate((3, 1.3, 1.2, 1.1, 1))]
    assert report_plots.losses({"BASE": falling}).axes[1].get_ylim() == pytest.approx((0.982, 1.318))


def test_plot_compares_runs(tmp_path):
    write_metrics(tmp_path / "a.jsonl")
    write_metrics(tmp_path / "d4" / "metrics.jsonl")
    out = tmp_path / "curves.png"
    assert main(["plot", str(tmp_path / "a.jsonl"), str(tmp_path / "d4"), f"--out={out}"]) == 0
    assert_is_a_picture(out)
    write_metrics(tmp_path / "b.jsonl", n_steps=0)
    out.unlink()
    main(["plot", str(tmp_path / "b.jsonl"), f"--out={out}"])
    assert_is_a_picture(out)
    write_metrics(tmp_path / "b.jsonl", n_steps=0, evals=())
    with pytest.raises(ValueError, match=r"b\.jsonl has no steps and no evaluations"):
        main(["plot", str(tmp_path / "b.jsonl"), f"--out={out}"])


def test_a_name_is_no_formula(tmp_path):
    """Matplotlib could not read that of this run."""
    run = write_metrics(tmp_path / "$x^$" / "metrics.jsonl")
    assert main(["plot", run, f"--out={tmp_path / 'curves.png'}"]) == 0
    records = [{"step": i, "reward": 0.5, "rewards": {"$x^$": 1.0, "b": 0.0}} for i in range(3)]
    report_plots._save(report_plots.reward(records), tmp_path / "reward.png")


def test_the_panels_of_a_comparison(tmp_path, base_dir, monkeypatch):
    """By tag, with one colour a run; a run without evaluations is missing from their panel alone."""
    drawn = []
    monkeypatch.setattr(report_plots, "_save", lambda figure, path: drawn.append(figure))
    for stage in ("base", "chatsft"):
        write_metrics(base_dir / f"{stage}_checkpoints" / "d4" / "metrics.jsonl")
    write_metrics(tmp_path / "quick" / "metrics.jsonl", evals=())
    main(["plot", "d4", "sft/d4", str(tmp_path / "quick")])
    loss, bpb, speed = drawn[0].axes
    names = ["base_checkpoints/d4", "chatsft_checkpoints/d4", f"{tmp_path.name}/quick"]
    assert [line.get_label() for line in loss.lines] == [line.get_label() for line in speed.lines] == names
    assert [line.get_label() for line in bpb.lines] == names[:2]
    assert [line.get_color() for line in speed.lines] == ["C0", "C1", "C2"]
    assert [axis.get_title() for axis in drawn[0].axes] == [
        "training loss (nats a token)",
        "validation (bits per byte)",
        "tokens a second",
    ]
    assert [axis.get_xlabel() for axis in drawn[0].axes] == ["step", "seconds of training", "step"]
    assert list(bpb.lines[0].get_xdata()) == [0, 20, 40]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == names
    assert speed.get_ylim()[0] == 0
    main(["plot", str(tmp_path / "quick")])
    assert [line.get_label() for line in drawn[1].axes[0].lines] == ["quick"]


@pytest.mark.parametrize("run", ["d9", "sft/d4", "nowhere/d4", "d4/metrics.json"])
def test_a_run_that_is_nowhere(run, base_dir):
    write_metrics(base_dir / "base_checkpoints" / "d4" / "metrics.jsonl")
    with pytest.raises(
        FileNotFoundError, match=f"no metrics.jsonl for run '{run}': give the file, its folder"
    ):
        main(["plot", "d4", run])


def test_reset_removes_the_last_report_and_nothing_else(folder, monkeypatch):
    generated(folder)
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
    lines = lines_of(generated(folder))
    assert f"| Python | {sys.version.split()[0]} |" in lines
    assert "| NPROC_PER_NODE | 8 |" in lines


def test_what_is_done_again_leaves_the_report(folder):
    """A run of another depth, cut off or without RL, was shown beside stages of the last one."""
    (folder / "start.json").write_text('{"started_at": 1}')
    assert main(["reset", "--since=base_eval"]) == 0
    assert {path.stem for path in folder.iterdir()} == {"start", *list(RESULTS)[:4]}
    assert json.loads((folder / "start.json").read_text()) == {"started_at": 1}
    main(["reset", "--since=base_train"])  # had ended: this is another run
    assert {path.stem for path in folder.iterdir()} == {"start", "tok_train", "tok_eval"}
    started = json.loads((folder / "start.json").read_text())["started_at"]
    assert started > 1
    main(["reset", "--since=base_train"])  # was cut off: this is still that run
    assert json.loads((folder / "start.json").read_text())["started_at"] == started


def test_the_default_rent_is_that_of_the_gpus(folder):
    """It was $24 an hour on a laptop, too."""
    argv = ["generate"]
    for gpus, price in (([], "$0.00"), ([{"name": "H100"}] * 8, "$24.00"), ("junk", "$0.00")):
        (folder / "start.json").write_text(json.dumps({"gpus": gpus}))
        main(argv)
        assert f"at {price}/h" in (folder / "report.md").read_text()


def test_environment_without_git_or_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    found = report.environment()
    assert (found["commit"], found["dirty"]) == (None, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--dollars-per-hour=-1"], "dollars_per_hour=-1.0 must be 0 or more"),
        (["generate", "--dollars-per-hour=nan"], "dollars_per_hour=nan must be 0 or more"),
        (["plot"], "plot needs at least one run"),
        (["plot", "a", "--out=b.gif"], r"out='b\.gif' must end in"),
        (
            ["plot", "a", "--out=/nowhere/b.png"],
            r"out='/nowhere/b\.png': there is no folder /nowhere;",
        ),
        (["reset", "--since=download"], "since='download' must be one of tok_train, "),
        (["draw"], r"draw.*\(see --help\)"),
        ([], "reset, generate, plot"),
    ],
)
def test_bad_arguments(argv, message):
    with pytest.raises(ValueError, match=message):
        main(argv)
