"""RoPE for longer contexts: what becomes of the angles f_j = θ^(−2j/r) beyond the length a model was trained for.

    Linear       f_j / s                                       all alike
    Proportional f_j for the first share of the pairs, else 0  a far key differs by what turns slowly, or not at all
    Llama3       fast pairs kept, slow ones divided by s       by how often a pair turns within the original context L
    Yarn         the same, by a ramp over j                    and a temperature on the scores
    LongRope     f_j / a searched divisor                      one list up to L, another beyond it
    DynamicNTK   θ grows with the length n of the sequence     once n > L
    SteppedNTK   the same, in steps

and what queries are multiplied by there, so that a softmax over more keys stays as sharp:

    LogLength    max(1, log_L n)                               the n-th token; Su 2021, Qwen's use_logn_attn
    LogSteps     1 + β ln(1 + ⌊p / L⌋)                         at position p; Ministral 3
    LogTokenSteps    the same of p + 1                         Llama 4; Nakanishi 2025 (arXiv 2501.19399)

Shapes: B batch, T tokens, r rotated channels. The last three formulas of angles depend on n, so a longer sequence turns
*all* its tokens by other angles; `length_key` says when. The meaning is always that of one full pass over the whole
sequence.
"""

import math

import torch
from torch import Tensor

from nanollm.config import (
    DynamicNTK,
    Linear,
    Llama3,
    LogLength,
    LogSteps,
    LogTokenSteps,
    LongRope,
    Proportional,
    Rope,
    Scaling,
    SteppedNTK,
    Yarn,
)
from nanollm.config.scaling import Growth


def scaled_frequencies(scaling: Scaling, theta: float, r: int, exponents: Tensor, lengths: Tensor) -> Tensor:
    """f_j from exponents 2j/r (r/2,): (r/2,), or (B, T, r/2) where they follow lengths (B, T)."""
    match scaling:
        case Linear(factor):                                                    # Chen et al. 2023, arXiv 2306.15595
            return 1 / theta ** exponents / factor
        case Proportional(share):
            return 1 / theta ** exponents * (torch.arange(r // 2, device=exponents.device) < int(share * r // 2))
        case Llama3():
            return llama3(scaling, 1 / theta ** exponents)
        case Yarn():
            return yarn(scaling, theta, r, exponents)
        case LongRope():
            return longrope(scaling, theta, exponents, lengths)
        case DynamicNTK():
            return dynamic_ntk(scaling, theta, r, exponents, lengths)
        case SteppedNTK():
            return stepped_ntk(scaling, theta, r, exponents, lengths)
    raise AssertionError(scaling)


def dynamic_ntk(s: DynamicNTK, theta: float, r: int, exponents: Tensor, lengths: Tensor) -> Tensor:
    """A larger base, so that the slowest pair is stretched by the factor and the fastest not at all (emozilla 2023).

        θ' = θ · (s·n/L − (s − 1))^(r/(r−2)),   n = the sequence's length, at least the original context L
    """
    n = lengths.clamp(min=s.original)[..., None]
    base = theta * (s.factor * n / s.original - (s.factor - 1)) ** (r / (r - 2))
    return 1 / base ** exponents


def stepped_ntk(s: SteppedNTK, theta: float, r: int, exponents: Tensor, lengths: Tensor) -> Tensor:
    """θ' = θ · α^(r/(r−2)),   α = 2^⌈log₂(n/L) + 1⌉ − 1, at least 1: 1, 3, 7, … for n up to L, 2L, 4L, … (Qwen-7B).

    Since α is 1 up to L, a sequence that short is turned as it was in training.
    """
    base = theta * growth(s, lengths)[..., None] ** (r / (r - 2))
    return 1 / base ** exponents


def growth(s: SteppedNTK, lengths: Tensor) -> Tensor:
    """α of `stepped_ntk`. log₂ of a float32 quotient is exact at powers of two, where the steps are."""
    return (2.0 ** torch.ceil(torch.log2(lengths / s.original) + 1) - 1).clamp(min=1)


def llama3(s: Llama3, f: Tensor) -> Tensor:
    """Meta's rule for Llama 3.1: by how often a pair turns within the original context.

        turns > high: f     turns < low: f / s     between: (1 − γ) f/s + γ f,   γ = (turns − low) / (high − low)
    """
    turns = s.original * f / (2 * math.pi)
    gamma = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    return (1 - gamma) * f / s.factor + gamma * f


def yarn(s: Yarn, theta: float, r: int, exponents: Tensor) -> Tensor:
    """Peng et al. 2023 (arXiv 2309.00071) §3.2: as `llama3`, with the ramp over the pair's index.

    Pair j(c) = r ln(L / 2πc) / (2 ln θ) makes c turns within the original context L (eq. 17, solved for j).
    """
    def pair_with(turns: float) -> float:
        return r * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(s.fast), pair_with(s.slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, r - 1)
    pairs = torch.arange(r // 2, device=exponents.device).float()
    kept = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)         # 1: as it was, 0: divided by the factor
    powers = theta ** exponents
    return 1 / (s.factor * powers) * (1 - kept) + 1 / powers * kept


def longrope(s: LongRope, theta: float, exponents: Tensor, lengths: Tensor) -> Tensor:
    """Ding et al. 2024 (arXiv 2402.13753): a searched divisor a pair, the long list for every token of a long one."""
    short, long = (torch.tensor(divisors, device=lengths.device) for divisors in (s.short, s.long))
    divisors = torch.where(lengths[..., None] > s.original, long, short)        # (B, T, r/2)
    return 1 / (divisors * theta ** exponents)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by: YaRN's and LongRoPE's temperature on the scores, else 1."""
    match rope.scaling:
        case Yarn(factor=factor, attention_factor=given):
            if given is not None:
                return given
            return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0            # arXiv 2309.00071, eq. 22
        case LongRope(attention_factor=given):
            return given
    return 1.0


def length_key(rope: Rope | None, lengths: Tensor) -> Tensor | None:
    """What of the lengths the frequencies depend on; None: nothing. Another key means other angles for *all* tokens."""
    scaling = None if rope is None else rope.scaling
    match scaling:
        case DynamicNTK(original=original):
            return lengths.clamp(min=original)
        case LongRope(original=original):
            return (lengths > original).long()
        case SteppedNTK():
            return growth(scaling, lengths)
    return None


def grown(growth: Growth, positions: Tensor) -> Tensor:
    """What queries are multiplied by, float32, for positions (B, T)."""
    match growth:
        case LogLength(original):
            return torch.log((positions + 1).clamp(min=original).float()) / math.log(original)
        case LogTokenSteps(original, beta):
            return 1 + beta * torch.log1p(torch.floor((positions + 1) / original))
        case LogSteps(original, beta):
            return 1 + beta * torch.log(1 + torch.floor(positions.clamp(min=0) / original))
    raise AssertionError(growth)
