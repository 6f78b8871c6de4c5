"""What benchmarks/kernels.py measures: each operation at the shapes of real models, with its floor, goal and rivals.

Shapes are those of a Llama-3-8B layer, and of the models that the other operations come from (Qwen3-30B-A3B's experts,
Mamba-2.8B's scan, Mamba-2-2.7B's SSD, Qwen3-Next's delta rule). `Sizes(small=True)` shrinks them all, for the test that
asks only whether every case runs.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import roofline
from kernels.roofline import Work
from nanollm.inference import quantize
from nanollm.layers import attention, delta, mamba, mlp, moe, norm, rope, scan, ssd
from nanollm.training import losses


@dataclass
class Case:
    """One operation at one shape. run is the decorated definition: `ops.using` chooses what it runs.

    rivals: functions of the same inputs."""
    name: str
    shape: str
    run: Callable
    inputs: Callable[[], tuple]                                                 # fresh random ones
    work: Work
    goal: str = ""
    backward: bool = False                                                      # the gradients only
    rivals: dict[str, Callable] = field(default_factory=dict)


@dataclass
class Sizes:
    """Where and how large."""
    small: bool
    device: str
    dtype: torch.dtype = torch.bfloat16

    def __call__(self, *real: int) -> tuple[int, ...]:
        return tuple(min(n, 16 if n > 512 else 8 if n > 8 else 2) for n in real) if self.small else real

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).requires_grad_()

    def heads(self, B: int, T: int, H: int, d: int) -> Tensor:
        """(B, H, T, d), with the heads of a token side by side in memory, as a projection leaves them."""
        return torch.randn(B, T, H, d, device=self.device).to(self.dtype).transpose(1, 2).requires_grad_()


def both(name: str, shape: str, run: Callable, inputs: Callable[[], tuple], work: Callable[..., Work],
         goals: tuple[str, str], rivals: dict[str, Callable] | None = None) -> Iterator[Case]:
    """Forward, and the gradients."""
    yield Case(name, shape, run, inputs, work(), goals[0], False, rivals or {})
    yield Case(f"{name} backward", shape, run, inputs, work(backward=True), goals[1], True, rivals or {})


def rival(label: str, path: str, adapt: Callable[[Callable], Callable]) -> dict[str, Callable]:
    """Another library's function, `package.module:name`, made one of our inputs; nothing where it is not installed."""
    module, name = path.split(":")
    try:
        return {label: adapt(getattr(importlib.import_module(module), name))}
    except (ImportError, AttributeError):
        return {}


def norms(s: Sizes) -> Iterator[Case]:
    goals = ("88 %", "80 %")
    liger = rival("Liger", "liger_kernel.ops.rms_norm:LigerRMSNormFunction",
                  lambda f: lambda x, g: f.apply(x, g, 1e-5, 0.0, "llama", False))
    for width in (1024, 4096, 8192, 16384):
        M, D = s(16384, width)
        yield from both("rms_norm", f"{M} x {D}", lambda x, g: norm.rms_norm(x, g, 1e-5),
                        lambda M=M, D=D: (s.draw(M, D), s.draw(D)), partial(roofline.norm, M, D), goals, liger)
    M, D = s(16384, 4096)
    yield from both("add_rms_norm", f"{M} x {D}", lambda x, y, g: norm.add_rms_norm(x, y, g, 1e-5),
                    lambda: (s.draw(M, D), s.draw(M, D), s.draw(D)), partial(roofline.norm, M, D, add=True), goals)
    yield from both("layer_norm", f"{M} x {D}", lambda x, g, b: norm.layer_norm(x, g, b, 1e-5),
                    lambda: (s.draw(M, D), s.draw(D), s.draw(D)), partial(roofline.norm, M, D), ("", ""))


def elementwise(s: Sizes) -> Iterator[Case]:
    B, T, H, d = s(2, 8192, 40, 128)
    cos, sin = (s.draw(1, 1, T, d).detach() for _ in range(2))
    yield Case("rotate", f"{B} x {T} x {H} x {d}", lambda x: rope.rotate(x, cos, sin, "half"),
               lambda: (s.heads(B, T, H, d),), roofline.rotate(B * T, H, d), "85 %")
    M, hidden = s(16384, 14336)
    liger = rival("Liger", "liger_kernel.ops.swiglu:LigerSiLUMulFunction", lambda f: f.apply)
    yield from both("gated", f"{M} x {hidden} silu", lambda g, u: mlp.gated(g, u, "silu"),
                    lambda: (s.draw(M, hidden), s.draw(M, hidden)), partial(roofline.gated, M, hidden),
                    ("90 %", "88 %"), liger)


def seen(T: int, window: int | None, documents: int, device: str) -> SimpleNamespace:
    """What `attend` asks of an AttentionMask: causal, within a window, in equal documents."""
    i, length = torch.arange(T, device=device), -(-T // documents)
    first = i // length * length if window is None else torch.maximum(i // length * length, i - window + 1)
    plain = window is None and documents == 1
    mask = attention.CAUSAL if plain else ((i[None] >= first[:, None]) & (i[None] <= i[:, None]))[None, None]
    return SimpleNamespace(first=first[None].int(), last=i[None].int(), slopes=None, dense=mask)


def attentions(s: Sizes) -> Iterator[Case]:
    for sizes, window, documents, goals in (
        ((2, 8192, 32, 8, 128), None, 1, ("430 TFLOP/s", "300 TFLOP/s")),
        ((4, 4096, 32, 32, 64), None, 1, ("350 TFLOP/s", "")),
        ((1, 16384, 32, 8, 128), 1024, 1, ("6 x full", "")), ((1, 16384, 32, 8, 128), None, 8, ("", "")),
    ):
        B, T, H, K, d = s(*sizes)
        W = window and min(window, T)
        others = {}
        if window is None and documents == 1:
            others["SDPA"] = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        if documents == 1:
            seen_back = (W - 1 if W else -1, 0)
            others |= rival("flash-attn", "flash_attn:flash_attn_func",
                            partial(tokens_first, causal=True, window_size=seen_back))
        shape = f"{B} x {T} x {H}/{K} x {d}"
        shape += (f", window {W}" if W else "") + (f", {documents} documents" if documents > 1 else "")
        run = partial(attending, seen(T, W, documents, s.device))
        work = partial(roofline.attend, B, H, K, T, d, window=W, documents=documents)
        yield from both("attend", shape, run, partial(qkv, s, B, T, T, H, K, d), work, goals, others)
    for rows, keys, goal in ((32, 8192, "85 %"), (1, 32768, "60 %")):
        B, S, H, K, d = s(rows, keys, 32, 8, 128)
        ends = torch.zeros(B, 1, dtype=torch.int32, device=s.device)
        mask = SimpleNamespace(first=ends, last=ends + S - 1, slopes=None, dense=None)
        flash = rival("flash-attn", "flash_attn:flash_attn_with_kvcache", tokens_first)
        yield Case("decode", f"{B} x {S} keys x {H}/{K} x {d}", partial(attending, mask),
                   partial(qkv, s, B, 1, S, H, K, d, trained=False), roofline.decode(B, H, K, S, d), goal, False, flash)


def tokens_first(f: Callable, **options: Any) -> Callable:
    """A function of q, k and v (B, T, heads, d) as one of (B, heads, T, d)."""
    return lambda q, k, v: f(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def attending(mask: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attend(q, k, v, mask, q.shape[-1] ** -0.5)


def qkv(s: Sizes, B: int, T: int, S: int, H: int, K: int, d: int, trained: bool = True) -> tuple[Tensor, ...]:
    drawn = s.heads(B, T, H, d), s.heads(B, S, K, d), s.heads(B, S, K, d)
    return drawn if trained else tuple(x.detach() for x in drawn)


def experts(s: Sizes) -> Iterator[Case]:
    N, D, hidden, E, k = s(32768, 2048, 768, 128, 8)

    def inputs() -> tuple:
        chosen, weights = torch.rand(N, E, device=s.device).topk(k).indices, torch.rand(N, k, device=s.device)
        gate, up = (s.draw(E, hidden, D, scale=D**-0.5) for _ in range(2))
        return s.draw(N, D), gate, up, s.draw(E, D, hidden, scale=hidden**-0.5), weights, chosen

    yield from both("expert_mlp", f"{N} x {D}, {k} of {E} x {hidden}", lambda *x: moe.expert_mlp(*x, "silu"), inputs,
                    partial(roofline.expert_mlp, N, D, hidden, E, k), ("400 TFLOP/s", "330 TFLOP/s with forward"))


def scans(s: Sizes) -> Iterator[Case]:
    B, T, I, N = s(8, 2048, 5120, 16)
    ones, start = torch.ones(I, device=s.device), torch.zeros(B, I, N, device=s.device)

    def inputs() -> tuple:
        A = (-torch.rand(I, N, device=s.device) - 0.5).requires_grad_()
        return s.draw(B, T, I), s.draw(B, T, I), A, s.draw(B, T, N), s.draw(B, T, N), s.draw(B, T, I)

    def ours(x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        return scan.mamba_scan(x, delta, ones, A, b, c, ones, z, start)[0]

    def theirs(f: Callable) -> Callable:
        turned = partial(torch.transpose, dim0=1, dim1=2)
        return lambda x, delta, A, b, c, z: turned(
            f(turned(x), turned(delta), A, turned(b), turned(c), ones, turned(z), ones, True))

    original = rival("mamba-ssm", "mamba_ssm.ops.selective_scan_interface:selective_scan_fn", theirs)
    yield from both("mamba_scan", f"{B} x {T} x {I} x {N}", ours, inputs, partial(roofline.mamba_scan, B, T, I, N),
                    ("50 %", ""), original)
    before = torch.zeros(B, I, 3, dtype=s.dtype, device=s.device)
    dao = rival("causal-conv1d", "causal_conv1d:causal_conv1d_fn",
                lambda f: lambda x, w, b: f(x.transpose(1, 2), w[:, 0], b, activation="silu"))
    yield from both("causal_conv", f"{B} x {T} x {I} x 4",
                    lambda x, w, b: mamba.causal_conv(x.transpose(1, 2), w, b, before, None),
                    lambda: (s.draw(B, T, I), s.draw(I, 1, 4), s.draw(I)), partial(roofline.causal_conv, B, T, I),
                    ("80 %", "80 %"), dao)


def duals(s: Sizes) -> Iterator[Case]:
    B, T, H, P, G, N = s(8, 2048, 80, 64, 1, 128)
    decay, first = torch.ones(H, device=s.device), torch.zeros(B, H, P, N, device=s.device)

    def inputs() -> tuple:
        delta = torch.rand(B, T, H, device=s.device).requires_grad_()
        A = (-torch.rand(H, device=s.device) - 0.5).requires_grad_()
        return s.draw(B, T, H, P), delta, A, s.draw(B, T, G, N), s.draw(B, T, G, N)

    yield from both("ssd", f"{B} x {T} x {H} x {P} x {N}",
                    lambda x, delta, A, b, c: ssd.ssd(x, delta, A, b, c, decay, first)[0], inputs,
                    partial(roofline.ssd, B, T, H, P, G, N, 256), ("33 %", ""))

    (B, c, H, P, N), Q = s(8, 32, 32, 128, 128), 16 if s.small else 64
    state, gamma = torch.zeros(B, H, P, N, device=s.device), torch.rand(B, c, H, device=s.device)

    def chunks() -> tuple:
        return tuple(s.draw(B, c, H, Q, width, scale=0.1).float().detach().requires_grad_() for width in (P + N, N))

    yield from both("delta_walk", f"{B} x {c * Q} x {H} x {P} x {N}",
                    lambda WY, K: delta.delta_walk(WY, K, gamma, state)[0], chunks,
                    partial(roofline.delta_walk, B, c * Q, H, P, N, Q), ("", ""))


def products(s: Sizes) -> Iterator[Case]:
    M, D, V = s(4096, 4096, 128256)
    targets = torch.randint(0, V, (M,), device=s.device)
    liger = rival("Liger", "liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction",
                  lambda f: lambda x, w: gradients(f.apply(x, w, targets, None, None, -100, 0.0, 0.0, "sum"), x, w))
    yield Case("linear_cross_entropy", f"{M} x {D} x {V}, with gradients",
               lambda x, w: gradients(losses.linear_cross_entropy(x, w, targets), x, w),
               lambda: (s.draw(M, D), s.draw(V, D, scale=D**-0.5)),
               roofline.linear_cross_entropy(M, D, V), "700 TFLOP/s", False, liger)
    (N,), K = s(28672), 128 if s.small else 8192
    for bits, group, goal in ((8, 128, "85 %"), (4, 128, "70 %")):
        packed = quantize.quantize_weight(s.draw(N, K).detach(), bits, group)
        dense = s.draw(N, K).detach()
        yield Case("quantized_linear", f"1 x {K} x {N} int{bits}",
                   lambda x, packed=packed: quantize.quantized_linear(x, *packed, None),
                   lambda K=K: (s.draw(1, K).detach(),), roofline.quantized_linear(1, N, K, bits, group), goal, False,
                   {"bfloat16": lambda x, w=dense: F.linear(x, w)})


def gradients(results: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of the first result."""
    return torch.autograd.grad(results[0], inputs)


def cases(s: Sizes) -> Iterator[Case]:
    """All of them."""
    for group in (norms, elementwise, attentions, experts, scans, duals, products):
        yield from group(s)
