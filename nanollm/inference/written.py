"""An answer as it is written: tokens become text, which is shown as it comes, and in the end it is known why it ended.

    finish_reason   "stop"          a stop token, or one of the stop texts
                    "length"        as many tokens as were asked for, or the end of the context
                    "interrupted"   Ctrl-C
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from nanollm.inference.generation import stream_text
from nanollm.inference.terminal import note
from nanollm.text.tokenizer import Tokenizer


@dataclass
class Written:
    """Empty until `write` fills it; what an interrupt leaves of it is whole up to there."""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    times: list[float] = field(default_factory=list)     # seconds on a clock: the start, then each token

    def write(self, tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str], *, continues: bool,
              show: Callable[[str], None], interrupted: Callable[[], bool] = lambda: False) -> "Written":
        """Read all tokens, and show their text piece by piece. continues: they go on from text before them.

        `interrupted` is asked after each token; True ends the answer there.
        """
        stream, whole = tokenizer.stream(continues=continues), False
        self.times.append(time.perf_counter())

        def pieces() -> Iterator[str]:
            nonlocal whole
            for token in tokens:
                self.times.append(time.perf_counter())
                self.tokens.append(token)
                yield stream.push(token)
                if interrupted():
                    yield stream.finish()
                    return
            yield stream.finish()
            whole = True

        for piece in stream_text(pieces(), stop):
            self.text += piece
            show(piece)
        if whole:
            self.finish_reason = finish_reason(self.tokens, tokenizer.stop_ids)
        elif not interrupted():
            self.finish_reason = "stop"                   # stream_text has met a stop text, and asks for no more
        return self

    @property
    def rate(self) -> float | None:
        """Tokens a second, after the first, which pays for the prompt."""
        return (len(self.tokens) - 1) / (self.times[-1] - self.times[1]) if len(self.tokens) > 1 else None

    @property
    def speed(self) -> str:
        """The same in words."""
        if self.rate is None:
            return f"{len(self.tokens)} tokens"
        return (f"{len(self.tokens)} tokens; the first after {self.times[1] - self.times[0]:.2f} s, "
                f"then {self.rate:.1f} tokens/s")


def finish_reason(tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Of an answer that no stop text ended."""
    return "stop" if tokens and tokens[-1] in stop_ids else "length"


def until(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of the stop texts, and whether there was one."""
    found = [at for at in map(text.find, stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


def warn(tokenizer: Tokenizer, ids: list[int], bos: bool | None = None) -> None:
    """What looks wrong about BOS and the stop tokens. bos: what --bos or --no-bos decided, if one was given."""
    for warning in [*tokenizer.doctor(), *tokenizer.warnings(ids)]:
        if bos is None or "--bos" not in warning:         # the advice was heard
            note(f"warning: {warning}")
