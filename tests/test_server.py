"""The server, by OpenAI's own client and by clients that are wrong, many, or gone.

What it answers is compared with the decoder asked directly.
"""

import http.client
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

import checkpoints
import generate
from nanollm.errors import InputError
from nanollm.inference import engine as engine_file
from nanollm.inference import server as server_file
from nanollm.inference import ticket as ticket_file
from nanollm.inference.engine import Engine, Stopped
from nanollm.inference.generation import answer_batch
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling
from nanollm.model import Decoder
from nanollm.presets import transformer
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from tests import forked
from tests.oracles import make_loud
from tests.terminals import CHATML, scripted
from tests.tok_folders import byte_bpe, write

openai = pytest.importorskip("openai", reason="needs the package openai")
from nanollm.inference import api  # noqa: E402
from nanollm.inference.listening import Uvicorn, bind, listen  # noqa: E402
from nanollm.inference.reply import Reply  # noqa: E402
from nanollm.inference.server import Running, Server  # noqa: E402

QUESTION = [{"role": "user", "content": "really?"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    byte_bpe(("<|im_start|>", "<|im_end|>")).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return checkpoints.tokenizer(write(
        folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    made = Decoder(transformer(tokenizer.vocab_size, 32, 2, 4, 2, 48, context=512)).eval()
    make_loud(made)
    return made.requires_grad_(False)


class Served:
    """A server that runs, and how to reach it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, **options) -> None:
        key = options.pop("key", None)
        self.engine = Engine(model, tokenizer, **{"slots": 4, "length": 128, **options})
        self.base = Request(tokenizer, 256, Sampling())
        self.running = Running(Server(self.engine, self.base, "toy", key))
        self.host = self.running.address.removeprefix("http://")
        self.client = openai.OpenAI(base_url=f"{self.running.address}/v1", api_key=key or "none", max_retries=0)

    def __enter__(self) -> "Served":
        self.running.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.client.close()
        self.running.__exit__()

    def raw(self, path: str, body: bytes | dict | None = None, method: str = "POST",
            **headers) -> tuple[int, dict | str]:
        """Status and body, JSON where it is."""
        line = http.client.HTTPConnection(self.host, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        line.request(method, path, data, {"Content-Type": "application/json"} | headers)
        response = line.getresponse()
        text = response.read().decode()
        line.close()
        return response.status, json.loads(text) if "json" in response.headers["content-type"] else text

    def idle(self, seconds: float = 60) -> bool:
        """Whether all ends soon."""
        until = time.monotonic() + seconds
        while self.engine.busy and time.monotonic() < until:
            time.sleep(0.01)
        return not self.engine.busy


@pytest.fixture(scope="module")
def served(model: Decoder, tokenizer: Tokenizer) -> Iterator[Served]:
    with Served(model, tokenizer) as running:
        yield running


def directly(model: Decoder, tokenizer: Tokenizer, prompt: list[int], most: int, continues: bool = False, **how) -> str:
    request = Request(tokenizer, most, Sampling(**how))
    answer, = answer_batch(model, [prompt], most, **request.how(continues))
    return request.text(answer, continues)


def ask(tokenizer: Tokenizer, messages=QUESTION) -> list[int]:
    return Conversation(tokenizer, messages).prompt_ids()


# ---- OpenAI's client

def test_chat_whole_and_streamed(served, model, tokenizer):
    ids = ask(tokenizer)
    expected = directly(model, tokenizer, ids, 30)
    whole = served.client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=30)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 30)
    chunks = list(served.client.chat.completions.create(
        model="toy", messages=QUESTION, max_completion_tokens=30, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(each.delta.content or "" for each in deltas) == expected and len(deltas) > 10
    assert [each.finish_reason for each in deltas if each.finish_reason] == ["length"]
    assert deltas[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(ids) - 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_of_texts_and_ids(served, model, tokenizer):
    prompts = ["One", "Two and"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    expected = [directly(model, tokenizer, each, 16, continues=True) for each in ids]
    for prompt in (prompts, ids):
        made = served.client.completions.create(model="toy", prompt=prompt)
        assert [choice.text for choice in made.choices] == expected
        assert made.usage.prompt_tokens == sum(map(len, ids)) and made.usage.completion_tokens == 32
    for prompt, each in ((prompts[0], ids[0]), (ids[1], ids[1])):
        parts = served.client.completions.create(model="toy", prompt=prompt, max_tokens=9, stream=True)
        text = "".join(part.choices[0].text for part in parts)
        assert text == directly(model, tokenizer, each, 9, continues=True)


def test_seeds_samples_and_penalties(served, model, tokenizer):
    how = {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.3}
    made = served.client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=12, n=3, seed=5, **how,
                                                 extra_body={"top_k": 30})
    assert [choice.message.content for choice in made.choices] == [
        directly(model, tokenizer, ask(tokenizer), 12, seed=5 + at, top_k=30, **how) for at in range(3)]
    assert made.usage.prompt_tokens == len(ask(tokenizer)) and made.usage.completion_tokens == 36
    bias = {str(tokenizer.encode("x")[0]): 100}
    made = served.client.completions.create(model="toy", prompt="a", max_tokens=3, logit_bias=bias)
    assert made.choices[0].text == "xxx"


def test_stops_and_log_probabilities(served, model, tokenizer):
    text = directly(model, tokenizer, ask(tokenizer), 30)
    stop = next(text[at : at + 2] for at in range(8, 30) if text[at : at + 2].isascii())
    for stream in (False, True):
        made = served.client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=30, stop=[stop],
                                                     stream=stream)
        found = "".join(part.choices[0].delta.content or "" for part in made) if stream else (
            made.choices[0].message.content)
        assert found == text[: text.index(stop)]
    made = served.client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=5, logprobs=True,
                                                 top_logprobs=3)
    request = Request(tokenizer, 5, Sampling(), logprobs=3)
    answer, = answer_batch(model, [ask(tokenizer)], 5, **request.how(False))
    for one, other in zip(made.choices[0].logprobs.content, request.likely(answer.logprobs), strict=True):
        assert one.token == other["token"] and one.logprob == pytest.approx(other["logprob"], abs=1e-4)
        assert [each.token for each in one.top_logprobs] == [each["token"] for each in other["top_logprobs"]]
    older = served.client.completions.create(model="toy", prompt="a", max_tokens=4, logprobs=2).choices[0].logprobs
    assert len(older.tokens) == len(older.token_logprobs) == 4 and all(len(each) == 2 for each in older.top_logprobs)


def test_offsets_of_completions_point_into_the_text(served):
    how = {"model": "toy", "prompt": "a", "max_tokens": 12, "logprobs": 0, "frequency_penalty": 2}
    how["logit_bias"] = {str(id): 100 for id in served.base.tokenizer.encode("éx")}
    choice = served.client.completions.create(**how).choices[0]
    offsets, ends = choice.logprobs.text_offset, [*choice.logprobs.text_offset[1:], len(choice.text)]
    assert [choice.text[at:end] for at, end in zip(offsets, ends, strict=True)] == choice.logprobs.tokens
    parts = [part.choices[0].logprobs for part in served.client.completions.create(**how, stream=True)]
    assert [at for part in parts if part for at in part.text_offset] == offsets
    reply = Reply(api.read_completion({"prompt": "a"}, served.base), None, 0)
    halves = [{"token": "\ufffd", "logprob": 0, "bytes": [byte], "top_logprobs": []} for byte in "é".encode()]
    whole = [{"token": "x", "logprob": 0, "bytes": [120], "top_logprobs": []}] * 2
    assert reply.logprobs(halves + whole)["text_offset"] == [0, 0, 1, 2]                # of "éxx"


def test_a_schema_holds_the_answer(served):
    pytest.importorskip("llguidance", reason="needs the package llguidance: make published")
    form, words = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}, served.base.tokenizer
    spaces = {str(id): -100 for id in range(words.vocab_size) if not words.decode([id], skip_special=False).strip()}
    made = served.client.chat.completions.create(model="toy", messages=QUESTION, response_format=form, max_tokens=60,
                                                 logit_bias=spaces)
    assert json.loads(made.choices[0].message.content)["a"] in (1, 2) and made.choices[0].finish_reason == "stop"


def test_models_health_and_metrics(served):
    assert [each.id for each in served.client.models.list()] == ["toy"]
    assert served.client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="there is only toy"):
        served.client.models.retrieve("other")
    assert served.raw("/health", method="GET") == (200, {"status": "ok"})
    status, text = served.raw("/metrics", method="GET")
    lines = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and int(lines["nanollm_requests_total"]) >= 0 and lines["nanollm_slots"] == "4"


# ---- tools

FORMS = {
    "hermes": ("<tool_call>", 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
               "Let me see."),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]', None),
    "mistral, newer": ("[TOOL_CALLS]", 'Well.[TOOL_CALLS]add[ARGS]{"a": 1}', "Well."),
    "llama": ('ipython "parameters": ', '{"name": "add", "parameters": {"a": 1}}', None),
    "llama, with a tag": ('ipython "parameters": ', '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', None),
    "none in hermes": ("<tool_call>", "It is <tool_call> that {is} none", "It is <tool_call> that {is} none"),
    "none in llama": ('ipython "parameters": ', "{a} is none", "{a} is none"),
    "none at all": ("<tool_call>", "Text with < in it.", "Text with < in it."),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_calls_of_tools(model, tmp_path, monkeypatch, form, stream):
    """The model is made to say what such a model would: the marks are special tokens, as theirs are."""
    source, said, text = FORMS[form]
    byte_bpe(("<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")).save(
        str(tmp_path / "tokenizer.json"))
    calls = ("{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
             "{% endfor %}")
    template = "{# " + source + " #}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + calls + CHATML
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = checkpoints.tokenizer(write(
        tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}))
    script = tokenizer.encode(said + "<|im_end|>", special=True)

    def says(logits, sampling, prompts, answers, *_):
        return torch.tensor([script[len(answers[0])]]), logits.float()

    monkeypatch.setattr(ticket_file, "next_tokens", says)
    monkeypatch.setattr(ticket_file, "GREEDY", None)            # or the likeliest tokens are found for all rows at once
    wide = Decoder(transformer(tokenizer.vocab_size, 32, 1, 4, 2, 48)).eval()
    with Served(wide, tokenizer) as served:
        made = served.client.chat.completions.create(model="toy", messages=QUESTION, tools=[TOOL], stream=stream)
        if stream:
            parts = [part.choices[0] for part in made]
            content = "".join(part.delta.content or "" for part in parts)
            calls, reason = [call for part in parts for call in part.delta.tool_calls or ()], parts[-1].finish_reason
        else:
            content, calls = made.choices[0].message.content or "", made.choices[0].message.tool_calls or []
            reason = made.choices[0].finish_reason
        if form.startswith("none"):
            assert (content, calls, reason) == (text, [], "stop")
        else:
            assert content.rstrip() == (text or "") and reason == "tool_calls"
            assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [("add", {"a": 1})]
        plain = served.client.chat.completions.create(model="toy", messages=QUESTION)
        assert plain.choices[0].message.tool_calls is None
        history = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"}]
        assert served.client.chat.completions.create(model="toy", messages=history, tools=[TOOL]).choices


CALLED = [*QUESTION, {"role": "assistant", "content": None,
                      "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}]


def test_tools_that_the_template_does_not_show_are_refused(served):
    for body, param in (({"messages": QUESTION, "tools": [TOOL]}, "tools"), ({"messages": CALLED}, "messages")):
        status, told = served.raw(CHAT, body)
        assert status == 400 and told["error"]["param"] == param and "does not show them" in told["error"]["message"]
    for harmless in ({"tools": [TOOL], "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"}):
        assert served.raw(CHAT, {"messages": QUESTION, "max_tokens": 1} | harmless)[0] == 200


# ---- fields that change nothing, and those of the template

HARMLESS = [
    {"top_k": -1}, {"top_k": 0}, {"seed": -1}, {"top_logprobs": 0}, {"functions": []}, {"function_call": "none"},
    {"min_tokens": 0}, {"ignore_eos": False}, {"stop_token_ids": []}, {"reasoning_effort": "low"},
    {"verbosity": "high"}, {"max_tokens": 6.0}, {"max_completion_tokens": None}, {"top_k": 5.0}, {"n": 1.0},
    {"user": "x", "store": True}, {"web_search_options": None},
    {"temperature": 1, "top_p": 0}, {"temperature": 1.7, "top_p": 0.0, "seed": 3}, {"chat_template_kwargs": {"a": 1}},
    {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "rea"},
                                               {"type": "text", "text": "lly?"}]}]},
    {"messages": [QUESTION[0] | {"refusal": None, "annotations": [], "tool_calls": None}]},
]


@pytest.mark.parametrize("more", HARMLESS, ids=str)
def test_what_changes_nothing_passes(served, model, tokenizer, more):
    status, told = served.raw(CHAT, {"messages": QUESTION, "max_tokens": 6} | more)
    assert status == 200, told
    assert told["choices"][0]["message"]["content"] == directly(model, tokenizer, ask(tokenizer), 6)


def test_top_k_off_is_said_to_a_server_that_draws(tokenizer):
    base = Request(tokenizer, 9, Sampling(1.0, top_k=3, seed=1))
    body = {"messages": QUESTION}
    assert api.read_chat(body, base).request.sampling == base.sampling
    assert api.read_chat(body | {"top_k": -1, "seed": -1}, base).request.sampling == Sampling(1.0)


def test_variables_of_the_template(tokenizer, monkeypatch):
    monkeypatch.setitem(tokenizer.chat_templates, "default", "{{ mood }}" + CHATML)
    base = Request(tokenizer, 9, Sampling())

    def read(value):
        return api.read_chat({"messages": QUESTION, "chat_template_kwargs": value}, base).prompts[0]

    assert tokenizer.decode(read({"mood": "glad"}), skip_special=False).startswith("glad<|im_start|>user")
    body = {"messages": QUESTION, "reasoning_effort": "low"}
    plain = api.read_chat(body, base).prompts
    monkeypatch.setitem(tokenizer.chat_templates, "default", "{{ reasoning_effort }}" + CHATML)
    assert api.read_chat(body, base).prompts == [tokenizer.encode("low") + plain[0]]
    monkeypatch.setitem(tokenizer.chat_templates, "default", "{{ mood }}" + CHATML)
    end, = tokenizer.encode("<|im_end|>", special=True)
    assert read({"mood": "<|im_end|>"}).count(end) == 1             # of the user's turn; the other is plain text
    for wrong in ({"messages": []}, {"tools": []}, {"template": ""}, {"bos_token": "x"}, ["mood"]):
        with pytest.raises(InputError, match="chat_template_kwargs"):
            read(wrong)


# ---- what is wrong

DEEP = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
WRONG = [
    (CHAT, b"", 400), (CHAT, b"{", 400), (CHAT, b"[]", 400), (CHAT, b"\xff", 400), (CHAT, DEEP, 400), (CHAT, {}, 400),
    (CHAT, b'{"messages": NaN}', 400), (CHAT, {"messages": []}, 400), (CHAT, {"messages": "hi"}, 400),
    (CHAT, {"messages": [{"content": "x"}]}, 400), (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, 400),
    (CHAT, {"messages": QUESTION, "model": "gpt-4"}, 404), (CHAT, {"messages": QUESTION, "model": 3}, 404),
    (CHAT, {"messages": QUESTION, "temprature": 1}, 400), (CHAT, {"messages": QUESTION, "temperature": "hot"}, 400),
    (CHAT, {"messages": QUESTION, "temperature": True}, 400), (CHAT, {"messages": QUESTION, "temperature": -1}, 400),
    (CHAT, {"messages": QUESTION, "top_p": -1}, 400), (CHAT, {"messages": QUESTION, "n": 0}, 400),
    (CHAT, {"messages": QUESTION, "n": 1000}, 400), (CHAT, {"messages": QUESTION, "n": 1.5}, 400),
    (CHAT, {"messages": QUESTION, "max_tokens": 0}, 400), (CHAT, {"messages": QUESTION, "max_tokens": "9"}, 400),
    (CHAT, {"messages": QUESTION, "stop": [""]}, 400), (CHAT, {"messages": QUESTION, "stop": [["a"]]}, 400),
    (CHAT, {"messages": QUESTION, "stream": "yes"}, 400), (CHAT, {"messages": QUESTION, "stream_options": {}}, 400),
    (CHAT, {"messages": QUESTION, "seed": -2}, 400), (CHAT, {"messages": QUESTION, "seed": 2**70}, 400),
    (CHAT, {"messages": QUESTION, "logit_bias": {"a": 1}}, 400), (CHAT, {"messages": QUESTION, "logit_bias": [1]}, 400),
    (CHAT, {"messages": QUESTION, "logit_bias": {"99999": 1}}, 400),
    (CHAT, {"messages": QUESTION, "logit_bias": {"1": "x"}}, 400),
    (CHAT, {"messages": QUESTION, "top_logprobs": 2}, 400), (CHAT, {"messages": QUESTION, "logprobs": 2}, 400),
    (CHAT, {"messages": QUESTION, "tools": [1]}, 400), (CHAT, {"messages": QUESTION, "tools": "add"}, 400),
    (CHAT, {"messages": QUESTION, "tool_choice": "required"}, 400), (CHAT, {"messages": QUESTION, "best_of": 3}, 400),
    (CHAT, {"messages": QUESTION, "response_format": {"type": "xml"}}, 400),
    (CHAT, {"messages": QUESTION, "response_format": {"type": "json_schema"}}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 200}]}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400),
    (COMPLETION, {"prompt": ""}, 400), (COMPLETION, {"prompt": []}, 400), (COMPLETION, {"prompt": [[]]}, 400),
    (COMPLETION, {"prompt": {"a": 1}}, 400), (COMPLETION, {"prompt": [99999]}, 400),
    (COMPLETION, {"prompt": [-1]}, 400), (COMPLETION, {"prompt": [1.5]}, 400),
    (COMPLETION, {"prompt": ["a"] * 65}, 400), (COMPLETION, {}, 400),
    (COMPLETION, {"prompt": "a", "echo": True}, 400), (COMPLETION, {"prompt": "a", "logprobs": 99}, 400),
    (CHAT, b'{"messages": [], "\\ud800": 1}', 400), (CHAT, b'{"messages": [], "model": "\\ud800"}', 404),
    ("/v1/embeddings", {"input": "a"}, 404), ("/v1/../etc/passwd", {}, 404), ("/v1/models", {}, 405),
]


def test_every_malformed_body_is_told_what_is_wrong(served):
    for path, body, status in WRONG:
        found, told = served.raw(path, body)
        assert found == status, (path, str(body)[:200], found, told)
        error = told["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert len(error["message"]) > 10, body
    assert served.raw(CHAT, {"messages": [{"role": "user", "content": "a " * 200}]})[1]["error"]["code"] == (
        "context_length_exceeded")
    assert served.client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=2).choices


SAID = [                    # a message, its param, and what the error says of it
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role \"robot\", expected system"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0]: content: missing"),
    ({"messages": [*QUESTION, {"role": "user", "content": None}]}, "messages", "messages[1]: content: missing"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages", "content: missing"),
    ({"messages": [{"role": "user", "content": []}]}, "messages", "content: found []"),
    ({"messages": [{"role": "user", "contnet": "x"}]}, "messages", "contnet; did you mean content?"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages", "of the assistant"),
    ({}, "messages", "messages: missing"), ({"messages": "hi"}, "messages", 'found "hi", expected [{"role"'),
    ({"messages": QUESTION, "tools": [TOOL, TOOL]}, "tools", 'two are called "add"'),
    ({"messages": QUESTION, "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice",
     '{"type": "function", "function": {"name": "add"}}: no call can be forced'),
    ({"messages": QUESTION, "stop": ""}, "stop", "not empty"),
    ({"messages": QUESTION, "stream_options": {"include_usage": True}}, "stream_options", "stream: true beside"),
    ({"messages": QUESTION, "stream": True, "stream_options": {"include_usag": True}}, "stream_options",
     "did you mean include_usage?"),
    ({"messages": QUESTION, "top_logprobs": 1}, "top_logprobs", "logprobs: true beside"),
    ({"messages": QUESTION, "min_tokens": 3}, "min_tokens", "expected no min_tokens or 0"),
    ({"messages": QUESTION, "web_search_options": {}}, "web_search_options", "does not do that"),
    ({"prompt": [999999]}, None, "token 999999 is outside the model's vocabulary"),
    ({"prompt": None}, "prompt", "prompt: missing"),
]


@pytest.mark.parametrize(("body", "param", "words"), SAID, ids=[words for _, _, words in SAID])
def test_errors_say_what_was_found(served, body, param, words):
    status, told = served.raw(COMPLETION if "prompt" in body else CHAT, body)
    assert status == 400 and told["error"]["param"] == param and words in told["error"]["message"], told


def test_another_method_is_told_which(served):
    status, told = served.raw(CHAT, method="GET")
    assert status == 405 and told["error"]["message"] == f"GET {CHAT}: expected POST"


def test_addresses_that_are_not_to_be_had():
    with bind("127.0.0.1", 0) as taken:
        host, port = listen(taken)
        with pytest.raises(InputError, match=rf"^--port {port}: another program listens there, at 127.0.0.1; give"):
            bind(host, port)
    with pytest.raises(InputError, match=r"^--host 203\.0\.113\.9: .*; expected an address of this machine"):
        bind("203.0.113.9", 0)                              # of TEST-NET-3, which no machine has (RFC 5737)
    with pytest.raises(InputError, match=r"^--host no\.such\.invalid: "):
        bind("no.such.invalid", 0)


def test_bodies_are_bounded_and_say_that_they_are_json(served, monkeypatch):
    monkeypatch.setattr(server_file, "BODY", 1000)
    monkeypatch.setattr(server_file, "PATIENCE", 0.3)
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    assert served.raw(CHAT, body)[0] == 413
    line = http.client.HTTPConnection(served.host, timeout=60)           # chunked: nobody knows how long it gets
    line.request("POST", CHAT, iter([body[:900], body[900:]]), {"Content-Type": "application/json"})
    assert line.getresponse().status == 413
    line = http.client.HTTPConnection(served.host, timeout=60)
    line.putrequest("POST", CHAT)
    line.putheader("Content-Type", "application/json")
    line.putheader("Content-Length", "500")
    line.endheaders(b"{")
    assert line.getresponse().status == 408
    assert served.raw(CHAT, {"messages": QUESTION}, **{"Content-Type": "text/plain"})[0] == 415


def test_who_may(model, tokenizer):
    with Served(model, tokenizer, key="sesame") as served:
        assert served.client.models.list()
        assert served.raw("/health", method="GET")[0] == served.raw("/", method="GET")[0] == 200
        for path, method in ((CHAT, "POST"), ("/v1/models", "GET"), ("/metrics", "GET")):
            for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer é".encode("latin-1")}):
                status, told = served.raw(path, {"messages": QUESTION}, method, **headers)
                assert status == 401 and told["error"]["code"] == "invalid_api_key"
        assert served.raw("/health", method="GET", Host="evil.example:80")[0] == 403


def test_a_full_queue_is_told_so_and_n_answers_are_all_or_none(model, tokenizer):
    with Served(model, tokenizer, slots=1, length=400, queue=2) as served:
        with pytest.raises(openai.RateLimitError, match="requests wait already"):
            served.client.chat.completions.create(model="toy", messages=QUESTION, n=9, max_tokens=300)
        assert served.idle()
        assert served.client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=2).choices


def test_what_fails_inside_is_told_and_logged(served, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(engine_file.RowCache, "read_together", broken)
    status, told = served.raw(CHAT, {"messages": QUESTION})
    assert status == 500 and told["error"]["type"] == "server_error" and "secret" not in str(told)
    assert "secret" in caplog.text
    _, text = served.raw(CHAT, {"messages": QUESTION, "stream": True})
    assert '"type": "server_error"' in text and "[DONE]" not in text
    monkeypatch.undo()
    assert served.raw(CHAT, {"messages": QUESTION, "max_tokens": 2})[0] == 200


# ---- many, and gone

@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """It answers "abcabcabc…" as long as anybody listens."""
    folder = scripted(tmp_path_factory.mktemp("endless"), ["a", "b", "c"], endless=True, context=100_000)
    with Served(checkpoints.load(folder), checkpoints.tokenizer(folder), slots=2, length=50_000) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(endless, stream):
    lines = []
    for _ in range(3):                                      # one of them waits
        line = http.client.HTTPConnection(endless.host, timeout=60)
        body = {"messages": QUESTION, "stream": stream}
        line.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        if stream and len(lines) < 2:
            assert line.getresponse().readline().startswith(b"data: {")
        lines.append(line)
    while not len(endless.engine.seated) == 2:
        time.sleep(0.01)
    before = endless.engine.counts["new_tokens"]
    for line in lines:
        line.close()
    assert endless.idle() and endless.engine.counts["new_tokens"] < before + 40_000


def test_a_server_that_stops_tells_everybody(tmp_path, caplog, monkeypatch):
    """Those that are answered, that wait, that stream, that do not read, and that have not sent all of their body."""
    monkeypatch.setattr(server_file, "PATIENCE", 90)
    folder = scripted(tmp_path, ["a", "b", "c"], endless=True, context=100_000)
    running = Served(checkpoints.load(folder), checkpoints.tokenizer(folder), slots=3, length=50_000)
    stream = json.dumps({"messages": QUESTION, "stream": True})
    with running, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(running.raw, CHAT, {"messages": QUESTION, "stream": at < 2}) for at in range(6)]
        deaf, late = (http.client.HTTPConnection(running.host, timeout=60) for _ in range(2))
        deaf.request("POST", CHAT, stream, {"Content-Type": "application/json"})
        late.request("POST", CHAT, b"{", {"Content-Type": "application/json", "Content-Length": "99"})
        while running.engine.counts["requests"] < 7 or running.engine.counts["new_tokens"] < 20:
            time.sleep(0.01)
        running.running.uvicorn.should_exit = True
        told = [each.result(60) for each in asked]
        running.running.thread.join(60)
        assert not running.running.thread.is_alive() and not running.engine.thread.is_alive()
    for status, body in told[2:]:
        assert status == 503 and body["error"]["code"] == "server_stopped" and "stopped" in body["error"]["message"]
    for status, text in told[:2]:
        last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
        assert status == 200 and last["error"]["code"] == "server_stopped"
    assert caplog.records == []
    with pytest.raises(Stopped):
        running.engine.submit([1], 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_process(tmp_path, number, code):
    folder = scripted(tmp_path / "model", ["a", "b", "c"], endless=True, context=50_000)
    started = forked.start(1, generate.run, "--model", folder, "--serve", "--port", "0", "--slots", "2",
                           "--device", "cpu", "--context", "60000")
    while "Ctrl-C ends it" not in (said := (started.folder / "err").read_text()) and started.running():
        time.sleep(0.05)
    line = http.client.HTTPConnection(re.search(r"http://(\S+),", said)[1], timeout=60)
    line.request("POST", CHAT, json.dumps({"messages": QUESTION, "stream": True}), {"Content-Type": "application/json"})
    answer = line.getresponse()
    assert answer.readline().startswith(b"data: {")
    os.kill(started.pids[0], number)
    assert b"server_stopped" in answer.read()
    ended = started.end(60)
    warned, up, stops = ended.err.splitlines()
    assert ended.codes == [code] and stops == "[the server stops; 1 answer cut short]"
    assert warned.startswith("warning: --context: 60,000 tokens are more than the 50,000 that the model was trained")


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(tmp_path):
    folder = scripted(tmp_path, ["a"])
    (folder / "model.safetensors").unlink()
    with bind("127.0.0.1", 0) as taken:
        _, port = listen(taken)
        ended = forked.start(1, generate.run, "--model", folder, "--serve", "--port", port, "--device", "cpu").end(60)
    assert ended.codes == [1] and ended.said.startswith(f"error: --port {port}: another program")


def test_a_second_signal_ends_the_process_at_once(served, monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    uvicorn = Uvicorn(None, served.engine)
    uvicorn.handle_exit(signal.SIGINT, None)
    uvicorn.handle_exit(signal.SIGINT, None)                # a wrapper has handed it on, too
    assert uvicorn.should_exit and left == []
    uvicorn.stopping = True
    uvicorn.handle_exit(signal.SIGINT, None)
    assert left == [130]


def test_fifty_clients_of_which_some_vanish(served, model, tokenizer):
    def client(number: int) -> bool:
        draw = random.Random(number)
        content = "".join(draw.choices("abcdefgh ?", k=draw.randint(1, 30)))
        messages, most = [{"role": "user", "content": content}], draw.randint(1, 30)
        stream, leaves = draw.random() < 0.6, draw.random() < 0.3
        body = {"messages": messages, "max_tokens": most, "stream": stream}
        line = http.client.HTTPConnection(served.host, timeout=120)
        line.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        if leaves:
            if stream:
                line.getresponse().readline()
            line.close()
            return False
        text = line.getresponse().read().decode()
        line.close()
        if stream:
            assert text.endswith("data: [DONE]\n\n")
            parts = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n")[:-2]]
            text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        else:
            text = json.loads(text)["choices"][0]["message"]["content"]
        assert text == directly(model, tokenizer, ask(tokenizer, messages), most)
        return True

    with ThreadPoolExecutor(50) as pool:
        stayed = list(pool.map(client, range(50)))
    assert 20 < sum(stayed) < 45 and served.idle() and served.engine.counts["failed"] <= 2


@pytest.mark.slow
def test_memory_does_not_grow(served):
    """Hundreds of requests: after the first ones, so many more add nothing that a leak would."""
    def some(number: int) -> None:
        draw = random.Random(number)
        content = "".join(draw.choices("abcdefgh ?", k=draw.randint(1, 60)))
        line = http.client.HTTPConnection(served.host, timeout=120)
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": draw.randint(1, 20),
                "stream": draw.random() < 0.5, "logprobs": draw.random() < 0.5}
        line.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        if draw.random() < 0.8:
            line.getresponse().read()
        line.close()

    sizes, me = [], psutil.Process()
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, 750, 150):
            list(pool.map(some, range(start, start + 150)))
            sizes.append(me.memory_info().rss)
    assert served.idle()
    assert sizes[-1] - sizes[1] < 8 << 20, sizes                # 18 kB a request


