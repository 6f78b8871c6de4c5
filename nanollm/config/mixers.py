"""What may stand in the place of attention or of the MLP, as data: latent attention, mixtures of experts.

Each class names the file of nanollm/layers that explains it: latent_attention.py, moe.py. Scans: scans.py.
"""

from dataclasses import dataclass
from typing import Literal

from nanollm.config.checks import FeedForward, Mixer, Part, need, need_positive, need_sizes, present
from nanollm.config.parallel import ScaledMLP
from nanollm.config.parts import MLP, Attention, Norm, Rope, need_rotation
from nanollm.config.scaling import Growth


@dataclass(frozen=True)
class LatentAttention(Mixer):
    """Attention whose keys and values are made from one short vector a token, latent_attention.py."""
    heads: int                              # H; 128 (DeepSeek-V3)
    nope: int                               # part of a query or key that is not rotated, a head; 128
    rope_dim: int                           # part that is; the key's is one for all heads; 64
    value: int                              # width of a head's value; 128
    kv_rank: int                            # numbers that keys and values are made from; 512
    q_rank: int | None                      # the same for queries; None: made from x itself (V2-Lite); 1536
    rope: Rope                              # of the rotated part
    scale: float | None = None              # of the scores; None is 1/√(nope + rope_dim)
    norm: Norm = Norm()                     # of both short vectors
    growth: Growth | None = None            # as Attention.growth; Mistral 4 LogSteps(8192, 0.1)

    def __post_init__(self) -> None:
        need_sizes(self, "heads", "nope", "rope_dim", "value", "kv_rank", *present(self, "q_rank"))
        need_positive(self, *present(self, "scale"))
        need(self.rope is not None, self, "rope", "a Rope")
        need_rotation(self, self.rope, self.rope_dim)
        need(self.norm.scope == "head", self, "norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class FilteredAttention(Mixer):
    """Attention whose queries and keys read each token mixed with the two before it, filtered_attention.py."""
    attention: Attention                    # what is done with them
    hidden: int                             # C, width between the two filters; 1024
    norm: Norm = Norm()                     # after the filters

    def __post_init__(self) -> None:
        need_sizes(self, "hidden")
        inner = self.attention
        plain = inner.qk_norm is None and inner.clip is None and inner.window is None
        need(plain, self, "attention", "no qk_norm, clip or window")
        need(self.norm.scope == "head", self, "norm", "a norm whose scope is 'head'")

    @property
    def rope(self) -> Rope | None:
        """As Attention.rope: what decides whether a cache must begin again as a sequence grows."""
        return self.attention.rope


# ---- feed-forward

@dataclass(frozen=True)
class XIELU(FeedForward):
    """A plain MLP whose activation has two learned slopes, xielu.py."""
    hidden: int                             # F, its width; 21504 (Apertus)

    def __post_init__(self) -> None:
        need_sizes(self, "hidden")


@dataclass(frozen=True)
class ClippedGLU(Part):
    """An expert with biases, whose gate and up projections are cut off; ClippedExperts in moe.py."""
    hidden: int                             # F, its width; 2880 (gpt-oss)
    slope: float = 1.702                    # α of the gate x·σ(αx): near to GELU
    limit: float = 7.0                      # the gate is cut off above it, the up projection at ± this

    def __post_init__(self) -> None:
        need_sizes(self, "hidden")
        need_positive(self, "slope", "limit")


@dataclass(frozen=True)
class LatentExpert(Part):
    """An expert that works on a shorter vector, which one matrix makes for all of them; MoE in moe.py."""
    width: int                              # L, numbers in that vector; 1024 (Nemotron 3 Super)
    mlp: MLP                                # what it does with them; MLP(2688, "relu2", gated=False)

    def __post_init__(self) -> None:
        need_sizes(self, "width")
        need(isinstance(self.mlp, MLP) and not self.mlp.bias, self, "mlp", "an MLP without bias")


@dataclass(frozen=True)
class ExpertGroups(Part):
    """Experts that live on one machine, of which a token visits few."""
    count: int                              # groups that the experts are cut into, side by side; 8
    kept: int                               # of them, a token's experts may be in these best ones; 4
    best: int                               # a group is as good as the sum of so many of its best experts; V2 1, V3 2

    def __post_init__(self) -> None:
        need_sizes(self, "count", "kept", "best")
        need(self.kept <= self.count, self, "kept", f"at most count ({self.count})")


@dataclass(frozen=True)
class MoE(FeedForward):
    """A router that sends each token to a few of many MLPs, moe.py."""
    experts: int                            # E; 8
    top_k: int                              # experts a token visits; 2
    expert: MLP | ClippedGLU | LatentExpert     # what one expert is; MLP(14336)
    renormalize: bool | float               # divide the chosen weights by their sum, plus this if it is a number;
                                            # Mixtral True, Qwen1.5-MoE False, LFM2 1e-6
    shared: MLP | ScaledMLP | None = None   # an expert that every token visits; Qwen1.5-MoE
    shared_gate: bool = False               # its output times sigmoid(w · x)
    score: Literal["softmax", "sigmoid"] = "softmax"    # what the router's logits become; DeepSeek-V3 "sigmoid"
    correction: bool | Literal["logits"] = False    # a bias a score, or a logit, for the choice and not for the weight;
                                            # DeepSeek-V3 True, Kolibri "logits"
    groups: ExpertGroups | None = None      # None: any expert may be chosen; DeepSeek-V2 and V3 choose groups first
    scale: float = 1.0                      # of all weights, at last; DeepSeek-V3 2.5
    sparse: float | None = None             # each choice is weighed against those within 2 of these; Phi-3.5-MoE 0.01
    router_bias: bool = False               # gpt-oss True
    router_float32: bool = False            # the router's product in float32, whatever the weights are; DeepSeek
    round_weights: bool = False             # chosen weights rounded to the working dtype; Qwen, ERNIE (Mixtral: not)

    def __post_init__(self) -> None:
        need_sizes(self, "experts", "top_k")
        need(self.top_k <= self.experts, self, "top_k", f"at most experts ({self.experts})")
        one = self.expert
        known = isinstance(one, (ClippedGLU, LatentExpert)) or (isinstance(one, MLP) and not one.bias)
        need(known, self, "expert", "an MLP without bias, a ClippedGLU or a LatentExpert")
        rule = isinstance(self.renormalize, bool) or 0 < self.renormalize < 1
        need(rule, self, "renormalize", "True, False, or a number between 0 and 1")
        need(self.shared is not None or not self.shared_gate, self, "shared_gate", "False where nothing is shared")
        need(self.score in ("softmax", "sigmoid"), self, "score", "'softmax' or 'sigmoid'")
        need(self.correction in (True, False, "logits"), self, "correction", "True, False or 'logits'")
        need_positive(self, "scale", *present(self, "sparse"))
        if self.groups is not None:
            size = self.experts // self.groups.count
            even = self.experts % self.groups.count == 0 and self.groups.best <= size
            need(even, self, "groups", f"equal parts of the {self.experts} experts, with at least `best` in each")
            enough = self.top_k <= self.groups.kept * size
            need(enough, self, "groups", f"at least top_k ({self.top_k}) experts in the groups kept")
        others = self.renormalize or self.correction or self.groups or self.scale != 1 or self.score != "softmax"
        alone = self.sparse is None or not others
        need(alone, self, "sparse", "None where any other field says how experts are weighed")
