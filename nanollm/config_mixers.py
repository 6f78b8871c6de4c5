"""What may stand in the place of attention or of the MLP, as data: latent attention, scans, mixtures of experts.

Each class is explained in the module of its name: `Mamba` in mamba.py, `MoE` in moe.py.
"""

from dataclasses import dataclass

from nanollm.config_checks import need, need_sizes
from nanollm.config_parts import MLP


@dataclass(frozen=True)
class Mamba:
    """Selective state space, first generation, mamba.py."""
    inner: int                              # I, channels of the scan; 2 × dim
    state: int                              # N, numbers kept per channel; 16
    conv: int                               # width of the causal convolution before the scan; 4
    dt_rank: int                            # R, rank of the step-size projection; dim / 16
    conv_bias: bool = True                  # on that convolution
    bias: bool = False                      # on the projections in and out

    def __post_init__(self) -> None:
        need_sizes(self, "inner", "state", "conv", "dt_rank")


# ---- feed-forward

@dataclass(frozen=True)
class MoE:
    """A router that sends each token to a few of many gated MLPs, moe.py."""
    experts: int                            # E; 8
    top_k: int                              # experts a token visits; 2
    expert: MLP                             # what one expert is; MLP(14336)
    renormalize: bool                       # divide the chosen weights by their sum; Mixtral True, Qwen1.5-MoE False
    shared: MLP | None = None               # an expert that every token visits; Qwen1.5-MoE
    shared_gate: bool = False               # its output times sigmoid(w · x)

    def __post_init__(self) -> None:
        need_sizes(self, "experts", "top_k")
        need(self.top_k <= self.experts, self, "top_k", f"at most experts ({self.experts})")
        need(self.expert.gated and not self.expert.bias, self, "expert", "a gated MLP without bias")
        need(self.shared is not None or not self.shared_gate, self, "shared_gate", "False where nothing is shared")


MIXERS = (Mamba,)
FEED_FORWARDS = (MoE,)
