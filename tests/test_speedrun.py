"""What speedrun.sh decides: flags for this machine, what it refuses, and what a second start runs again."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat.dataset import HUB_TEXTS
from nanochat.recipes import RECIPES
from tests.test_readme import module_and_arguments, read_flags

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case $1 in
    -c) [[ $2 != *wandb* ]] || exit "${NO_WANDB:-0}"; echo "$MACHINE" ;;
    -m)
        while [ "$1" != -m ] || [[ $2 == torch.* ]]; do shift; done
        [ "${2#*.}" != "${CUT:-}" ] || { echo "$LAST_WORDS"; exit 1; }
        [ "${2#*.}" != "${SKIPPED:-}" ] || echo "${2#*.}: CORE is skipped: cannot download it"
        echo "${2#*.}: done"
        [ -z "${AFTER:-}" ] || echo "$AFTER" ;;
esac
"""
MACHINES = {  # number of GPUs, their GiB, and whether they compute in 8 bits
    "no GPU": "0 0 False",
    "one of 24 GiB": "1 23 False",
    "eight of 80 GiB": "8 79 True",
    "six of 80 GiB": "6 79 True",
}
TRAINING = ("base_train", "mid_train", "chat_sft")
TEXT_STAGES = ("doctor", "tok_train", "tok_eval", "base_train", "base_loss")


@pytest.fixture
def speedrun(tmp_path):
    """The script with a Python that only logs its arguments; returns the exit status and the scripts run."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "setup.sh").write_text("touch set-up\n")
    for name in ("speedrun.sh", "dev/stage.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def start(*arguments, machine="no GPU", **settings):
        calls.unlink(missing_ok=True)
        environment = {**os.environ, **settings, "CALLS": str(calls), "MACHINE": MACHINES[machine]}
        done = subprocess.run(["bash", "speedrun.sh", *arguments], cwd=tmp_path, env=environment)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, [shlex.split(line) for line in lines if "scripts." in line]

    return start


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("setting", ["", "DEPTH=8", "DEVICE_BATCH_SIZE=4", "DATA=PATH"])
def test_gives_flags_that_are_read(machine, setting, speedrun):
    status, calls = speedrun(machine=machine, **dict([setting.split("=")] if setting else []))
    assert status == 0
    for words in calls:
        read_flags(*module_and_arguments(words))
    assert len(calls) >= 8


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("data", ["hub", "hub:climbmix", "embedded", "PATH"])
@pytest.mark.parametrize("more", [{}, {"NPROC_PER_NODE": "4"}, {"DEVICE_BATCH_SIZE": "4"}])
def test_gives_batches_that_divide(machine, data, more, speedrun):
    """DATA=embedded on four or more GPUs or ranks failed before or after pretraining."""
    status, calls = speedrun(machine=machine, DATA=data, **more)
    assert status == 0
    for words in calls:
        module, arguments = module_and_arguments(words)
        stage = module.removeprefix("scripts.")
        if stage not in TRAINING:
            continue
        n_ranks = next((int(w.partition("=")[2]) for w in words if w.startswith("--nproc_per_node")), 1)
        config = read_flags(module, arguments)
        if stage == "chat_sft":
            n_rows = config.conversations_per_step
        else:
            seq_len = config.max_seq_len if config.max_seq_len > 0 else 2048
            n_rows = config.total_batch_size // seq_len
        assert n_rows % (n_ranks * max(1, config.device_batch_size)) == 0, (stage, n_ranks, config)
        is_chat_of_embedded = not data.startswith("hub") and stage == "mid_train"
        assert not is_chat_of_embedded or config.total_batch_size == 4096  # else two steps are all there are


@pytest.mark.parametrize(("data", "exact"), [("hub", False), ("embedded", True), ("PATH", True)])
def test_rl_is_the_published_one_on_the_data_of_the_hub(data, exact, speedrun):
    status, calls = speedrun(machine="one of 24 GiB", DATA=data, RL="1")
    assert status == 0
    (rl,) = (words for words in calls if "scripts.chat_rl" in words)
    config = read_flags(*module_and_arguments(rl))
    assert (config.top_k, config.scale_lr_by_contrast) == ((0, True) if exact else (50, False))


def test_8_bits_are_for_pretraining_on_cards_that_have_them(speedrun, capfd):
    """On other cards it would fail after download and tokenizer."""
    assert speedrun(FP8="1", machine="one of 24 GiB") == speedrun(FP8="1") == (1, [])
    assert "FP8=1 needs Hopper GPUs" in capfd.readouterr().err
    status, calls = speedrun(FP8="1", machine="eight of 80 GiB")
    assert status == 0
    in_8_bits = [module_and_arguments(words) for words in calls if "--fp8" in words]
    assert [module for module, _ in in_8_bits] == ["scripts.base_train"]
    assert read_flags(*in_8_bits[0]).fp8


def test_resumes_only_its_own_checkpoints(speedrun):
    """A stage that was cut off before it had deleted older checkpoints resumed from those."""
    cut = {"CUT": "mid_train", "LAST_WORDS": "step 00000 | validation bpb 3.1"}
    saved = {**cut, "LAST_WORDS": "step 00040 | saved to there"}
    found = []
    for arguments, settings in (([], {}), (["--fresh"], cut), ([], cut), ([], saved), ([], cut), ([], {})):
        status, calls = speedrun(*arguments, **settings)
        found += [(status, words[-1]) for words in calls if "scripts.mid_train" in words]
    resume, overwrite = "--resume", "--overwrite"
    assert found == [(0, overwrite), *3 * [(1, overwrite)], (1, resume), (0, resume)]


def test_does_not_pass_over_another_seed(speedrun, capfd):
    """A finished stage would not be trained again, and the seed would have no effect."""
    assert speedrun(SEED="7")[0] == 0
    assert speedrun(SEED="8") == (1, [])
    assert "SEED=7" in capfd.readouterr().err
    assert speedrun(SEED="7")[0] == 0
    status, calls = speedrun("--fresh", SEED="8")
    assert status == 0
    assert any("--seed=8" in words for words in calls)


def test_does_not_pass_over_another_precision(speedrun, capfd):
    """Pretraining resumed at its last step and did nothing, and all later stages ran again."""
    assert speedrun(FP8="1", machine="eight of 80 GiB", CUT="tok_train")[0] == 1  # before that it can change
    assert speedrun(machine="eight of 80 GiB")[0] == 0
    assert speedrun(FP8="1", machine="eight of 80 GiB") == (1, [])
    assert "FP8=1, but the run in" in capfd.readouterr().err
    assert speedrun("--fresh", FP8="1", machine="eight of 80 GiB")[0] == 0
    assert speedrun(machine="eight of 80 GiB") == (1, [])


def test_the_recipe_is_that_of_pretraining(speedrun, capfd):
    """All stages after it follow their checkpoint, so a run cannot change its recipe half-way."""
    status, calls = speedrun(RECIPE="saint_iberis_2")
    assert status == 0
    flag = "--recipe=saint_iberis_2"
    given = [module_and_arguments(words) for words in calls if flag in words]
    assert [module for module, _ in given] == ["scripts.doctor", "scripts.base_train"]
    for module, arguments in given:
        assert read_flags(module, arguments).recipe == "saint_iberis_2"
    assert read_flags(*given[1]).optimizer.normuon
    assert len(speedrun(RECIPE="saint_iberis_2")[1]) == 1  # the doctor: all else is done
    assert speedrun() == (1, [])
    assert "RECIPE=saint_iberis, but the run in" in capfd.readouterr().err
    status, calls = speedrun("--fresh")
    assert status == 0
    assert not any(flag in words for words in calls)


def texts_of(calls):
    """Return the values of --data: of the stages that read text, and of those with conversations."""
    found = [(module_and_arguments(words)[0], word) for words in calls for word in words if "--data=" in word]
    texts = {word for module, word in found if module.split(".")[1] in TEXT_STAGES}
    chats = {word for module, word in found if module.split(".")[1] not in TEXT_STAGES}
    return texts, chats


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({}, "hub:fineweb"),
        ({"DATA": "hub"}, "hub:fineweb"),
        ({"DATA": "hub:climbmix"}, "hub:climbmix"),
        ({"RECIPE": "saint_iberis_2"}, "hub:climbmix"),
        ({"RECIPE": "saint_iberis_2", "DATA": "hub"}, "hub:climbmix"),
        ({"RECIPE": "saint_iberis_2", "DATA": "hub:fineweb"}, "hub:fineweb"),
    ],
)
def test_all_stages_read_the_same_text(settings, data, speedrun, tmp_path):
    status, calls = speedrun(machine="eight of 80 GiB", RL="1", **settings)
    assert status == 0
    flags = {f"--data={data}"}
    assert texts_of(calls) == (flags, flags)
    modules = {module_and_arguments(words)[0].split(".")[1] for words in calls}
    assert modules >= {*TEXT_STAGES, *TRAINING, "chat_eval", "chat_rl"}
    for words in calls:
        module, arguments = module_and_arguments(words)
        assert getattr(read_flags(module, arguments), "data", data) == data, module
    lines = (tmp_path / "calls").read_text().splitlines()
    (line,) = (line for line in lines if "nanochat.dataset" in line)
    assert line.endswith(f"--data={data}")


def test_names_of_texts_are_those_of_the_recipes(speedrun, capfd):
    """The script cannot ask for them: it must run before there is a Python."""
    for recipe in RECIPES:
        status, calls = speedrun("--fresh", machine="eight of 80 GiB", RECIPE=recipe.name)
        assert (status, texts_of(calls)[0]) == (0, {f"--data={recipe.text.data}"})
    for text in HUB_TEXTS:
        n_shards = {"DATA": text.data, "SHARDS": str(text.n_train_shards + 1)}
        assert speedrun("--fresh", machine="eight of 80 GiB", **n_shards) == (1, [])
        message = f"must be at most {text.n_train_shards}, the shards of {text.data}"
        assert message in capfd.readouterr().err
        n_shards["SHARDS"] = str(text.n_train_shards)
        assert speedrun("--fresh", machine="eight of 80 GiB", **n_shards)[0] == 0
    assert speedrun("--fresh", DATA="hub:pile") == (1, [])
    assert "DATA=hub:pile is no text of the hub; choose hub:fineweb or" in capfd.readouterr().err


@pytest.mark.parametrize("setting", ["RL=yes", "RL=2", "FP8=yes", "FP8=2", "DATA=auto"])
def test_does_not_guess_what_a_setting_means(setting, speedrun, capfd):
    """RL=yes was off, FP8=no was on, and DATA=auto a path."""
    name, value = setting.split("=")
    assert speedrun(**{name: value}, machine="eight of 80 GiB") == (1, [])
    assert f"{setting} must be " in capfd.readouterr().err


def test_the_report_is_of_one_run(speedrun, tmp_path):
    """The report of a deeper model, without RL or cut off, also held results of the run before."""
    start = Path(os.environ["NANOCHAT_BASE_DIR"]) / "report" / "start.json"
    start.parent.mkdir(parents=True)
    start.touch()

    def before_training(**settings):
        speedrun(**settings)
        lines = (tmp_path / "calls").read_text().splitlines()
        assert sum(" reset" in line for line in lines) <= 1
        return [line.partition("reset --since=")[2] for line in lines if " reset" in line]

    cut = {"CUT": "mid_train", "LAST_WORDS": "step 00000"}
    assert before_training() == ["tok_train"]
    assert before_training() == []
    assert before_training(DEPTH="6", RL="0", **cut) == ["base_train"]
    assert before_training(DEPTH="6", RL="0") == ["mid_train"]
    assert before_training(DEPTH="6") == ["chat_rl"]


def test_takes_as_many_ranks_as_batches_divide_by(speedrun, capfd):
    """With six GPUs it failed after download and tokenizer: 524,288 tokens do not divide by six."""
    status, calls = speedrun(machine="six of 80 GiB")
    assert status == 0
    assert {word for words in calls for word in words if "nproc_per_node" in word} == {"--nproc_per_node=4"}
    assert speedrun(machine="six of 80 GiB", NPROC_PER_NODE="3") == (1, [])
    assert "NPROC_PER_NODE=3 must be 1, 2, 4 or 8" in capfd.readouterr().err


def test_looks_for_wandb_before_it_needs_it(speedrun, capfd):
    """It failed after download and tokenizer, and `pip`, which .venv lacks, installed it elsewhere."""
    assert speedrun(WANDB_RUN="mine", NO_WANDB="1") == (1, [])
    assert "uv pip install --python .venv wandb" in capfd.readouterr().err
    status, calls = speedrun(WANDB_RUN="mine")
    assert status == 0
    assert any("--run=mine-base" in words for words in calls)


def test_looks_for_the_core_bundle_before_it_needs_it(speedrun, tmp_path, capfd):
    assert speedrun(CORE_BUNDLE=str(tmp_path)) == (1, [])
    assert "is no folder with a core.yaml" in capfd.readouterr().err
    (tmp_path / "core.yaml").touch()
    for bundle, flag in ((str(tmp_path), "--bundle"), ("https://there/it.zip", "--bundle-url")):
        status, calls = speedrun(CORE_BUNDLE=bundle)
        assert status == 0
        assert any(f"{flag}={bundle}" in words for words in calls if "scripts.base_eval" in words)


def core_of(calls):
    """Return the arguments of base_eval, and the settings that they parse to."""
    found = [module_and_arguments(words) for words in calls if "scripts.base_eval" in words]
    return [(arguments, read_flags(module, arguments)) for module, arguments in found]


def test_gpus_measure_core_unless_told_not_to(speedrun):
    """Without CORE_BUNDLE it was measured nowhere, though the address of the bundle is known."""
    ((_, config),) = core_of(speedrun(machine="one of 24 GiB")[1])
    assert (config.bundle, config.bundle_url, config.protocol) == ("", "", "nanochat")
    assert core_of(speedrun("--fresh", machine="one of 24 GiB", CORE_BUNDLE="none")[1]) == []
    assert core_of(speedrun("--fresh")[1]) == []
    ((arguments, _),) = core_of(speedrun(CORE_BUNDLE="https://there/it.zip")[1])
    assert "--bundle-url=https://there/it.zip" in arguments


def test_a_skipped_core_is_tried_again_and_nothing_else(speedrun, tmp_path):
    """All stages after it would train again."""
    status, calls = speedrun(machine="one of 24 GiB", SKIPPED="base_eval")
    assert (status, len(core_of(calls))) == (0, 1)
    for settings, n_runs in (
        ({"SKIPPED": "base_eval"}, 1),
        ({}, 1),
        ({}, 0),
        ({"CORE_BUNDLE": "file://x"}, 1),
    ):
        status, calls = speedrun(machine="one of 24 GiB", **settings)
        names = [module_and_arguments(words)[0] for words in calls]
        assert (status, names) == (0, ["scripts.doctor", *n_runs * ["scripts.base_eval"]])
        assert "--since" not in (tmp_path / "calls").read_text()


REHEARSAL = {"STEPS": "3", "EVAL_ITEMS": "5", "CORE_BUNDLE": "https://there/it.zip", "RL": "1"}
SHORT = {  # the settings that shorten each stage
    "scripts.base_train": {"num_iterations": 3, "core_max_per_task": 5},
    "scripts.base_loss": {},
    "scripts.base_eval": {"max_per_task": 5},
    "scripts.mid_train": {"num_iterations": 3, "val_conversations": 5},
    "scripts.chat_sft": {"num_iterations": 3, "val_conversations": 5},
    "scripts.chat_rl": {"num_steps": 3, "eval_examples": 5},
    "scripts.chat_eval": {"max_problems": 5},
}


@pytest.mark.parametrize(("machine", "row"), [("no GPU", 256), ("eight of 80 GiB", 2048)])
def test_a_rehearsal_is_short(machine, row, speedrun, tmp_path):
    status, calls = speedrun(machine=machine, **REHEARSAL)
    assert status == 0
    configs = [(call[0], read_flags(*call)) for call in map(module_and_arguments, calls)]
    for module, config in configs:
        short = SHORT.get(module, {})
        assert {name: getattr(config, name) for name in short} == short
        for tokens in ("eval_tokens", "split_tokens"):
            assert getattr(config, tokens, -1) in (5 * row, -1)  # -1: of midtraining, of few conversations
    assert {module for module, _ in configs} >= set(SHORT)


def test_a_rehearsal_downloads_few_shards(speedrun, tmp_path):
    assert speedrun(machine="eight of 80 GiB", SHARDS="2")[0] == 0
    (line,) = (line for line in (tmp_path / "calls").read_text().splitlines() if "nanochat.dataset" in line)
    assert line.endswith("-n 2 -w 4 --data=hub:fineweb")


def trained(calls):
    """Return for each training stage that ran whether it replaced or resumed its checkpoints."""
    modules = {f"scripts.{stage}": stage for stage in (*TRAINING, "chat_rl")}
    return {
        modules[module]: arguments[-1]
        for module, arguments in map(module_and_arguments, calls)
        if module in modules
    }


def test_other_steps_train_from_the_start(speedrun):
    """A run after a rehearsal would continue from its checkpoints, whose learning rates had fallen to 0."""
    everything = dict.fromkeys((*TRAINING, "chat_rl"), "--overwrite")
    saved = {"AFTER": "step 00004 | saved to there"}
    cut = {"CUT": "base_train", "LAST_WORDS": "step 00001"}
    assert trained(speedrun(STEPS="3", **saved)[1]) == everything
    assert trained(speedrun(STEPS="3", **saved)[1]) == {}
    assert trained(speedrun(STEPS="4", **cut, **saved)[1]) == {"base_train": "--overwrite"}
    assert trained(speedrun(STEPS="4", **saved)[1]) == everything  # it had not saved
    assert trained(speedrun(**saved)[1]) == everything
    assert trained(speedrun(**saved)[1]) == {}


def test_other_evaluations_do_not_train_the_base_model_again(speedrun):
    assert speedrun(AFTER="step 00080 | saved to there")[0] == 0
    stages = trained(speedrun(EVAL_ITEMS="5")[1])
    assert stages == {
        "base_train": "--resume",
        **dict.fromkeys(("mid_train", "chat_sft", "chat_rl"), "--overwrite"),
    }
    assert trained(speedrun(EVAL_ITEMS="5")[1]) == {}


@pytest.mark.parametrize("setting", ["SHARDS", "PYTHON"])
def test_another_tokenizer_is_learned_for_other(setting, speedrun, tmp_path):
    """The tokenizer of a rehearsal, learned from few shards, would be that of the run after it."""
    python = tmp_path / "python"
    shutil.copy(tmp_path / ".venv" / "bin" / "python", python)
    values = {"SHARDS": "2", "PYTHON": str(python)}
    assert speedrun(machine="one of 24 GiB")[0] == 0
    status, calls = speedrun(machine="one of 24 GiB", **{setting: values[setting]})
    assert (status, module_and_arguments(calls[1])[0]) == (0, "scripts.tok_train")
    assert trained(calls)["base_train"] == "--overwrite"
    assert len(speedrun(machine="one of 24 GiB", **{setting: values[setting]})[1]) == 1  # the doctor


def test_a_ready_interpreter_needs_no_set_up(speedrun, tmp_path, capfd):
    assert speedrun(PYTHON=".venv/bin/python")[0] == 0
    assert not (tmp_path / "set-up").exists()
    assert len(speedrun()[1]) == 1  # the same interpreter: nothing is done but set-up and the doctor
    assert (tmp_path / "set-up").exists()
    for python in ("/no/such/python", "false"):
        assert speedrun(PYTHON=python) == (1, [])
        assert f"PYTHON={python} must be an interpreter that can import nanochat" in capfd.readouterr().err
    assert speedrun(PYTHON=".venv/bin/python", WANDB_RUN="mine", NO_WANDB="1") == (1, [])
    assert "uv pip install --python .venv/bin/python wandb" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["STEPS", "SHARDS", "EVAL_ITEMS"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "ten", "08", "4 --resume"])
def test_a_length_that_is_none(name, value, speedrun, capfd):
    assert speedrun(**{name: value}, machine="eight of 80 GiB") == (1, [])
    assert f"{name}={value} must be a whole number above 0" in capfd.readouterr().err


def test_shards_are_those_of_the_hub(speedrun, capfd):
    assert speedrun(SHARDS="2") == (1, [])
    assert "SHARDS=2 is for DATA=hub, and the data is embedded" in capfd.readouterr().err
    for n_shards in ("1823", "1" + 30 * "0"):
        assert speedrun(SHARDS=n_shards, machine="eight of 80 GiB") == (1, [])
        assert f"SHARDS={n_shards} must be at most 1822" in capfd.readouterr().err


def test_is_not_misled_by_what_libraries_print_at_the_end(speedrun):
    """With NCCL_DEBUG=INFO, as some clouds set it, NCCL prints last: a stage never counted as done."""
    assert speedrun(AFTER="host:1:2 [0] NCCL INFO comm 0x5 rank 0 - Destroy COMPLETE")[0] == 0
