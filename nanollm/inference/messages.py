"""What a body of /v1/chat/completions says to the model: its messages and its tools, checked. The rest of it: api.py.

    role          content                                     beside it
    system        text, or [{"type": "text", "text": …}, …]   name       developer is another name of it
    user          the same                                    name
    assistant     the same, or none where it calls tools      tool_calls: [{"function": {"name", "arguments": JSON}}, …]
    tool          the same                                    tool_call_id

A template is a program, and what it does not ask for it passes over: whether it shows tools, and calls of them, is seen
by what it writes with and without.
"""

import json
from typing import Any

from nanollm.errors import InputError, TokenizerError, did_you_mean
from nanollm.text.chat import Conversation, mark
from nanollm.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
# the last two come back with answers of others: Qwen's and DeepSeek's templates read the thoughts, the rest is nobody's
KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "annotations")
TEXTS = ("text", "input_text", "output_text")
OURS = ("messages", "tools", "template", "cuts", "add_generation_prompt", "bos_token", "eos_token")


class BadRequest(InputError):
    """A body that cannot be answered."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def short(value: Any) -> str:
    """A value of a body, as it is told in an error: whole, or its beginning and an ellipsis."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "what is nested too deeply"
    return text if len(text) <= 100 else f"{text[:100]} …"


# ---- messages

def read_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages as templates read them: text in one piece, arguments of calls as objects."""
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else f"found {short(value)}"
        raise BadRequest(f'messages: {found}, expected [{{"role": "user", "content": "…"}}, …]', "messages")
    return [read_message(message, f"messages[{at}]") for at, message in enumerate(value)]


def read_message(message: Any, where: str) -> dict[str, Any]:
    """One of them."""
    if not isinstance(message, dict):
        raise BadRequest(f'{where}: found {short(message)}, expected {{"role": "user", "content": "…"}}', "messages")
    for key, value in message.items():
        if key not in KEYS and value is not None:
            raise BadRequest(f"{where}: unknown key {key[:60]}{did_you_mean(key[:60], KEYS)}", "messages")
    role, content, calls = (message.get(name) for name in ("role", "content", "tool_calls"))
    if role not in ROLES:
        raise BadRequest(f"{where}: role {short(role)}, expected {', '.join(ROLES)}", "messages")
    made = {key: value for key, value in message.items() if value is not None and key in KEYS}
    if calls and role != "assistant":
        raise BadRequest(f"{where}: tool_calls of role {role}; expected them of the assistant", "messages")
    if calls:
        made["tool_calls"] = read_calls(calls, where)
    else:
        made.pop("tool_calls", None)
    text = "" if content is None and calls else read_text(content, where)
    return made | {"role": "system" if role == "developer" else role, "content": text}


def read_text(content: Any, where: str) -> str:
    """The text of a message. Raises BadRequest where there is none: an empty one has to be meant."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") not in TEXTS or not isinstance(part.get("text"), str):
                raise BadRequest(f'{where}: content {short(part)}: this model reads text alone; expected '
                                 '{"type": "text", "text": "…"}', "messages")
        return "".join(part["text"] for part in content)
    found = "missing" if content is None else f"found {short(content)}"
    raise BadRequest(f'{where}: content: {found}, expected text, or [{{"type": "text", "text": "…"}}]', "messages")


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools whose arguments are the objects that their JSON spells."""
    made = []
    try:
        for call in calls:
            function = call["function"]
            arguments = json.loads(function["arguments"])
            if not (isinstance(function["name"], str) and isinstance(arguments, dict)):
                raise ValueError
            made.append(call | {"function": function | {"arguments": arguments}})
    except (TypeError, KeyError, ValueError, RecursionError):
        raise BadRequest(f'{where}: tool_calls: found {short(calls)}, expected [{{"type": "function", "function": '
                         '{"name": …, "arguments": "JSON of an object"}}, …]', "messages") from None
    return made


# ---- tools

def read_tools(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that the model may call; None where there are none."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise BadRequest(f"tool_choice {short(choice)}: no call can be forced here; expected auto or none",
                         "tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(map(is_tool, tools))):
        raise BadRequest('tools: expected [{"type": "function", "function": {"name": …, "parameters": {…}}}, …]',
                         "tools")
    names = [tool["function"]["name"] for tool in tools or ()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadRequest(f"tools: two are called {short(twice)}; expected names that differ", "tools")
    return None if choice == "none" else tools or None


def is_tool(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"] != ""
            and isinstance(function.get("parameters") or {}, dict))


# ---- what the template makes of them

def read_variables(body: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """chat_template_kwargs: further variables of the template, {"enable_thinking": false}; and reasoning_effort."""
    name, value = "chat_template_kwargs", body.get("chat_template_kwargs")
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f'{name}: found {short(value)}, expected an object, {{"enable_thinking": false}}', name)
    if taken := next((key for key in value or () if key in (*OURS, *tokenizer.named_tokens)), None):
        raise BadRequest(f"{name}: {taken} is the server's to say; leave it out", name)
    effort = body.get("reasoning_effort")                   # a hint, for templates that ask for it, as gpt-oss's does
    if not isinstance(effort, (str, type(None))):
        raise BadRequest(f"reasoning_effort {short(effort)}: expected text, such as low", "reasoning_effort")
    hints = {} if effort is None else {"reasoning_effort": effort}
    return {key: mark(item, tokenizer.special_pattern) for key, item in (hints | (value or {})).items()}


def prompt_of(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None,
              variables: dict[str, Any]) -> list[int]:
    """The ids that ask for an answer. Raises BadRequest where the template shows no tools, or none of the calls."""
    def written(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        return Conversation(tokenizer, messages, tools).prompt_ids(**variables)

    ids = written(messages, tools)
    without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    for what, others in (("tools", (messages, None)), ("tool_calls", (without, tools))):
        if others == (messages, tools):
            continue
        try:
            if written(*others) != ids:
                continue
        except TokenizerError:                              # it asks for them
            continue
        raise BadRequest(f"{what}: the model's chat template does not show them, so it would not know of them; leave "
                         "them out, or start the server with a --template that does",
                         "tools" if what == "tools" else "messages")
    return ids
