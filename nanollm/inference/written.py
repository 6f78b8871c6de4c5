"""An answer as it is written: tokens become text, which is shown as it comes. Why it ended, `Answer.ended` (answer.py)
says; in JSON that is told in the words of OpenAI's API, which has no name for the end of the context:

    "stop" → "stop"      "length", "context" → "length"      "interrupted" → "interrupted"
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from nanollm.inference.answer import Answer, Ended, Stream
from nanollm.inference.generation import stream_text
from nanollm.inference.terminal import note
from nanollm.text.tokenizer import Tokenizer


@dataclass
class Written:
    """Empty until `write` fills it; what an interrupt leaves of it is whole up to there."""
    text: str = ""
    answer: Answer = field(default_factory=Answer)       # its tokens, and why it ended
    times: list[float] = field(default_factory=list)     # seconds on a clock: the start, then each token

    def write(self, tokens: Stream, tokenizer: Tokenizer, stop: Sequence[str], *, continues: bool,
              show: Callable[[str], None], interrupted: Callable[[], bool] = lambda: False) -> "Written":
        """Read all tokens, and show their text piece by piece. continues: they go on from text before them.

        `interrupted` is asked after each token; True ends the answer there.
        """
        self.answer, text = tokens.answer, tokenizer.stream(continues=continues)
        self.times.append(time.perf_counter())

        def pieces() -> Iterator[str]:
            for token in tokens:
                self.times.append(time.perf_counter())
                yield text.push(token)
                if interrupted():
                    break
            yield text.finish()

        try:
            for piece in stream_text(pieces(), stop):
                self.text += piece
                show(piece)
        finally:
            tokens.close()                                # an answer that had not ended is interrupted
        return self

    def cut(self, max_new_tokens: int) -> str:
        """What to say of an answer that a limit ended, after other words on it; else ""."""
        limits = {"length": f"--max-new-tokens {max_new_tokens}", "context": "the end of the context"}
        return f"; cut at {limits[self.answer.ended]}" if self.answer.ended in limits else ""

    @property
    def rate(self) -> float | None:
        """Tokens a second, after the first, which pays for the prompt."""
        made = len(self.times) - 2                        # after the first
        return made / (self.times[-1] - self.times[1]) if made > 0 else None

    @property
    def speed(self) -> str:
        """The same in words."""
        tokens = f"{len(self.answer.tokens)} tokens"
        if self.rate is None:
            return tokens
        return f"{tokens}; the first after {self.times[1] - self.times[0]:.2f} s, then {self.rate:.1f} tokens/s"


def finish_reason(ended: Ended | None) -> str | None:
    """Why an answer ended, in OpenAI's words."""
    return "length" if ended == "context" else ended


def until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop texts."""
    return "".join(stream_text([text], stop))


def warn(tokenizer: Tokenizer, ids: list[int], bos: bool | None = None) -> None:
    """What looks wrong about BOS and the stop tokens. bos: what --bos or --no-bos decided, if one was given."""
    for warning in [*tokenizer.doctor(), *tokenizer.warnings(ids)]:
        if bos is None or "--bos" not in warning:         # the advice was heard
            note(f"warning: {warning}")
