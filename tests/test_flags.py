"""Flags that users of nanochat type: each means what our own name does; unknown ones are refused."""

import pytest

from nanochat.command_line import parse
from nanochat.dataset import DatasetConfig
from nanochat.report.__main__ import Generate, ReportConfig
from nanochat.train.base import BaseTrainConfig
from scripts.base_loss import BaseLossConfig
from scripts.chat_eval import ChatEvalConfig
from scripts.chat_rl import ChatRLConfig
from scripts.chat_sft import ChatSFTConfig
from scripts.mid_train import MidTrainConfig

CADENCES = ("eval-every", "sample-every", "save-every", "log-every")


@pytest.mark.parametrize(
    ("config_class", "alias", "own", "value"),
    [
        (ChatEvalConfig, "task-name", "task-names", "ARC-Easy|GSM8K"),
        (DatasetConfig, "num-files", "num-shards", "3"),
        (DatasetConfig, "num-files", "num-shards", "-1"),
        (BaseTrainConfig, "core-metric-every", "core-every", "7"),
        (BaseTrainConfig, "core-metric-every", "core-every", "-1"),
        (BaseTrainConfig, "core-metric-max-per-task", "core-max-per-task", "5"),
        (BaseLossConfig, "model-step", "step", "12"),
        (ChatSFTConfig, "target-examples-per-step", "conversations-per-step", "8"),
    ],
)
def test_an_alias_is_another_spelling_of_a_setting(config_class, alias, own, value):
    expected = parse(config_class, [f"--{own}={value}"])
    assert vars(expected)[own.replace("-", "_")] in (value, int(value) if value.lstrip("-").isdigit() else "")
    for name in (alias, alias.replace("-", "_")):
        assert parse(config_class, [f"--{name}={value}"]) == expected
        assert parse(config_class, [f"--{name}", value]) == expected


@pytest.mark.parametrize("config_class", [BaseTrainConfig, MidTrainConfig, ChatSFTConfig, ChatRLConfig])
@pytest.mark.parametrize("flag", CADENCES)
def test_minus_one_turns_an_interval_off(config_class, flag):
    name = flag.replace("-", "_")
    assert getattr(parse(config_class, [f"--{name}=-1"]).cadence, name) == -1
    with pytest.raises(ValueError, match=f"{name}=-2 must be a number of steps, or 0 or -1 for off"):
        parse(config_class, [f"--{flag}=-2"])


def test_a_report_without_a_command_is_generated():
    assert parse(ReportConfig, []).command == Generate()


@pytest.mark.parametrize(
    ("config_class", "flags", "message"),
    [
        (BaseTrainConfig, ["--depht=3"], "Unrecognized options: --depht=3; did you mean --depth[?]"),
        (BaseTrainConfig, ["--evl_every", "3"], "did you mean --eval-every[?]"),
        (ChatSFTConfig, ["--num-epoch=2", "--init-lr-fra=1"], "mean --init-lr-frac or --num-epochs[?]"),
        (ChatEvalConfig, ["--max-problem=4"], "did you mean --max-problems[?]"),
        (BaseTrainConfig, ["--xyz=3"], r"^Unrecognized options: --xyz=3 \(see --help\)$"),
    ],
)
def test_an_unknown_flag_names_the_nearest(config_class, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(config_class, flags)
