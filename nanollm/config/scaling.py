"""How the angles of RoPE are stretched for longer contexts, and how queries grow there, as data: a class each.

The formulas: layers/scaling.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from nanollm.config.checks import Part, need, need_positive, need_sizes


@dataclass(frozen=True)
class Linear(Part):
    """Position interpolation: every angle divided by one factor."""
    factor: float                           # context grows by this much; DeepSeek-Coder 4.0

    def __post_init__(self) -> None:
        need_positive(self, "factor")


@dataclass(frozen=True)
class Proportional(Part):
    """Of the pairs the fastest turn, at their angles among all; the others stand still."""
    share: float                            # of all pairs; Gemma 4 0.25 in its layers without a window

    def __post_init__(self) -> None:
        need_positive(self, "share")
        need(self.share <= 1, self, "share", "at most 1")


@dataclass(frozen=True)
class DynamicNTK(Part):
    """The base grows with the length of the sequence, once that is longer than the original context."""
    factor: float                           # how fast the base grows; InternLM2 2.0
    original: int                           # context the model was trained on; 32768

    def __post_init__(self) -> None:
        need_positive(self, "factor")
        need_sizes(self, "original")


@dataclass(frozen=True)
class SteppedNTK(Part):
    """As DynamicNTK, in steps: the base grows as the length passes another power of two times the original context."""
    original: int                           # 2048 (Qwen-7B), 8192

    def __post_init__(self) -> None:
        need_sizes(self, "original")


@dataclass(frozen=True)
class Llama3(Part):
    """Slow angles divided by the factor, fast ones kept, a linear blend between."""
    factor: float                           # slow angles are divided by it; 8.0 (Llama-3.1), 32.0 (3.2)
    original: int                           # context before the stretch; 8192
    low: float = 1.0                        # fewer turns than this over `original`: slow
    high: float = 4.0                       # more turns than this: fast

    def __post_init__(self) -> None:
        need_positive(self, "factor", "low", "high")
        need_sizes(self, "original")
        need(self.high > self.low, self, "high", f"more than low ({self.low})")


@dataclass(frozen=True)
class Yarn(Part):
    """As Llama3, with a ramp over the index of the angle, and a temperature on the logits."""
    factor: float                           # how much the context grows; 4.0 (Qwen2.5 at 128k)
    original: int                           # context before the stretch; 32768
    fast: float = 32.0                      # turns over `original` above which an angle is kept (β in the paper)
    slow: float = 1.0                       # turns below which it is divided by the factor (α)
    truncate: bool = True                   # round the ends of the ramp outwards to whole indices
    attention_factor: float | None = None   # multiplies cos and sin; None is 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        need_positive(self, "factor", "fast", "slow")
        need_sizes(self, "original")


@dataclass(frozen=True)
class LongRope(Part):
    """A searched divisor for each angle: one list up to the original context, another beyond it."""
    short: tuple[float, ...]                # rotated width / 2 numbers, used while the sequence fits `original`
    long: tuple[float, ...]                 # as many, used for the whole sequence once it is longer
    original: int                           # 4096 (Phi-3)
    attention_factor: float = 1.0           # multiplies cos and sin; √(1 + ln(factor) / ln(original))

    def __post_init__(self) -> None:
        need_sizes(self, "original")
        need(len(self.short) == len(self.long), self, "long", f"as many numbers as short ({len(self.short)})")
        need(all(x > 0 for x in self.short + self.long), self, "long", "numbers above 0, and so in short")


@dataclass(frozen=True)
class LogLength(Part):
    """Queries past the original context grow with the logarithm of their position."""
    original: int                           # the base of the logarithm; Qwen-7B 2048
    rounded: ClassVar[bool] = True          # the factor to the working dtype, before it multiplies

    def __post_init__(self) -> None:
        need_sizes(self, "original")
        need(self.original > 1, self, "original", "more than 1")


@dataclass(frozen=True)
class LogSteps(Part):
    """Queries grow with the logarithm of how many original contexts lie before them."""
    original: int                           # 16384 (Ministral 3)
    beta: float                             # times the logarithm; 0.1
    rounded: ClassVar[bool] = True          # as above

    def __post_init__(self) -> None:
        need_sizes(self, "original")
        need_positive(self, "beta")


@dataclass(frozen=True)
class LogTokenSteps(LogSteps):
    """The same, where the token itself counts among those before it; Llama 4, original 8192."""
    rounded = False


Scaling = Linear | Proportional | DynamicNTK | SteppedNTK | Llama3 | Yarn | LongRope
Growth = LogLength | LogSteps | LogTokenSteps
