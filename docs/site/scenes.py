"""What is run to measure shapes: tiny decoders that together reach every layer, and the scripts around them.

    scene       a decoder of a few layers reads B × BEFORE tokens, remembers them, and reads T more of each row
    twice       with B 3, T 7, S 13, D 44, H 8, K 2, d 10, …  and with B 4, T 9, S 14, D 68, H 9, K 3, d 14, …

Of these calls the second is measured first: only there have queries and keys different numbers. The two rounds have no
size in common, so a shape that says B and T in both says it rightly; what is equal by chance in one is not so in the
other.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from docs.site.shapes import unwatched
from nanollm.cache import Cache
from nanollm.config import (
    MLP,
    RGLRU,
    RWKV,
    XIELU,
    Alibi,
    Attention,
    ChunkedAttention,
    ClippedGLU,
    CrossLayerAttention,
    DynamicNTK,
    ExpertGroups,
    FeedForward,
    FilteredAttention,
    GatedAttention,
    GatedDeltaNet,
    Hyena,
    Indexer,
    InputWeightedMoE,
    LatentAttention,
    LatentExpert,
    Layer,
    LayerEnd,
    Linear,
    Llama3,
    LogLength,
    LogSteps,
    LogTokenSteps,
    LongRope,
    Mamba,
    Mamba2,
    Mixer,
    ModelConfig,
    MoE,
    MultiHeadMamba,
    NarrowValueAttention,
    Norm,
    NormedMoE,
    NormedValueAttention,
    ParallelMixer,
    PerLayerInput,
    Proportional,
    Rope,
    ScaledMLP,
    SharedBlock,
    SharedBlockScan,
    ShortConv,
    Sines,
    SparseLatentAttention,
    SteppedNTK,
    Yarn,
)
from nanollm.data.stream import Batch
from nanollm.inference.generation import generate
from nanollm.inference.sample import Sampling
from nanollm.layers.moe import routing
from nanollm.model import Decoder
from nanollm.training import optim
from nanollm.training.log_probs import answer_log_probs
from nanollm.training.losses import Balance, next_token


@dataclass(frozen=True)
class Sizes:
    """The letters of the house, with a number for each."""
    B: int          # rows
    T: int          # tokens of a call
    before: int     # tokens that the cache holds already
    D: int          # model width
    V: int          # vocabulary
    F: int          # feed-forward width
    H: int          # query heads
    K: int          # key/value heads
    d: int          # width of a head
    E: int          # experts
    k: int          # of them, a token visits
    I: int          # channels of a scan
    N: int          # numbers in its state, a channel
    R: int          # rank of its step size
    P: int          # channels of a head of Mamba-2
    G: int          # groups of heads there
    taps: int       # of a convolution


ROUNDS = (Sizes(B=3, T=7, before=6, D=44, V=97, F=52, H=8, K=2, d=10, E=8, k=2, I=72, N=4, R=9, P=11, G=2, taps=6),
          Sizes(B=4, T=9, before=5, D=68, V=89, F=61, H=9, K=3, d=14, E=12, k=3, I=63, N=5, R=8, P=13, G=3, taps=4))


@dataclass(frozen=True)
class Scene:
    """A name for readers, what to run, and the sizes of letters in it."""
    name: str
    run: Callable[[], object]
    sizes: dict[str, int]


ROPE = Rope()


class Builder:
    """Tiny decoders of the sizes of one round."""

    def __init__(self, sizes: Sizes) -> None:
        self.s = sizes
        self.norm = Norm("layer", bias=True)
        self.mlp = MLP(sizes.F)
        self.mamba = Mamba(sizes.I, sizes.N, sizes.taps, sizes.R)
        self.mamba2 = Mamba2(sizes.H, sizes.P, sizes.G, sizes.N, sizes.taps)

    def attention(self, rope: Rope | None = ROPE, **fields: Any) -> Attention:
        """Query heads that share key/value heads."""
        return Attention(self.s.H, self.s.K, self.s.d, rope, **fields)

    def experts(self, *fields: Any, expert: Any = None) -> MoE:
        """E experts, k of them for a token."""
        return MoE(self.s.E, self.s.k, expert or self.mlp, *(fields or [True]))

    def decoder(self, *mixers: Mixer, ffn: FeedForward | None = None, parallel: bool = False,
                end: LayerEnd | None = None, **fields: Any) -> Decoder:
        """A layer for each mixer, with a feed-forward where its kind has one."""
        layers = []
        for mixer in mixers:
            alone = isinstance(mixer, (RWKV, Mamba, SharedBlockScan))
            layers.append(Layer(
                mixer, None if alone else ffn or self.mlp, pre_mixer=None if isinstance(mixer, RWKV) else Norm(),
                pre_ffn=None if alone else Norm(), parallel=parallel, end=end))
        return Decoder(ModelConfig(self.s.V, self.s.D, tuple(layers), **fields))

    def scene(self, name: str, *mixers: Mixer, sizes: dict[str, int] | None = None, **fields: Any) -> Scene:
        """A decoder that reads. sizes: letters that mean something else in it, or that only it has."""
        s = self.s
        common = {"B": s.B, "T": s.T, "S": s.before + s.T, "D": s.D, "V": s.V, "F": s.F, "H": s.H, "K": s.K, "d": s.d,
                  "r": s.d, "G": s.H // s.K}
        return Scene(name, partial(read, self.decoder(*mixers, **fields), s), common | (sizes or {}))


def read(model: Decoder, s: Sizes) -> None:
    """T tokens a row behind those that the cache holds; then one, then all without a cache, then packed documents."""
    tokens = torch.arange(s.B * s.T).reshape(s.B, s.T) % s.V
    with torch.no_grad():
        cache = Cache(model.config, s.B, s.before + s.T)
        unwatched(partial(model, tokens[:, : s.before], cache=cache))
        model(tokens, cache=cache)
        model(tokens[:, :1], cache=Cache(model.config, s.B, s.T))
        model(tokens)
        model(tokens, torch.arange(s.T).remainder(4).expand(s.B, s.T))


def decoders(s: Sizes) -> list[Scene]:
    """From the plainest on: what is measured first, stays."""
    build = Builder(s)
    attention, scene, experts = build.attention, build.scene, build.experts
    moe = {"N": s.B * s.T, "E": s.E, "k": s.k}
    scan = {"I": s.I, "N": s.N, "R": s.R, "k": s.taps}
    scan2 = {"P": s.P, "G": s.G, "N": s.N, "I": s.H * s.P, "k": s.taps}
    latent = LatentAttention(s.H, s.d + 2, 2 * s.K + 4, s.d + 5, s.R + 13, s.R + 20, Rope())
    of_latent = {"n": s.d + 2, "r": 2 * s.K + 4, "v": s.d + 5, "c": s.R + 13}
    sparse = SparseLatentAttention(s.H, s.d + 2, 2 * s.K + 4, s.d + 5, s.R + 13, s.R + 20, Rope(),
                                   indexer=Indexer(s.taps, 16 + s.K, 4))
    of_sparse = of_latent | {"J": s.taps, "i": 16 + s.K}
    block = SharedBlock(0, attention(), build.mlp, Norm())
    zamba = SharedBlockScan(block, build.mamba2, Norm(), mlp_rank=s.R, qkv_rank=s.R)
    zamba1 = SharedBlockScan(block, MultiHeadMamba(s.I, s.N, s.taps, s.R, heads=s.K), Norm())
    long = LongRope(tuple(range(1, s.d // 2 + 1)), tuple(range(2, s.d // 2 + 2)), original=8)
    small = LatentExpert(s.R + 6, MLP(s.F, "relu2", gated=False))
    return [
        scene("a Llama", attention(), attention()),
        scene("a mixture of experts", attention(), ffn=experts(), sizes=moe),
        scene("experts in groups", attention(), sizes=moe, ffn=experts(
            1e-6, build.mlp, True, "sigmoid", True, ExpertGroups(4, 2, 2), 2.5)),
        scene("latent attention", latent, sizes=of_latent),
        scene("sparse latent attention", sparse, replace(sparse, indexer=None), sizes=of_sparse),
        scene("Mamba", build.mamba, sizes=scan),
        scene("Mamba-2", build.mamba2, sizes=scan2),
        scene("Gated DeltaNet", GatedDeltaNet(s.H, s.K, s.P, s.d + 2, s.taps), sizes=scan2 | {"G": s.K, "N": s.d + 2}),
        scene("RWKV-4", RWKV(s.D, s.F, build.norm)),
        scene("Griffin's recurrence", RGLRU(s.I, s.H, s.taps), sizes=scan),
        scene("Hyena", Hyena(s.I, s.H, s.N, s.taps), sizes=scan),
        scene("a gated short convolution", ShortConv(s.I, s.taps), sizes=scan),
        scene("gated attention", GatedAttention(attention(qk_norm=Norm())),
              GatedAttention(attention(), "head", "softplus")),
        scene("narrow values", NarrowValueAttention(attention(), s.d + 5), sizes={"v": s.d + 5}),
        scene("filtered attention", FilteredAttention(attention(), s.I), sizes={"C": s.I}),
        scene("attention in chunks", ChunkedAttention(s.H, s.K, s.d, Rope(), window=4)),
        scene("attention beside Mamba-2", ParallelMixer(attention(), build.mamba2), ffn=ScaledMLP(build.mlp)),
        scene("a shared block", zamba, build.mamba2, zamba, sizes={"r": s.R}),
        scene("a shared block before Mamba", zamba1, zamba1, sizes=scan | {"H": s.K}),
        scene("a window, with a soft cap", attention(window=4, softcap=5.0, clip=3.0, scale=0.2)),
        scene("sinks", attention(sinks=True, window=4), ffn=experts(expert=ClippedGLU(s.F)), sizes=moe),
        scene("ALiBi", attention(None, alibi=Alibi())),
        scene("Falcon's ALiBi", attention(None, alibi=Alibi(coarse=True))),
        scene("a norm for each head", attention(qk_norm=replace(build.norm, scope="each", bias=False))),
        scene("one norm over all heads", attention(qk_norm=Norm(scope="all"))),
        scene("a norm after the rotation", attention(qk_norm=Norm(scope="rotated"))),
        scene("norms without a gain", attention(), final_norm=Norm(gain=False)),
        scene("LayerNorm", attention(), final_norm=build.norm),
        scene("a gain stored less one", attention(), final_norm=Norm(offset=1.0, cast_after_gain=True)),
        scene("ε outside the root", attention(), final_norm=Norm("rms_outer")),
        scene("a table of positions", attention(None), positions=64, embed_norm=build.norm, embed_scale=2.0),
        scene("sines of positions", attention(None), positions=Sines(2)),
        scene("no gate", attention(), ffn=MLP(s.F, "relu2", gated=False, bias=True), parallel=True, head_softcap=3.0),
        scene("xIELU", attention(), ffn=XIELU(s.F)),
        scene("a weight that goes in", attention(), ffn=InputWeightedMoE(s.E, s.k, build.mlp, False), sizes=moe),
        scene("experts between norms", attention(), ffn=NormedMoE(s.E, s.k, build.mlp, True, MLP(s.F)), sizes=moe),
        scene("values made of keys", NormedValueAttention(s.H, s.K, s.d, Rope(), values_are_keys=True)),
        scene("keys of a layer before, and a vector for each layer",
              NormedValueAttention(s.H, s.K, s.d, Rope(), 4, Norm(), kept=True),
              CrossLayerAttention(s.H, s.K, s.d, Rope(), 4, Norm()),
              end=LayerEnd(PerLayerInput(s.P), Norm()), sizes={"P": s.P, "L": 2}),
        scene("experts on a short vector", attention(), ffn=experts(expert=small), sizes=moe | {"L": s.R + 6}),
        scene("Phi's rule for experts", attention(), ffn=MoE(s.E, s.k, build.mlp, False, sparse=0.01), sizes=moe),
        scene("pairs side by side", attention(Rope(layout="interleaved", fraction=0.6)), sizes={"r": int(s.d * 0.6)}),
        *(scene(type(way).__name__, attention(Rope(scaling=way))) for way in (
            Linear(2.0), Proportional(0.5), Llama3(8.0, 8), Yarn(4.0, 8), long, DynamicNTK(2.0, 8), SteppedNTK(8))),
        *(scene(type(way).__name__, attention(growth=way)) for way in (
            LogLength(4), LogSteps(4, 0.1), LogTokenSteps(4, 0.1))),
    ]


def scenes(s: Sizes) -> list[Scene]:
    """All that is run in one round: decoders that read, one that learns, and one that writes."""
    common = {"B": s.B, "T": s.T, "D": s.D, "V": s.V, "H": s.H, "K": s.K, "d": s.d, "F": s.F, "E": s.E}
    model = Builder(s).decoder(Builder(s).attention(), ffn=Builder(s).experts())
    return [*decoders(s), Scene("a training step", partial(learn, model, s), common | {"N": s.B * s.T, "n": s.B * s.T}),
            Scene("an answer", partial(write, model), common | {"B": 1})]


def learn(model: Decoder, s: Sizes) -> None:
    """A step of training on the next token, with Muon; and the log probabilities that preferences ask for."""
    tokens = torch.arange(s.B * s.T).reshape(s.B, s.T) % s.V
    batch, balance = Batch(tokens, tokens.roll(-1, 1), None), Balance(model)
    with routing(model) as routed:
        loss, _ = next_token(model, batch, Namespace(z_loss=1e-4))
    loss = loss / batch.divisor + 0.01 * balance.loss(routed, None)
    loss.backward()
    optim.step(optim.build(model, "muon", 0.1, torch.float32), optim.lr_factor(5, 10, 2, "cosine"))
    answer_log_probs(model, tokens, tokens.roll(-1, 1))


def write(model: Decoder) -> None:
    """Some tokens, sampled in all ways at once."""
    sampling = Sampling(0.7, top_k=20, top_p=0.9, min_p=0.01, seed=1)
    list(generate(model, [1, 2, 3], 3, sampling))
