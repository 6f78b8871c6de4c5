"""lm-evaluation-harness asks, our decoder answers: the three kinds of request, and its chat templates.

    loglikelihood            (context, continuation) → log p, and whether decoding would write it       scoring.py
    loglikelihood_rolling    a text → its log p, in disjoint windows                                    perplexity.py
    generate_until           (context, {"until": […], "max_gen_toks": …}) → text                        generation.py

What text becomes which tokens is what the harness does with transformers' tokenizers, so that figures can be compared:
the tokenizer's own BOS before a context, unless it begins with one; special tokens in a prompt are special; a space at
the end of a context moves to the continuation (TemplateLM does it); what is too long loses its beginning; the first
token of a text follows BOS, or else EOS.

This module imports lm_eval, so it is imported where a task is asked for, and nowhere else.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from nanollm.errors import InputError
from nanollm.inference.context import cache_bytes, own_context
from nanollm.inference.generation import StopText, answer_batch
from nanollm.inference.machine import free_memory
from nanollm.inference.perplexity import perplexity
from nanollm.inference.sample import Sampling
from nanollm.inference.scoring import fitting, scores, start_id
from nanollm.model import Decoder
from nanollm.text.render import render
from nanollm.text.tokenizer import Tokenizer

UNKNOWN = 2048          # tokens of context, where config.json does not say: the harness's own value
NEW = 256               # tokens of a generation, where a task does not say: the same
ROWS = 64               # generations at once, at most
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")     # of a task's generation_kwargs


@dataclass(frozen=True)
class Asked:
    """One request, and our answer, for who compares it."""
    kind: str
    instance: Instance
    answer: Any


class NanoLM(TemplateLM):
    """A decoder and its tokenizer, as the harness calls them."""
    backend = "causal"

    def __init__(self, model: Decoder, tokenizer: Tokenizer, name: str, budget: int | None = None) -> None:
        """name: of the model, for the results. budget: tokens in a batch, None for what the memory holds."""
        super().__init__()
        self.model, self.tokenizer, self.name, self.budget = model, tokenizer, name, budget
        self.context = own_context(model.config) or UNKNOWN
        self.start = start_id(tokenizer)
        self.start_text = tokenizer.decode([self.start], skip_special=False)
        self.asked: list[Asked] = []
        self.chats: list[tuple[list[dict[str, str]], bool, str]] = []

    @property
    def eot_token_id(self) -> int:
        """The harness's word for the end of a text."""
        return self.tokenizer.stop_ids[0] if self.tokenizer.eos_id is None else self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text."""
        return self.start

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells caches apart."""
        return self.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text."""
        begins = add_special_tokens if add_special_tokens is not None else not string.startswith(self.start_text)
        found = self.tokenizer.encode(string, bos=False, special=True)
        return [*self.tokenizer.prefix, *found] if begins else found

    # ---- how likely

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
                              disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.context:
                raise InputError(f"a continuation of {len(continuation)} tokens: expected 1 to {self.context}, what "
                                 "the model reads at once")
            pairs.append((context[-(self.context + 1 - len(continuation)) :], continuation))
        found: list[Any] = [None] * len(pairs)
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or None, leave=False) as bar:
            for index, score in scores(self.model, pairs, self.budget):
                found[index] = score.total, score.greedy
                bar.update()
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness splits them into tokens."""
        return self._kept("loglikelihood", requests, super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts. An empty one is certain."""
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm or None, leave=False):
            ids = [self.start, *self.tok_encode(request.args[0])]
            known = len(ids) > 1 and perplexity(self.model, ids, self.context, self.context, self.budget)
            found.append(-known.nats.sum().item() if known else 0.0)
        return self._kept("loglikelihood_rolling", requests, found)

    # ---- text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """In batches of requests that are generated alike, the longest first."""
        alike: dict[str, list[int]] = {}
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generations", disable=disable_tqdm or None, leave=False) as bar:
            for how, group in alike.items():
                order = sorted(group, key=lambda index: len(prompts[index]), reverse=True)
                while order:
                    batch, order = self._write(json.loads(how), order, prompts, found)
                    bar.update(len(batch))
        return self._kept("generate_until", requests, found)

    def _write(self, how: dict[str, Any], order: list[int], prompts: list[list[int]],
               found: list[str]) -> tuple[list[int], list[int]]:
        """Answer as many of the requests as fit at once; those, and the rest."""
        kwargs = dict(normalize_gen_kwargs(how, NEW))
        until, new, drawn = kwargs.pop("until"), kwargs.pop("max_gen_toks"), kwargs.pop("do_sample", False)
        if unknown := kwargs.keys() - {*SAMPLING}:
            raise InputError(f"generation_kwargs: found {min(unknown)}, expected until, max_gen_toks, do_sample, "
                             f"{', '.join(SAMPLING)}")
        if new >= self.context:
            raise InputError(f"max_gen_toks {new}: expected less than the {self.context} tokens of the context")
        sampling = Sampling(**{"seed": 0, "temperature": 1.0, **kwargs}) if drawn else Sampling()
        longest = min(len(prompts[order[0]]), self.context - new)
        batch = order[: self._rows(longest, new)]
        answers = answer_batch(
            self.model, [prompts[index][-(self.context - new) :] or [self.start] for index in batch], new, sampling,
            stop_ids=self.tokenizer.stop_ids,
            stop=lambda: StopText(self.tokenizer.stream(skip_special=False), [text for text in until if text]))
        for index, answer in zip(batch, answers, strict=True):
            found[index] = postprocess_generated_text(self.tokenizer.decode(answer.tokens), until, None)
        return batch, order[len(batch) :]

    def _rows(self, longest: int, new: int) -> int:
        """Prompts at once: their tokens fit in a batch, and their cache in half of what is free."""
        weight, free = self.model.embed.weight, free_memory(self.model.embed.weight.device)
        rows = max(1, min(ROWS, (self.budget or fitting(self.model, longest)) // max(1, longest)))
        cache = cache_bytes(self.model.config, longest + new, weight.dtype)
        return rows if free is None else max(1, min(rows, free // 2 // max(1, cache)))

    # ---- chats

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text. Without a question for an answer it ends with its last message, which goes on."""
        template = self.chat_template(True)
        text = render(template, chat_history, add_generation_prompt=add_generation_prompt,
                      **self.tokenizer.named_tokens)
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        self.chats.append((chat_history, add_generation_prompt, text))
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's own. Raises InputError where it has none."""
        if self.tokenizer.chat_template is None:
            raise InputError(f"--apply-chat-template: {self.tokenizer.folder} has no chat template")
        return self.tokenizer.chat_template

    def _kept(self, kind: str, requests: list[Instance], answers: list[Any]) -> list[Any]:
        self.asked += [Asked(kind, request, answer) for request, answer in zip(requests, answers, strict=True)]
        return answers
