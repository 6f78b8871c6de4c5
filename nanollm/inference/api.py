"""OpenAI's API as data: what a body asks for, checked, and what is answered. The server around it is server.py.

    body ──read──▶ Asked ──▶ a ticket of the engine for each answer ──▶ Reply (reply.py) ──▶ choices

    /v1/chat/completions    messages, tools, response_format        max_tokens or max_completion_tokens
    /v1/completions         prompt: text, ids, or a list of either  max_tokens (16)
    both                    model, n, stop, stream, stream_options, seed, temperature, top_p, logit_bias, logprobs,
                            presence_penalty, frequency_penalty; and beyond OpenAI's: top_k, min_p, repetition_penalty

A key that is none of these is an error, unless it could not change the answer (PASSED_OVER). What a body leaves out is
as the command line says, and generation_config.json.

Reference: platform.openai.com/docs/api-reference, November 2026.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanollm.errors import InputError, NanollmError, did_you_mean
from nanollm.inference.constrained import Grammar
from nanollm.inference.engine import Busy, TooLong
from nanollm.inference.request import Request
from nanollm.inference.sample import LARGE
from nanollm.text.chat import Conversation, messages_of
from nanollm.text.tools import Format, format_of

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "seed")
BOTH = {*SAMPLING, "model", "n", "stop", "stream", "stream_options", "logit_bias", "logprobs", "max_tokens"}
CHAT = BOTH | {"messages", "tools", "tool_choice", "response_format", "max_completion_tokens", "top_logprobs"}
COMPLETION = BOTH | {"prompt"}
PASSED_OVER = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
               "prompt_cache_key", "prompt_cache_retention"}
NEUTRAL = {"echo": False, "suffix": None, "best_of": 1, "modalities": ["text"], "function_call": None,
           "functions": None, "verbosity": None, "reasoning_effort": None, "prediction": None, "audio": None}
MOST = 64               # answers to one body
TOOL_CHOICES = (None, "auto", "none")


class BadRequest(InputError):
    """A body that cannot be answered."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body that tell of an error."""
    ours = isinstance(error, NanollmError)
    status, code = getattr(error, "status", 400 if ours else 500), getattr(error, "code", None)
    if isinstance(error, Busy):
        status, code = 429, "queue_full"
    elif isinstance(error, TooLong):
        code = "context_length_exceeded"
    message = str(error) if ours else "the request failed inside the server, whose log says why"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}}


@dataclass(frozen=True)
class Asked:
    """A body, checked."""
    request: Request
    prompts: list[list[int]]
    chat: bool
    stream: bool = False
    usage: bool = False            # told at the end of a stream, too
    calls: Format | None = None    # how calls of tools are written, where there are tools

    def __post_init__(self) -> None:
        if len(self.prompts) * self.request.n > MOST:
            raise BadRequest(f"{len(self.prompts)} prompts, n {self.request.n}: expected at most {MOST} answers", "n")


# ---- bodies

def read_json(data: bytes) -> dict[str, Any]:
    """Raises BadRequest for what is no JSON object."""
    try:
        body = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error!s:.100}") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {str(body)[:40]}, expected a JSON object")
    return body


def read_chat(body: dict[str, Any], base: Request) -> Asked:
    """Of /v1/chat/completions. base: what holds where the body says nothing."""
    known(body, CHAT)
    messages = plain_messages(body.get("messages"))
    tools, choice = body.get("tools"), body.get("tool_choice")
    if choice not in TOOL_CHOICES:
        raise BadRequest(f"tool_choice {str(choice)[:40]}: expected auto or none; no call can be forced", "tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(map(is_tool, tools))):
        raise BadRequest('tools: expected [{"type": "function", "function": {"name": …, "parameters": …}}, …]', "tools")
    tools = None if choice == "none" else tools or None
    request = read_common(body, base, body.get("max_completion_tokens", body.get("max_tokens")), LARGE)
    if (logprobs := flag(body, "logprobs")) or body.get("top_logprobs") is not None:
        if not logprobs:
            raise BadRequest("top_logprobs goes with logprobs: true", "top_logprobs")
        request = replace(request, logprobs=whole(body, "top_logprobs", 0, 20) or 0)
    request = replace(request, constrain=constraint(body.get("response_format"), request))
    ids = Conversation(request.tokenizer, messages, tools).prompt_ids()
    return Asked(request, [ids], True, *streaming(body), calls=format_of(request.tokenizer) if tools else None)


def read_completion(body: dict[str, Any], base: Request) -> Asked:
    """Of /v1/completions."""
    known(body, COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, str) or is_ids(prompt):
        prompt = [prompt]
    if not (isinstance(prompt, list) and prompt and all(isinstance(each, str) or is_ids(each) for each in prompt)):
        raise BadRequest("prompt: expected text, token ids, or a list of either", "prompt")
    request = read_common(body, base, body.get("max_tokens"), 16)
    request = replace(request, logprobs=whole(body, "logprobs", 0, 20))
    encode = request.tokenizer.encode
    return Asked(request, [encode(each) if isinstance(each, str) else each for each in prompt], False, *streaming(body))


def read_common(body: dict[str, Any], base: Request, most: Any, default: int) -> Request:
    """What both kinds of bodies say of how to answer."""
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    wrong = next((name for name, value in given.items() if isinstance(value, bool)), None)
    if wrong is not None:
        raise BadRequest(f"{wrong} {given[wrong]}: expected a number", wrong)
    if (bias := body.get("logit_bias")) is not None:
        try:
            given["logit_bias"] = {int(token): amount for token, amount in bias.items()}
        except (AttributeError, ValueError):
            raise BadRequest('logit_bias: expected {"token id": -100 to 100}', "logit_bias") from None
    try:
        sampling = replace(base.sampling, **given)
    except InputError as error:
        raise BadRequest(str(error), str(error).split()[0]) from None
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and len(stop) <= 16 and all(isinstance(text, str) and text for text in stop)):
        raise BadRequest("stop: expected text, or a list of at most 16", "stop")
    limit = default if most is None else most
    if not is_whole(limit) or limit < 1:
        raise BadRequest(f"max_tokens {str(most)[:40]}: expected a whole number of at least 1", "max_tokens")
    return replace(base, max_new_tokens=min(limit, LARGE), sampling=sampling, stop=[*base.stop, *stop],
                   n=whole(body, "n", 1, MOST) or 1, logprobs=None)


def known(body: Mapping[str, Any], keys: set[str]) -> None:
    """Raise BadRequest for a key that there is not."""
    for name, value in body.items():
        if name in NEUTRAL:
            if value is not None and value != NEUTRAL[name]:
                raise BadRequest(f"{name} {str(value)[:40]}: this server does not do that; leave it out", name)
        elif name not in keys | PASSED_OVER:
            raise BadRequest(f"unknown parameter {name[:60]}{did_you_mean(name[:60], keys)}", name[:60])


def plain_messages(value: Any) -> list[dict[str, Any]]:
    """The messages as templates read them: text in one piece, arguments of calls as objects."""
    messages = []
    for number, message in enumerate(messages_of(value, "messages"), 1):
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                     for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise BadRequest(f"messages: message {number}: this model reads text alone", "messages")
            content = "".join(part for part in parts if part)
        role = "system" if message["role"] == "developer" else message["role"]
        made = message | {"role": role, "content": content or ""}
        if message.get("tool_calls"):
            made["tool_calls"] = [with_object(call, number) for call in message["tool_calls"]]
        messages.append(made)
    if not messages:
        raise BadRequest("messages: expected at least one", "messages")
    return messages


def with_object(call: Any, number: int) -> dict[str, Any]:
    """A call of a message whose arguments are the object that their JSON spells."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        return call | {"function": function | {"arguments": json.loads(arguments)}}
    except (TypeError, KeyError, ValueError, RecursionError):
        raise BadRequest(f"messages: message {number}: tool_calls: expected "
                         '[{"function": {"name": …, "arguments": "JSON"}}, …]', "messages") from None


def constraint(form: Any, request: Request) -> Grammar | None:
    """What response_format holds an answer to."""
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        schema = form["json_schema"].get("schema") if isinstance(form.get("json_schema"), dict) else None
    if kind not in ("text", "json_object", "json_schema") or not isinstance(schema, dict):
        raise BadRequest('response_format: expected {"type": "text"}, {"type": "json_object"} or '
                         '{"type": "json_schema", "json_schema": {"schema": {…}}}', "response_format")
    return None if kind == "text" else Grammar(request.tokenizer, "json_schema", json.dumps(schema), "response_format")


def streaming(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the answer streams, and whether its usage is told at the end."""
    stream, options = flag(body, "stream"), body.get("stream_options")
    if options is not None and not (isinstance(options, dict) and stream):
        raise BadRequest("stream_options: expected an object, beside stream: true", "stream_options")
    return stream, flag(options or {}, "include_usage")


def flag(body: Mapping[str, Any], name: str) -> bool:
    """true or false; absent is false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} {str(value)[:40]}: expected true or false", name)
    return bool(value)


def whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """A whole number within bounds, or None where there is none."""
    value = body.get(name)
    if value is not None and not (is_whole(value) and low <= value <= high):
        raise BadRequest(f"{name} {str(value)[:40]}: expected a whole number from {low} to {high}", name)
    return value


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(is_whole, value))


def is_tool(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
