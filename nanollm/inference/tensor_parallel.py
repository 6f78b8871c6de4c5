"""One model on R processes, each with a part of every layer: tensor parallelism.

A rank's part of a layer is a *smaller layer of the same class*, with fewer heads or a smaller F; and what the small
layers of all ranks say adds up to what the whole one says. Shoeybi et al. 2019 (arXiv 1909.08053), §3; R = 2:

          ┌─ rank 0   q k v of heads 0 … H/2−1 ── o ──┐           W_q, W_k, W_v: H d/R rows
    x ─┬──┤                                           Σ ── + ─┐   W_o: H d/R columns
       │  └─ rank 1   q k v of the other heads ── o ──┘    │  │
       └───────────────────────────────────────────────────┘  │
    ┌─────────────────────────────────────────────────────────┘
    │     ┌─ rank 0   gate, up: F/2 rows ── ⊙ ── down ─┐          W_gate, W_up: F/R rows
    └─┬───┤                                            Σ ── + ─→  W_down: F/R columns
      │   └─ rank 1   gate, up: the others ── ⊙ ─ down ┘    │
      └─────────────────────────────────────────────────────┘     Σ: one all-reduce

    [W_0  W_1] [a_0 ; a_1] = W_0 a_0 + W_1 a_1      why it adds up: a product is a sum over its inputs, W cut by columns

Every rank has x, the residual stream. Between the two products of a branch a head, or a channel, is alone, so nothing
else is exchanged, but for

    Mamba             Δ, B and C are read from all channels: x_proj is summed too
    Mamba-2, G = 1    the norm behind the gate is over all channels: its mean square is averaged over ranks
    q and k norms     of scope "all", over all heads at once: the same
    embedding, head   a rank has some rows of the vocabulary. Tokens of other ranks are looked up as 0, logits of other
                      ranks are 0, and the sum has them all

A bias that is added behind a Σ is added once: rank 0 has it, on the others it is 0. Key/value heads, groups of Mamba-2
and key heads of a delta rule are divided as well; where they are fewer than ranks, those ranks have the same one whose
queries read it. Of experts each is divided, by F: so all ranks work on every token, wherever the router sends it, and
none waits for the one that has the popular experts. Norms, routers, the latents of latent attention and tables of
positions are whole on every rank.

    part = divide(model_on_meta, rank, ranks)       which part; raises InputError for what cannot be divided, by name
    checkpoints.parts.load_part(folder, rank, ranks)    reads it, and no other part of the files
    connect(model)                                  puts the sums in; torch.distributed has to have begun when it runs

All ranks have the same logits, bit for bit, for an all-reduce gives one result to all. So with one seed they draw the
same tokens, and need not tell each other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm import config as c
from nanollm.errors import InputError
from nanollm.layers.attention import Attention
from nanollm.layers.gated_delta_net import GatedDeltaNet
from nanollm.layers.mamba import Mamba
from nanollm.layers.mamba2 import GatedNorm, Mamba2
from nanollm.layers.norm import RMSNorm
from nanollm.layers.short_conv import ShortConv
from nanollm.model import Decoder, Embedding

# ---- which layer a rank has

Smaller = Callable[[Any, int], Any]


def divided(one: Any, ranks: int, *fields: str, shared: str | None = None) -> Any:
    """A config with each of these numbers divided by `ranks`; `shared` only down to one, which several ranks have."""
    new = {}
    for field in (*fields, *([shared] if shared else [])):
        count = getattr(one, field)
        repeated = field == shared and ranks % count == 0
        if count % ranks and not repeated:
            raise InputError(f"{type(one).__name__}.{field} is {count}, which {ranks} ranks cannot share out; run as "
                             "many ranks as divide it")
        new[field] = 1 if repeated else count // ranks
    return replace(one, **new)


def by(*fields: str, shared: str | None = None) -> Smaller:
    """How a kind of layer is divided: by these numbers of its config."""
    return lambda one, ranks: divided(one, ranks, *fields, shared=shared)


def inside(*fields: str) -> Smaller:
    """A kind that is divided where its parts are, which are these fields of its config."""
    return lambda one, ranks: replace(one, **{field: smaller(getattr(one, field), ranks) for field in fields})


def attention(one: c.Attention, ranks: int) -> c.Attention:
    """By heads."""
    if one.alibi is not None:
        raise InputError(f"{type(one).__name__} with ALiBi is not divided: a head's slope says which of how many it is")
    if one.qk_norm is not None and one.qk_norm.scope == "all" and one.qk_norm.kind != "rms":
        raise InputError(f"{type(one).__name__} with a LayerNorm over all heads at once is not divided")
    return divided(one, ranks, "heads", shared="kv_heads")


def mamba2(one: c.Mamba2, ranks: int) -> c.Mamba2:
    """By heads and groups."""
    if one.eps is not None and one.groups > 1 and one.groups % ranks:
        raise InputError(f"Mamba2.groups is {one.groups}, each with a norm over its channels, which {ranks} ranks "
                         "cannot share out; run as many ranks as divide it")
    return divided(one, ranks, "heads", shared="groups")


SMALLER: dict[type, Smaller] = {
    c.Attention: attention,
    c.ChunkedAttention: attention,
    c.NormedValueAttention: attention,
    c.CrossLayerAttention: attention,
    c.GatedAttention: inside("attention"),
    c.NarrowValueAttention: inside("attention"),
    c.LatentAttention: by("heads"),
    c.SparseLatentAttention: by("heads"),
    c.Mamba: by("inner"),
    c.Mamba2: mamba2,
    c.GatedDeltaNet: by("heads", shared="key_heads"),
    c.RGLRU: by("heads", "width"),
    c.Hyena: by("heads", "inner"),
    c.ShortConv: by("width"),
    c.ParallelMixer: inside("attention", "scan"),
    c.MLP: by("hidden"),
    c.ClippedGLU: by("hidden"),
    c.XIELU: by("hidden"),
    c.ScaledMLP: inside("mlp"),
    c.LatentExpert: inside("mlp"),
    c.MoE: inside("expert", "shared"),
    c.InputWeightedMoE: inside("expert", "shared"),
    type(None): lambda one, ranks: None,
}


def smaller(one: Any, ranks: int) -> Any:
    """A rank's part of a mixer or feed-forward, as a config of the same class. Raises InputError."""
    if type(one) not in SMALLER:
        raise InputError(f"{type(one).__name__} is not divided among ranks; run it on one process")
    return SMALLER[type(one)](one, ranks)


# ---- which part of each parameter that is

# Of a module's parameters with several things one under another: how many rows each has.
Rows = Callable[[Any], list[int]]
ROWS: dict[type[nn.Module], dict[str, Rows]] = {
    Mamba: {"in_proj": lambda one: [one.inner] * 2},
    Mamba2: {
        "in_proj": lambda one: [*[one.heads * one.head_dim] * 2, *[one.groups * one.state] * 2, one.heads],
        "conv1d": lambda one: [one.heads * one.head_dim, *[one.groups * one.state] * 2]},
    GatedDeltaNet: dict.fromkeys(
        ("qkv", "conv1d"), lambda one: [*[one.key_heads * one.key_dim] * 2, one.heads * one.head_dim]),
    ShortConv: {"in_proj": lambda one: [one.width] * 3},
}


@dataclass(frozen=True)
class Share:
    """What a rank has of a parameter: these places along this dimension; where there are none, zeros."""
    dim: int
    kept: tuple[range, ...]


@dataclass(frozen=True)
class Part:
    """A rank's part of a model. A parameter that is not among the shares is whole."""
    model: Decoder                          # on the meta device; its config has the smaller layers, and all tokens
    shares: dict[str, Share]                # by the parameter's name


def divide(whole: Decoder, rank: int, ranks: int) -> Part:
    """The part of a model, which is on the meta device, that one of so many ranks has.

    Raises InputError, with the layer, for what cannot be divided."""
    layers = []
    for number, layer in enumerate(whole.config.layers):
        try:
            layers.append(replace(layer, mixer=smaller(layer.mixer, ranks), ffn=smaller(layer.ffn, ranks)))
        except InputError as error:
            raise InputError(f"tensor parallel: layer {number}: {error}") from None
    rows = range(whole.config.vocab * rank // ranks, whole.config.vocab * (rank + 1) // ranks)
    with torch.device("meta"):
        part = Decoder(replace(whole.config, layers=tuple(layers)))
        part.embed = SplitEmbedding(rows, whole.config.dim)
        for name, parameter in part.head.named_parameters():
            setattr(part.head, name, nn.Parameter(parameter.new_empty(len(rows), *parameter.shape[1:])))
        part.tie()
        split_norms(whole, part, ranks)
    return Part(part, shares(whole, part, rank, ranks, rows))


def shares(whole: Decoder, part: Decoder, rank: int, ranks: int, rows: range) -> dict[str, Share]:
    """The dimension in which a parameter of the part is shorter than that of the whole is the one that is divided."""
    laid = {f"{name}.{inner}": (sizes(module.config), sizes(part.get_submodule(name).config))
            for name, module in whole.named_modules() for inner, sizes in ROWS.get(type(module), {}).items()}
    ours, found = dict(part.named_parameters()), {}
    for name, parameter in whole.named_parameters():
        before, after = parameter.shape, ours[name].shape
        dims = [dim for dim in range(len(before)) if before[dim] != after[dim]]
        if not dims:
            continue
        assert len(dims) == 1, f"{name}: {tuple(before)} became {tuple(after)}"
        dim = dims[0]
        here = laid.get(name.rpartition(".")[0], ([before[dim]], [after[dim]]))
        found[name] = Share(dim, (rows,) if name.startswith(("embed.", "head.")) else chosen(*here, rank, ranks))
        if dim == len(before) - 1 > 0:                          # divided along its inputs: what it gives is summed
            beside = {name.removesuffix("weight") + "bias", f"{name}_bias"} & ours.keys()
            found |= {bias: Share(0, ()) for bias in beside if rank > 0}
    return found


def chosen(sizes: list[int], mine: list[int], rank: int, ranks: int) -> tuple[range, ...]:
    """Of things one under another, with so many rows each, the rows of which a rank has so many.

    Each thing is sizes/mine pieces, as many as ranks; or fewer, and then neighbouring ranks have the same one.

    >>> chosen([8, 4, 2], [2, 1, 1], rank=2, ranks=4)
    (range(4, 6), range(10, 11), range(13, 14))
    """
    found, top = [], 0
    for size, own in zip(sizes, mine, strict=True):
        start = top + rank * (size // own) // ranks * own
        found.append(range(start, start + own))
        top += size
    return tuple(found)


# ---- what is exchanged

def total(x: Tensor) -> Tensor:
    """The sum over ranks, on all of them: an all-reduce."""
    x = x.detach().contiguous()
    dist.all_reduce(x)
    return x


def connect(model: Decoder) -> Decoder:
    """Let what each branch of a part says be summed over ranks. For inference: there are no gradients."""
    def summed(module: nn.Module, given: Any, said: Tensor) -> Tensor:
        return total(said)

    def in_its_columns(module: nn.Module, given: Any, said: Tensor) -> Tensor:
        logits = said.new_zeros(*said.shape[:-1], model.config.vocab)
        logits[..., rows.start : rows.stop] = said
        return total(logits)

    assert isinstance(model.embed, SplitEmbedding), "a part"
    rows = model.embed.rows
    for branch in branches(model):
        branch.register_forward_hook(summed)
        if isinstance(branch, Mamba):
            branch.x_proj.register_forward_hook(summed)
    model.head.register_forward_hook(in_its_columns)
    return model.requires_grad_(False)


def branches(model: Decoder) -> Iterator[nn.Module]:
    """Mixers and feed-forwards."""
    for layer in model.layers:
        yield from (one for one in (layer.mixer, layer.ffn) if isinstance(one, nn.Module))


class SplitEmbedding(Embedding):
    """Some rows of the table; tokens that have theirs elsewhere are 0 here, and the sum over ranks is whole."""

    def __init__(self, rows: range, dim: int) -> None:
        super().__init__(len(rows), dim)
        self.rows = rows

    def forward(self, tokens: Tensor) -> Tensor:                # (B, T) → (B, T, D)
        here = (tokens >= self.rows.start) & (tokens < self.rows.stop)
        found = F.embedding((tokens - self.rows.start).where(here, 0), self.weight)
        return total(found * here[..., None])


class SplitRMSNorm(RMSNorm):
    """Of a vector of which each rank has a part, all equally long: its mean square is the mean over ranks of theirs."""

    def __init__(self, config: c.Norm, dim: int, ranks: int) -> None:
        super().__init__(config, dim)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:                     # (…, D/R) → (…, D/R)
        x32, config = x.float(), self.config
        x_hat = x32 * torch.rsqrt(total(x32.square().mean(-1, keepdim=True)) / self.ranks + config.eps)
        if self.gain is None:
            return x_hat.to(x.dtype)
        gain = config.offset + self.gain.float() if config.offset else self.gain
        return (x_hat * gain.float()).to(x.dtype) if config.cast_after_gain else (gain * x_hat.to(x.dtype)).to(x.dtype)


class SplitGatedNorm(GatedNorm):
    """The same of the norm behind Mamba-2's gate, where there is one group."""

    def __init__(self, config: c.Mamba2, eps: float, ranks: int) -> None:
        super().__init__(config, eps)
        self.ranks = ranks

    def forward(self, y: Tensor, z: Tensor) -> Tensor:          # (B, T, I/R) each → (B, T, I/R)
        u = y.float() * F.silu(z.float())
        u_hat = u * torch.rsqrt(total(u.square().mean(-1, keepdim=True)) / self.ranks + self.eps)
        return (u_hat * self.gain.float()).to(y.dtype)


def split_norms(whole: Decoder, part: Decoder, ranks: int) -> None:
    """Put these two where a norm of the whole model reads more than a rank has."""
    for name, module in whole.named_modules():
        mine = part.get_submodule(name)
        if isinstance(module, Attention) and isinstance(mine, Attention):
            one, norm = mine.config, mine.config.qk_norm
            if norm is not None and norm.scope == "all":
                mine.q_norm = SplitRMSNorm(norm, one.heads * one.head_dim, ranks)
                mine.k_norm = SplitRMSNorm(norm, one.kv_heads * one.head_dim, ranks)
        if isinstance(module, Mamba2) and isinstance(mine, Mamba2):
            if module.config.groups == 1 and module.config.eps is not None:
                mine.norm = SplitGatedNorm(mine.config, module.config.eps, ranks)
