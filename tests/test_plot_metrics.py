import json

import pytest

from scripts import plot_metrics


def test_a_picture_of_two_runs(tmp_path):
    for name in ("a", "b"):
        steps = [{"step": i, "loss": 5.0, "smooth_loss": 5 - i / 9} for i in range(9)]
        evals = [{"step": i, "val_bpb": 2 - i / 9, "train_seconds": float(i)} for i in (0, 4, 8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steps + evals))
    out = tmp_path / "curves.png"
    runs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert plot_metrics.main(["--skip=2", f"--out={out}", "--runs", *runs]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"a\.jsonl has too few steps"):
        plot_metrics.main([f"--out={out}", "--skip=99", "--runs", *runs])
