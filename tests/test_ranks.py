"""Several ranks compute the same as one, and can resume a run that another number of ranks has saved."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_dir, delete_checkpoint, load_tensors, model_path
from tests.helpers import ranks
from tests.helpers.chats import untimed_records
from tests.helpers.core_bundles import write_bundle
from tests.helpers.kernels import error
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SECOND_GENERATION = ["--recipe=saint_iberis_2", "--value-embeds=True"]


assert_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)


def assert_same_run(stage, tag, other, assert_close=assert_close):
    """Compare the metrics of two runs, and by assert_close their final weights."""
    for one, two in zip(untimed_records(stage, tag), untimed_records(stage, other), strict=True):
        assert one.pop("grad_norm", 0) == pytest.approx(two.pop("grad_norm", 0), rel=1e-4)
        assert one == pytest.approx(two, rel=1e-5), (stage, one, two)
    one, two = (
        load_tensors(model_path(checkpoint_dir(stage, t), ranks.NUM_STEPS), "cpu") for t in (tag, other)
    )
    for name, weight in one.items():
        assert_close(weight, two[name])


def assert_near(weight, expected):
    """Require a small error of the whole tensor (at most 8e-5 was seen).

    At the rates of the second generation AdamW makes 1e-3 of a weight of rounding errors in small gradients.
    """
    assert error(weight, expected) < 5e-4


def copy_half(tag, new_tag):
    """Copy a base model's checkpoints but the last: the run is half-way."""
    new = checkpoint_dir("base", new_tag)
    shutil.copytree(checkpoint_dir("base", tag), new)
    delete_checkpoint(new, ranks.NUM_STEPS)
    return new_tag


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A folder with a text, and the base directory in which one rank has done all the work."""
    folder = tmp_path_factory.mktemp("one_rank")
    rng = random.Random(0)
    words = ["file", "list", "returns", "reads", "a", "the", "string", "of"]
    for i in range(40):
        text = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(10))
        (folder / f"{i:02d}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.setattr(ranks.stack, "BUCKET_BYTES", 0)
        for name in ("mid_tasks", "sft_tasks"):
            patch.setattr(ranks.recipes, name, None)
        train_tokenizer().save(folder / "base" / "tokenizer")
        (folder / "base" / "bundle").mkdir()
        write_bundle(folder / "base" / "bundle")
        ranks.work(str(folder / "*.txt"), "of1", "")
        ranks.base(str(folder / "*.txt"), "second_of1", "", *SECOND_GENERATION)
    return folder


def torchrun(n_nodes, n_ranks, *arguments):
    """Run n_nodes launchers with n_ranks each, as on n_nodes machines."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={n_nodes}"]
    command += [f"--nproc_per_node={n_ranks}", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    command += ["--local_addr=127.0.0.1", "-m", "tests.helpers.ranks", *arguments]
    environment = {**os.environ, "RANK": "", "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(n_nodes)]
    try:
        assert [node.wait(timeout=900) for node in nodes] == [0] * n_nodes
    finally:
        for node in nodes:
            node.terminate()  # and with it its ranks
            node.wait()


@pytest.mark.parametrize(("n_nodes", "n_ranks"), [(1, 3), (2, 2)])
def test_ranks_compute_the_same_as_one(one_rank, monkeypatch, n_nodes, n_ranks):
    world_size = n_nodes * n_ranks
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(one_rank / "base"))
    data, tag = str(one_rank / "*.txt"), f"of{world_size}"
    resumed_tag = copy_half("of1", f"of1_then_{world_size}")
    torchrun(n_nodes, n_ranks, "work", data, tag, resumed_tag)
    for stage in ("base", "mid", "sft"):
        assert_same_run(stage, tag, "of1")
    assert_same_run("base", resumed_tag, "of1")
    one, several = (json.loads((one_rank / "base" / f"eval_{t}.json").read_text()) for t in ("of1", tag))
    assert one.keys() == several.keys() >= {"chat", "pick", "who", "recall"}
    assert all(one[name] == pytest.approx(several[name]) for name in one)
    shares = list(checkpoint_dir("base", tag).glob(f"optim_{ranks.HALF:06d}_rank*.pt"))
    assert len(shares) == world_size
    ranks.pretrain(data, f"--model-tag={copy_half(tag, f'{tag}_then_1')}", "--resume")
    assert_same_run("base", f"{tag}_then_1", "of1")


def test_two_ranks_compute_the_second_generation(one_rank, monkeypatch):
    """Scalars, gates and NorMuon's state are sharded, too; a run resumes from one rank on two and back."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(one_rank / "base"))
    data, resumed_tag = str(one_rank / "*.txt"), copy_half("second_of1", "second_then_2")
    torchrun(1, 2, "base", data, "second_of2", resumed_tag, *SECOND_GENERATION)
    for tag in ("second_of2", resumed_tag):
        assert_same_run("base", tag, "second_of1", assert_near)
    back = copy_half("second_of2", "second_then_1")
    ranks.pretrain(data, f"--model-tag={back}", "--resume", *SECOND_GENERATION)
    assert_same_run("base", back, "second_of1", assert_near)
