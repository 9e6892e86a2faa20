"""The optimizer: MuonAdamW (muon_adamw.py), its stacks and update rules, and learning-rate schedules.

MuonAdamW and build_optimizer are imported on first use: commands import nanochat.optim.schedule for their
--help, which must not load torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.optim.muon_adamw import MuonAdamW, build_optimizer
else:

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from nanochat.optim import muon_adamw

        return getattr(muon_adamw, name)


__all__ = ["MuonAdamW", "build_optimizer"]
