"""OpenAI's API as data: what a body asks for, checked, and what is answered. The server around it is server.py.

    body ──read──▶ Asked ──▶ a ticket of the engine for each answer ──▶ Reply (reply.py) ──▶ choices

    /v1/chat/completions    messages, tools (messages.py)           max_tokens or max_completion_tokens
                            response_format, top_logprobs, chat_template_kwargs
    /v1/completions         prompt: text, ids, or a list of either  max_tokens (16)
    both                    model, n, stop, stream, stream_options, seed, temperature, top_p, logit_bias, logprobs,
                            presence_penalty, frequency_penalty; and beyond OpenAI's: top_k, min_p, repetition_penalty

A key that is none of these is an error, unless its value changes nothing (NOT_FOLLOWED). What a body leaves out is as
the command line says, and generation_config.json.

Reference: platform.openai.com/docs/api-reference, November 2026.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanollm.errors import InputError, NanollmError, did_you_mean
from nanollm.inference.constrained import Grammar
from nanollm.inference.engine import Busy, Stopped, TooLong
from nanollm.inference.messages import BadRequest, prompt_of, read_messages, read_tools, read_variables, short
from nanollm.inference.request import Request
from nanollm.inference.sample import LARGE
from nanollm.text.tools import Format, format_of

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "seed")
BOTH = {*SAMPLING, "model", "n", "stop", "stream", "stream_options", "logit_bias", "logprobs", "max_tokens"}
CHAT = BOTH | {"messages", "tools", "tool_choice", "response_format", "max_completion_tokens", "top_logprobs",
               "chat_template_kwargs", "reasoning_effort"}
COMPLETION = BOTH | {"prompt"}
ANYTHING = None
# What is not followed: the values that pass, beside null, because they change nothing here
NOT_FOLLOWED: dict[str, list[Any] | None] = {
    # OpenAI's, about the account, or hints
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
                     "prompt_cache_key", "prompt_cache_retention", "verbosity"), ANYTHING),
    # OpenAI's, about the answer
    "echo": [False], "suffix": [""], "best_of": [1], "functions": [[]], "function_call": ["none", "auto"],
    "modalities": [["text"]], "prediction": [], "audio": [], "web_search_options": [],
    # vLLM's and llama.cpp's
    "min_tokens": [0], "ignore_eos": [False], "stop_token_ids": [[]], "include_stop_str_in_output": [False],
    "bad_words": [[]], "use_beam_search": [False], "length_penalty": [1], "add_generation_prompt": [True],
    "continue_final_message": [False], "skip_special_tokens": [True], "spaces_between_special_tokens": [True],
    "cache_prompt": ANYTHING,
}
OFF = {"top_k": (-1, 0), "seed": (-1,)}                     # words of others for None
SMALLEST = 1e-9         # top_p 0: the likeliest token alone
MOST = 64               # answers to one body
STREAM_OPTIONS = ("include_usage", "include_obfuscation")


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body that tell of an error."""
    ours = isinstance(error, NanollmError)
    status, code = getattr(error, "status", 400 if ours else 500), getattr(error, "code", None)
    if isinstance(error, Stopped):
        status, code = 503, "server_stopped"
    elif isinstance(error, Busy):
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
        raise BadRequest(f"the body is {short(body)}, expected a JSON object")
    return body


def read_chat(body: dict[str, Any], base: Request) -> Asked:
    """Of /v1/chat/completions. base: what holds where the body says nothing."""
    known(body, CHAT)
    messages, tools = read_messages(body), read_tools(body)
    newer = body.get("max_completion_tokens")
    request = read_common(body, base, body.get("max_tokens") if newer is None else newer, LARGE)
    logprobs, top = flag(body, "logprobs"), whole(body, "top_logprobs", 0, 20) or 0
    if top and not logprobs:
        raise BadRequest(f"top_logprobs {top}: expected logprobs: true beside it", "top_logprobs")
    request = replace(request, logprobs=top if logprobs else None)
    request = replace(request, constrain=constraint(body.get("response_format"), request))
    ids = prompt_of(request.tokenizer, messages, tools, read_variables(body, request.tokenizer))
    return Asked(request, [ids], True, *streaming(body), calls=format_of(request.tokenizer) if tools else None)


def read_completion(body: dict[str, Any], base: Request) -> Asked:
    """Of /v1/completions."""
    known(body, COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, str) or is_ids(prompt):
        prompt = [prompt]
    if not (isinstance(prompt, list) and prompt and all(isinstance(each, str) or is_ids(each) for each in prompt)):
        found = "missing" if prompt is None else f"found {short(prompt)}"
        raise BadRequest(f"prompt: {found}, expected text, token ids, or a list of either", "prompt")
    request = read_common(body, base, body.get("max_tokens"), 16)
    request = replace(request, logprobs=None if body.get("logprobs") is False else whole(body, "logprobs", 0, 20))
    encode = request.tokenizer.encode
    return Asked(request, [encode(each) if isinstance(each, str) else each for each in prompt], False, *streaming(body))


def read_common(body: dict[str, Any], base: Request, most: Any, default: int) -> Request:
    """What both kinds of bodies say of how to answer."""
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    wrong = next((name for name, value in given.items() if not is_number(value)), None)
    if wrong is not None:
        raise BadRequest(f"{wrong} {short(given[wrong])}: expected a number", wrong)
    for name, words in OFF.items():
        if name in given:
            given[name] = None if given[name] in words else integral(given[name])
    if given.get("top_p") == 0:
        given["top_p"] = SMALLEST
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
    if not (isinstance(stop, list) and len(stop) <= 16 and all(isinstance(text, str) for text in stop)):
        raise BadRequest(f"stop {short(stop)}: expected text, or a list of at most 16", "stop")
    if "" in stop:
        raise BadRequest('stop "": every text has that in it; expected text that is not empty', "stop")
    limit = default if most is None else integral(most)
    if not is_whole(limit) or limit < 1:
        raise BadRequest(f"max_tokens {short(most)}: expected a whole number of at least 1", "max_tokens")
    return replace(base, max_new_tokens=min(limit, LARGE), sampling=sampling, stop=[*base.stop, *stop],
                   n=whole(body, "n", 1, MOST) or 1, logprobs=None)


def known(body: Mapping[str, Any], keys: set[str]) -> None:
    """Raise BadRequest for a key that there is not, or that is not followed and says something."""
    for name, value in body.items():
        if name in NOT_FOLLOWED:
            passing = NOT_FOLLOWED[name]
            if not (value is None or passing is ANYTHING or value in passing):
                expected = " or ".join(["no " + name, *map(short, passing)])
                raise BadRequest(f"{name} {short(value)}: this server does not do that; expected {expected}", name)
        elif name not in keys:
            raise BadRequest(f"unknown parameter {name[:60]}{did_you_mean(name[:60], keys)}", name[:60])


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
    if options is None:
        return stream, False
    if not isinstance(options, dict):
        raise BadRequest(f"stream_options {short(options)}: expected an object", "stream_options")
    if not stream:
        raise BadRequest("stream_options: stream is not true; expected stream: true beside it", "stream_options")
    wrong = next((name for name in options if name not in STREAM_OPTIONS), None)
    if wrong is not None:
        raise BadRequest(f"stream_options: unknown key {wrong[:60]}{did_you_mean(wrong[:60], STREAM_OPTIONS)}",
                         "stream_options")
    return stream, flag(options, "include_usage")


def flag(body: Mapping[str, Any], name: str) -> bool:
    """true or false; absent is false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} {short(value)}: expected true or false", name)
    return bool(value)


def whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """A whole number within bounds, or None where there is none."""
    value = integral(body.get(name))
    if value is not None and not (is_whole(value) and low <= value <= high):
        raise BadRequest(f"{name} {short(value)}: expected a whole number from {low} to {high}", name)
    return value


def integral(value: Any) -> Any:
    """2.0 is 2: JSON has one kind of number, and some clients write all of them so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(is_whole, value))
