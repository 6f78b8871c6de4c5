"""What is asked of a model beside the prompts: how many tokens, how they are drawn, where they end, what is told.

    request = Request(tokenizer, 64, Sampling(0.7), stop=["\\n\\n"], n=3, logprobs=2)
    answers = answer_batch(model, prompts, 64, samples=3, **request.how(continues=True))
    request.told(answers[0], request.text(answers[0], continues=True), 0)

In JSON an answer has the keys and words of OpenAI's API:

    {"index": 0, "answer": " a big blue", "finish_reason": "length", "logprobs": {"content": [
        {"token": " a", "logprob": -1.5, "bytes": [32, 97], "top_logprobs": [{"token": " a", …}, …]}, …]}}

"content" has an object a token, a stop token included; the log-probabilities are the model's own (`raw` in answer.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanollm.inference.answer import Answer, Logprob, TokenLogprobs
from nanollm.inference.generation import Constrain, StopText
from nanollm.inference.sample import Sampling
from nanollm.inference.written import finish_reason, until
from nanollm.text.tokenizer import Tokenizer

LEAST = -9999.0         # log p of what cannot be: JSON has no −∞, and OpenAI's API says this


@dataclass(frozen=True)
class Request:
    """The same for each prompt."""
    tokenizer: Tokenizer
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()                    # texts that end an answer, beside those of the template
    n: int = 1                                  # samples of each prompt
    logprobs: int | None = None                 # likeliest tokens that are told beside each chosen one; None: no log p
    constrain: Constrain | None = None          # makes what an answer is held to: a grammar (constrained.py)

    def next_seed(self, count: int) -> "Request":
        """The same with a seed that is `count` further on, where there is one."""
        seed = self.sampling.seed
        return self if seed is None else replace(self, sampling=replace(self.sampling, seed=seed + count))

    @property
    def stop_texts(self) -> list[str]:
        """All of them."""
        return [*self.stop, *self.tokenizer.stop_texts]

    def keeps_space(self, continues: bool) -> bool:
        """Whether the space that an answer begins with is its own (`Tokenizer.decode`): where it goes on from text, and
        where a grammar says how it begins."""
        return continues or self.constrain is not None

    def how(self, continues: bool) -> dict[str, Any]:
        """What `Session.generate` and `answer_batch` take by name. continues: answers go on from text before them."""
        keeps = self.keeps_space(continues)
        return {"sampling": self.sampling, "stop_ids": self.tokenizer.stop_ids, "constrain": self.constrain,
                "logprobs": self.logprobs,
                "stop": lambda: StopText(self.tokenizer.stream(continues=keeps), self.stop_texts)}

    def text(self, answer: Answer, continues: bool) -> str:
        """The answer's text, up to a stop text."""
        return until(self.tokenizer.decode(answer.tokens, continues=self.keeps_space(continues)), self.stop_texts)

    @property
    def added(self) -> tuple[str, ...]:
        """The keys of an answer in JSON."""
        return ("index",) * (self.n > 1) + ("answer", "finish_reason") + ("logprobs",) * (self.logprobs is not None)

    def told(self, answer: Answer, text: str, index: int) -> dict[str, Any]:
        """The answer with these keys. index: of the sample."""
        values: dict[str, Any] = {"index": index, "answer": text, "finish_reason": finish_reason(answer.ended)}
        content = self.likely(answer.logprobs)
        return {name: (values | {"logprobs": {"content": content}})[name] for name in self.added}

    def likely(self, found: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """The "content" above, of these tokens."""
        return [self._likely(each.chosen) | {"top_logprobs": [self._likely(other) for other in each.top]}
                for each in found]

    def _likely(self, token: Logprob) -> dict[str, Any]:
        data = self.tokenizer.backend.bytes_of(token.token) or b""             # none: it stands for nothing
        return {"token": data.decode("utf-8", "replace"), "logprob": max(token.raw, LEAST), "bytes": [*data]}
