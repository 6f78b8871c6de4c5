"""Mixers whose cost does not depend on how many tokens came before, as data.

Each class names the file of nanollm/layers that explains it: mamba.py, hyena.py.
"""

from dataclasses import dataclass

from nanollm.config.checks import Mixer, need, need_positive, need_sizes, present
from nanollm.config.gated import GatedDeltaNet
from nanollm.config.parts import ACTIVATIONS, Activation, Norm


@dataclass(frozen=True)
class Mamba(Mixer):
    """Selective state space, first generation, mamba.py."""
    inner: int                              # I, channels of the scan; 2 × dim
    state: int                              # N, numbers kept per channel; 16
    conv: int                               # width of the causal convolution before the scan; 4
    dt_rank: int                            # R, rank of the step-size projection; dim / 16
    conv_bias: bool = True                  # on that convolution
    bias: bool = False                      # on the projections in and out
    inner_norm: Norm | None = None          # on the low-rank Δ, on B and on C; Jamba, Falcon-Mamba without gain

    def __post_init__(self) -> None:
        need_sizes(self, "inner", "state", "conv", "dt_rank")
        plain = self.inner_norm is None or self.inner_norm.scope == "head"
        need(plain, self, "inner_norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class MultiHeadMamba(Mamba):
    """The first Mamba with heads: parts of the channels that have Δ, B and C of their own, multi_head_mamba.py."""
    heads: int = 1                          # H, equal parts of the channels; 2 (Zamba)

    def __post_init__(self) -> None:
        super().__post_init__()
        need_sizes(self, "heads")
        need(self.inner % self.heads == 0, self, "heads", f"a divisor of inner ({self.inner})")
        need(self.inner_norm is None, self, "inner_norm", "None where there are heads")


@dataclass(frozen=True)
class Mamba2(Mixer):
    """Selective state space, second generation: heads, and one decay a head, mamba2.py."""
    heads: int                              # H; 128
    head_dim: int                           # P, channels of a head; 64
    groups: int                             # G, sets of B and C, a divisor of heads; Mamba-2 1, Codestral 8
    state: int                              # N, numbers kept per channel; 128
    conv: int                               # width of the causal convolution on x, B and C; 4
    eps: float | None = 1e-5                # of the norm after the gate, over the channels of a group; Falcon-H1 None:
                                            # there is none
    conv_bias: bool = True                  # on that convolution
    bias: bool = False                      # on the projections in and out
    least_step: float = 0.0                 # Δ is cut off below this
    largest_step: float | None = None       # and above this
    scales: tuple[float, ...] | None = None     # times z, x, B, C and Δ, as they are projected; Falcon-H1

    def __post_init__(self) -> None:
        need_sizes(self, "heads", "head_dim", "groups", "state", "conv")
        need(self.heads % self.groups == 0, self, "groups", f"a divisor of heads ({self.heads})")
        need_positive(self, *present(self, "eps", "largest_step"))
        need(self.scales is None or len(self.scales) == 5, self, "scales", "5 numbers, for z, x, B, C and Δ")
        ordered = 0 <= self.least_step < (self.largest_step or float("inf"))
        need(ordered, self, "least_step", "0 or more, and less than largest_step")


@dataclass(frozen=True)
class RGLRU(Mixer):
    """The recurrent block of Griffin and RecurrentGemma around a real-gated linear recurrent unit, recurrent.py."""
    width: int                              # I, channels of the recurrence; 2560
    heads: int                              # H, blocks of the gates' block-diagonal matrices, a divisor of width; 10
    conv: int                               # width of the causal convolution before the recurrence; 4
    activation: Activation = "gelu_tanh"    # of the branch that multiplies what the recurrence says

    def __post_init__(self) -> None:
        need_sizes(self, "width", "heads", "conv")
        need(self.width % self.heads == 0, self, "heads", f"a divisor of width ({self.width})")
        need(self.activation in ACTIVATIONS, self, "activation", f"one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class RWKV(Mixer):
    """Both halves of an RWKV-4 block, time mixing and channel mixing, rwkv.py; so a layer of it has no ffn."""
    width: int                              # D, that of the residual stream; 4096
    hidden: int                             # F, width of the channel mixing; 16384
    norm: Norm                              # before each half; LayerNorm with bias

    def __post_init__(self) -> None:
        need_sizes(self, "width", "hidden")
        need(self.norm.scope == "head", self, "norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class Hyena(Mixer):
    """A convolution of any length between two gates, hyena.py."""
    inner: int                              # I, its channels; 4096
    heads: int                              # H: the projection's rows lie head by head, a divisor of inner; 32
    state: int                              # N, poles of a channel's filter; 2
    conv: int                               # k, width of the causal convolution after the projection; 3

    def __post_init__(self) -> None:
        need_sizes(self, "inner", "heads", "state", "conv")
        need(self.inner % self.heads == 0, self, "heads", f"a divisor of inner ({self.inner})")

@dataclass(frozen=True)
class ShortConv(Mixer):
    """A convolution over a few tokens between two gates, short_conv.py."""
    width: int                              # I, its channels; 2048 (LFM2)
    conv: int                               # k, tokens that it sees, itself included; 3
    bias: bool = False                      # on the convolution and on the projections in and out

    def __post_init__(self) -> None:
        need_sizes(self, "width", "conv")


# what a token costs them does not depend on how many came before
SCANS = (Mamba, MultiHeadMamba, Mamba2, RGLRU, RWKV, Hyena, ShortConv, GatedDeltaNet)
