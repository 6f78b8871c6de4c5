"""The server, by OpenAI's own client and by clients that are wrong, many, or gone.

What it answers is compared with the decoder asked directly.
"""

import http.client
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

import checkpoints
from nanollm.inference import engine as engine_file
from nanollm.inference import server as server_file
from nanollm.inference import ticket as ticket_file
from nanollm.inference.engine import Engine
from nanollm.inference.generation import answer_batch
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling
from nanollm.model import Decoder
from nanollm.presets import transformer
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from tests.oracles import make_loud
from tests.terminals import CHATML, scripted
from tests.tok_folders import byte_bpe, write

openai = pytest.importorskip("openai", reason="needs the package openai")
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
    template = "{# " + source + " #}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHATML
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
    (CHAT, {"messages": QUESTION, "top_p": 0}, 400), (CHAT, {"messages": QUESTION, "n": 0}, 400),
    (CHAT, {"messages": QUESTION, "n": 1000}, 400), (CHAT, {"messages": QUESTION, "n": 1.5}, 400),
    (CHAT, {"messages": QUESTION, "max_tokens": 0}, 400), (CHAT, {"messages": QUESTION, "max_tokens": "9"}, 400),
    (CHAT, {"messages": QUESTION, "stop": [""]}, 400), (CHAT, {"messages": QUESTION, "stop": [["a"]]}, 400),
    (CHAT, {"messages": QUESTION, "stream": "yes"}, 400), (CHAT, {"messages": QUESTION, "stream_options": {}}, 400),
    (CHAT, {"messages": QUESTION, "seed": -1}, 400), (CHAT, {"messages": QUESTION, "seed": 2**70}, 400),
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
    """An hour's worth of requests: after the first ones, so many more add nothing that a leak would."""
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
        for start in range(0, 1500, 300):
            list(pool.map(some, range(start, start + 300)))
            sizes.append(me.memory_info().rss)
    assert served.idle()
    assert sizes[-1] - sizes[1] < 16 << 20, sizes


