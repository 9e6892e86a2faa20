import json
from collections import Counter

import pytest

from scripts import bench_train

pytestmark = pytest.mark.slow

TINY = ["--device-type=cpu", "--depth=2", "--max-seq-len=16", "--device-batch-size=2", "--vocab-size=64"]
TINY += ["--total-batch-size=64", "--num-iterations=3"]


def test_one_line_of_json(capsys):
    assert bench_train.main(TINY) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens_per_second"] == pytest.approx(64 / (result["step_ms"] / 1e3), rel=0.2)
    assert result["accumulation"] == 2
    assert result["depth"] == 2
    assert result["fused"] is False


def test_kernels_by_kind():
    kernels = Counter({
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma": 10.0,
        "_slc2_backward": 4.0,
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_NTN": 7.0,
        "sm90_xmma_gemm_bf16bf16": 3.0,
        "_linear_relu2": 5.0,
        "triton_red_fused_add_mul_0": 2.0,
        "void at::native::elementwise_kernel": 1.0,
    })  # fmt: skip
    parts = bench_train.by_part(kernels)
    assert parts == {"attention": 10, "product": 10, "mlp_product": 5, "slc2": 4, "compiled": 2, "other": 1}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num-iterations=0", "num_iterations=0"),
        ("--memory-gib=8", "memory_gib=8.0"),
        ("--fused=True", "NVIDIA GPU"),
    ],
)
def test_bad_settings(flag, message):
    with pytest.raises(ValueError, match=message):
        bench_train.main([*TINY, flag])


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    flags = ["--depth=4", "--device-batch-size=2", "--max-seq-len=512", "--vocab-size=1024"]
    flags += ["--total-batch-size=2048", "--num-iterations=3", "--kernels=3"]
    assert bench_train.main(flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["parts"]["product"] > 0
    assert result["attention"]
    assert len(result["kernels"]) == 3
    assert 0 < result["peak_gib"] < 20
