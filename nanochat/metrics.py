"""The numbers of a run: metrics.jsonl, one object a line, and wandb if requested.

Plots and reports read the file. Every line has a `step`; a resumed run first drops the lines from its step
on, so that no step is recorded twice.
"""

import json
from pathlib import Path
from typing import Any

from nanochat.common import Runtime, atomic_write


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, without a last line that a crash has cut short."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """Append records to `path`, and to a wandb run unless its name is "dummy"; only rank 0 writes."""

    def __init__(
        self, path: Path, runtime: Runtime, *, resume_step: int, wandb_run: str, config: dict[str, Any]
    ):
        self.file = self.wandb = None
        if not runtime.is_main:
            return
        if wandb_run != "dummy":
            self.wandb = _start_wandb(wandb_run, config)
        kept = [r for r in read_metrics(path) if r["step"] < resume_step] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run

    def __call__(self, record: dict[str, Any]) -> None:
        """Write a record, which must have a `step`."""
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.wandb is not None:
            self.wandb.log(record)

    def close(self) -> None:
        """Close the file and finish the wandb run."""
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(run: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"run={run!r} sends the numbers to wandb, which is not installed: uv pip install wandb, or omit "
            "--run; metrics.jsonl has them in any case"
        ) from error
    try:
        return wandb.init(project="nanochat", name=run, config=config)
    except wandb.Error as error:  # no key, no network
        raise ValueError(f"run={run!r}: wandb reports: {error}; or omit --run") from error
