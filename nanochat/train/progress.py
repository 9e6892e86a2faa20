"""The state of a training run beside weights and optimizer: where it is, how it went, how long it took."""

from dataclasses import asdict, dataclass, field
from typing import Any

from nanochat.common import Runtime, process_seconds
from nanochat.dataloader import merge_states


@dataclass
class EmaLoss:
    """Exponential moving average, corrected for its start at zero: after one update it is that value."""

    beta: float = 0.9
    total: float = 0.0
    weight: float = 0.0

    def update(self, value: float) -> float:
        """Add a value and return the average."""
        self.total = self.beta * self.total + (1 - self.beta) * value
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.value

    @property
    def value(self) -> float:
        """The average of the values so far."""
        return self.total / self.weight


@dataclass
class Progress:
    """What a run must remember to resume exactly, and to report on all of its time."""

    step: int = 0  # steps done
    ema: EmaLoss = field(default_factory=EmaLoss)  # of the loss, or of the reward in reinforcement learning
    train_seconds: float = 0.0  # in steps, without evaluations
    earlier_seconds: float = 0.0  # wall clock of the processes before this one
    first_val_bpb: float | None = None
    min_val_bpb: float | None = None
    val_bpb: float | None = None  # at the last evaluation
    # after the last step, empty before the first; of this rank's streams, in a checkpoint of all ranks'
    loader_state: dict[str, Any] = field(default_factory=dict)

    def add_validation(self, bpb: float) -> None:
        """Take in the bits per byte of an evaluation."""
        self.val_bpb = bpb
        self.min_val_bpb = min(bpb, self.min_val_bpb or bpb)
        self.first_val_bpb = self.first_val_bpb or bpb

    def to_dict(self, runtime: Runtime) -> dict[str, Any]:
        """Return the plain values that a checkpoint keeps, those of all ranks; every rank must call this."""
        return {
            **asdict(self),
            "loader_state": merge_states(runtime.gather(self.loader_state)),
            "earlier_seconds": self.earlier_seconds + process_seconds(),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Progress":
        """Make the progress that `to_dict` has described."""
        return cls(**{**saved, "ema": EmaLoss(**saved["ema"])})
