"""Answers that follow a grammar: a JSON schema, a Lark grammar, a regular expression.

    constrain = Grammar(tokenizer, "json_schema", '{"type": "integer"}', "number.json")
    answer_batch(model, prompts, 64, constrain=constrain)

    mask        −∞ for each token v where no text of the grammar begins with answer ‖ v, both as bytes
    complete    the answer is a text of the grammar: a stop token may come. Where nothing else may, it ends by itself

The set of such tokens is what llguidance computes (github.com/guidance-ai/llguidance, an Earley parser over a trie of
all tokens; pip install -e ".[constrain]"). It knows a token by its bytes, so a text may be cut into tokens anywhere,
inside a character too, and any way of cutting it is allowed (`no_forcing`): what is drawn is what the model would draw,
of what may follow. Special tokens are no text; a Lark grammar may name one, as <|name|>.

Shapes: V vocabulary.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanollm.errors import InputError
from nanollm.text.tokenizer import Tokenizer

Kind = Literal["json_schema", "lark", "regex"]
_NAMES = {"json_schema": "JSON schema", "lark": "Lark grammar", "regex": "regular expression"}
ANY_CUT = '\n%llguidance {"no_forcing": true}\n'        # else a text that must follow comes as the tokenizer cuts it


class Grammar:
    """Called, it makes the `Constraint` of one answer."""

    def __init__(self, tokenizer: Tokenizer, kind: Kind, source: str, where: str) -> None:
        """where: the file or the option that `source` is from. Raises InputError for what is no grammar, or has a part
        that llguidance does not know, and where llguidance is not installed."""
        schema = _schema(source, where) if kind == "json_schema" else None
        try:
            import llguidance
        except ImportError:
            raise InputError(f'{where}: a grammar needs llguidance: pip install -e ".[constrain]"') from None
        if kind == "json_schema":
            source = f"start: %json {json.dumps(schema)}"
        elif kind == "regex":
            source = json.loads(llguidance.LLMatcher.grammar_from_regex(source))["grammars"][0]["lark_grammar"]
        words = _Words(tokenizer)
        self.where, self.size = where, tokenizer.vocab_size
        cut = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=words.ends)
        self.matcher = llguidance.LLMatcher(cut, source + ANY_CUT, log_level=0)
        _check(self.matcher, where)

    @classmethod
    def read(cls, tokenizer: Tokenizer, kind: Kind, path: Path) -> "Grammar":
        """The grammar of a file. Raises InputError, with its name."""
        try:
            return cls(tokenizer, kind, path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a file with a {_NAMES[kind]}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: found the byte 0x{error.object[error.start]:02x} at {error.start}, "
                             "expected UTF-8") from None

    def __call__(self) -> "Matching":
        return Matching(self.matcher.deep_copy(), self.size, self.where)


class Matching:
    """The `Constraint` (sample.py) of one answer."""

    def __init__(self, matcher: Any, size: int, where: str) -> None:
        """size: tokens that the tokenizer has; those of the model beyond are no text."""
        self.matcher, self.size, self.where = matcher, size, where

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with −∞ at the tokens that the grammar does not go on with."""
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")[: self.size]
        _check(self.matcher, self.where)
        allowed = torch.zeros(max(len(bits), len(logits)), dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits).bool()
        return logits.masked_fill(~allowed[: len(logits)].to(logits.device), -torch.inf)

    def accept(self, token: int) -> bool:
        """Whether the answer, with this token, is a text of the grammar that no other goes on from."""
        self.matcher.consume_token(token)
        _check(self.matcher, self.where)
        return self.matcher.is_stopped()


class _Words:
    """The vocabulary as llguidance asks for it. An id that stands for nothing has no bytes, and is never allowed."""
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens = [tokenizer.backend.bytes_of(id) or b"" for id in range(tokenizer.vocab_size)]
        self.ends = [id for id in tokenizer.stop_ids if 0 <= id < len(self.tokens)]
        if not self.ends:                                 # it asks for one; `Grammar.size` keeps it out of the masks
            self.ends = [len(self.tokens)]
            self.tokens.append(b"<end>")
        self.eos_token_id = self.ends[0]
        self.special_token_ids = sorted({*self.ends, *tokenizer.special_tokens.values()})

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, continues=True)


def _schema(source: str, where: str) -> dict[str, Any]:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error!s:.80})") from None
    if not isinstance(schema, dict):
        raise InputError(f"{where}: found {str(schema)[:80]}, expected a JSON schema, an object")
    return schema


def _check(matcher: Any, where: str) -> None:
    """Raise what the matcher has met, without the source lines and the dump of its state that follow the message."""
    if matcher.is_error():
        lines = matcher.get_error().partition("<state>")[0].splitlines()
        message = " ".join(line.strip() for line in lines if not re.match(r"\s*(\d+ \||\^)", line))
        raise InputError(f"{where}: {re.sub('^at .* JSON schema: ', '', message).strip()}")
