"""Chats: a list of messages, written out by the model's own template (render.py), then encoded.

    messages ──render──▶ text ──encode(special=True, bos=False)──▶ ids
             template           the template writes BOS itself, or wants none

A user who types "<|im_end|>" must not end the turn. `Conversation.prompt_ids` therefore puts special tokens inside the
messages between two Unicode noncharacters, OPEN and CLOSE, which survive the template; the tokenizer encodes what they
enclose as plain text.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from nanollm.errors import TokenizerError
from nanollm.text.render import render
from nanollm.text.templates import no_template
from nanollm.text.tokenizer import CLOSE, OPEN, Tokenizer


@dataclass
class Conversation:
    """The messages so far, {"role": …, "content": …}. `tools` are JSON schemas, for templates that show them.

    Raises TokenizerError where the tokenizer has no template for such a chat.
    """
    tokenizer: Tokenizer
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.template_for(self.tools) is None:
            raise TokenizerError(f"{no_template(self.tokenizer)}; or put a chat_template.jinja into the folder, "
                                 "or give --prompt without --chat")

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def prompt_ids(self, **extra: Any) -> list[int]:
        """The ids that ask for the next message of the assistant. `extra` are further variables of the template."""
        special = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
        template = self.tokenizer.template_for(self.tools)
        assert template is not None, "__post_init__ refuses a tokenizer without one"
        text = render(template, _mark(self.messages, pattern), tools=_mark(self.tools, pattern),
                      **(self.tokenizer.named_tokens | extra))
        ids = self.tokenizer.encode(text, bos=False, special=True)
        return [*self.tokenizer.prefix, *ids] if self.tokenizer.chat_begins else ids


def _mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """The same messages, with each special token in their texts between OPEN and CLOSE; their own marks are dropped."""
    if isinstance(value, str):
        return pattern.sub(lambda match: OPEN + match[0] + CLOSE, re.sub(f"[{OPEN}{CLOSE}]", "", value))
    if isinstance(value, dict):
        return {key: _mark(item, pattern) for key, item in value.items()}
    return [_mark(item, pattern) for item in value] if isinstance(value, (list, tuple)) else value
