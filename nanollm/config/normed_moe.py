"""A mixture of experts whose parts normalise for themselves what they read, as data."""

from dataclasses import dataclass

from nanollm.config.checks import need
from nanollm.config.mixers import MoE
from nanollm.config.parts import MLP, Norm


@dataclass(frozen=True)
class NormedMoE(MoE):
    """Experts beside an MLP that every token visits, each between norms of its own, normed_moe.py."""
    norm: Norm = Norm()                     # before and after experts and MLP, and without its gain before the router

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.shared is not None and not self.shared_gate, self, "shared", "an MLP, and no gate of its output")
        need(isinstance(self.expert, MLP), self, "expert", "an MLP without bias")
        need(self.norm.scope == "head" and self.norm.kind == "rms", self, "norm", "an RMS norm whose scope is 'head'")
