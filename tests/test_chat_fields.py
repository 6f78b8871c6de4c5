"""What a template writes of a message (FINDINGS §4.3), how an answer ends, prompts that open thoughts (§4.7).

The templates are short, after the published ones of the models they are named for, in what they read and write of a
message. What inference would be given is transformers' apply_chat_template; what is learnt is written out by hand.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from nanollm.data import sft
from nanollm.data.chat_formats import chat as chat_of
from nanollm.data.sft import Chat, Writer
from nanollm.errors import DataError
from nanollm.text import chat as text_chat
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer, load
from tests.test_chat import TEMPLATES, TOOLS
from tests.test_sft import assistant, lines, spelled, user
from tests.tok_folders import byte_bpe, metaspace_bpe, write

SPECIAL = ("</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|observation|>",
           "<|User|>", "<|Assistant|>", "<|end|>")
STOPS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|observation|>")
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# tojson of an object; the thoughts are not read
QWEN2_5 = """{% if tools %}{{ '<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '</tools>' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{{ '<tool_call>{"name": "' + c.function.name + '", "arguments": ' }}{{ c.function.arguments | tojson }}{{ '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}""" + ASK
# an object or its JSON; thoughts from reasoning_content or from the content, of the last answer alone
QWEN3 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content or '' %}{% if m.role == 'assistant' %}{% set r = '' %}{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}{% elif '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{% endif %}{{ c }}{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' }}{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}""" + ASK
# one call, and then no content; "parameters"
LLAMA3_1 = TEMPLATES["llama 3"].replace("{{- bos_token }}", "{{- '<s>' }}")
# the JSON as it stands; ids of nine characters
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% elif m.tool_calls is defined %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments }}{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + m.tool_call_id }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
# thoughts are cut, the prompt opens them; calls only where the content is null, and as JSON
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}{{ '<|Assistant|>' + c.type + ' ' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' + eos_token }}{% endfor %}{% elif m.role == 'assistant' %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + c + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
THINKING = QWEN3.replace("m.reasoning_content", "m.thinking")
GLM4 = """{% for m in messages %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}{{ c.function.name + '\n' + (c.function.arguments | tojson) }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
SIMPLE = """{% for m in messages %}{{ m.role.capitalize() + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    backend = byte_bpe(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, generation_config={"eos_token_id": [backend.token_to_id(text) for text in STOPS]},
                 tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                                   "bos_token": "<s>"})


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    """The tokenizer of the folder with this template."""
    def with_template(template: str) -> Tokenizer:
        loaded = load(folder)
        loaded.chat_template = template
        return loaded
    return with_template


def answers(tokenizer: Tokenizer, *messages: dict[str, Any], tools: Any = None) -> list[str]:
    """What is learnt of a chat that is read from JSON."""
    chat = chat_of(json.loads(json.dumps({"messages": messages, "tools": tools})), "chats.jsonl, line 3")
    return [answer for example in Writer(tokenizer).examples(chat) for answer in spelled(tokenizer, example)[1]]


def notes(tokenizer: Tokenizer, *messages: dict[str, Any]) -> dict[str, int]:
    """What is said of three chats like this."""
    writer = Writer(tokenizer)
    for _ in range(3):
        writer.examples(chat_of(json.loads(json.dumps({"messages": messages})), "x"))
    return dict(writer.notes)


def calls(arguments: object, count: int = 1) -> dict[str, Any]:
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "rain", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call] * count}


# ---- fields that a template does not write

@pytest.mark.parametrize("template, message, field", [
    ("chatml", calls({"city": "Bern"}), "tool_calls[0].function.name; tool_calls[0].function.arguments"),
    ("chatml", assistant("Hello") | {"thinking": "hm"}, "thinking"),
    ("chatml", assistant("Hello") | {"reasoning_content": "hm"}, "reasoning_content"),
    ("chatml", assistant("Hello") | {"citations": ["a"]}, "citations"),
    (QWEN2_5, assistant("Hello") | {"reasoning": "hm"}, "reasoning"),
    (LLAMA3_1, calls({"city": "Bern"}) | {"content": "Let me see"}, "content"),
    (LLAMA3_1, calls({"city": "Bern"}, 2), "tool_calls[1].function.name; tool_calls[1].function.arguments"),
    (QWEN2_5.replace("c.function.arguments | tojson", "''"), calls({}), "tool_calls[0].function.arguments"),
    (QWEN3.replace("if loop.last", "if false"), assistant("<think>hm</think>yes"), "the thoughts before </think>"),
])
def test_4_3_a_field_that_the_template_does_not_write_is_an_error(tokenizer, template, message, field) -> None:
    ours = tokenizer(TEMPLATES.get(template, template))
    with pytest.raises(DataError) as error:
        answers(ours, user("Hi"), message)
    assert f"chats.jsonl, line 3, message 2, of the assistant: the chat template does not write {field}" in str(error.value)


@pytest.mark.parametrize("message, where", [
    ({"role": "system", "content": "Be brief"}, "message 1, of the system"), ({"role": "tool", "content": "3"}, "message 3"),
])
def test_4_3_a_role_that_the_template_passes_over_is_an_error(tokenizer, message, where) -> None:
    template = TEMPLATES["chatml"].replace("{% for message in messages %}", "{% for message in messages if message.role in ('user', 'assistant') %}")
    talk = [user("Hi"), assistant("Hello")]
    with pytest.raises(DataError, match=f"line 3, {where}.* does not write content"):
        answers(tokenizer(template), *([message, *talk] if message["role"] == "system" else
                                       [*talk, message, assistant("3 mm")]))


def test_4_3_tools_that_the_template_does_not_write_are_an_error(tokenizer) -> None:
    with pytest.raises(DataError, match="line 3: the chat template does not write the tools, and the chat has 1"):
        answers(tokenizer(TEMPLATES["chatml"]), user("Hi"), assistant("Hello"), tools=TOOLS)
    assert answers(tokenizer(QWEN2_5), user("Hi"), assistant("Hello"), tools=TOOLS) == ["Hello<|im_end|>"]


def test_fields_that_say_who_and_when_are_passed_over_and_named(tokenizer) -> None:
    extra = {"name": "Ada", "timestamp": 1700000000, "id": "7", "tool_call_id": "x"}
    ours = tokenizer(TEMPLATES["chatml"])
    assert answers(ours, user("Hi") | extra, assistant("Hello") | extra) == ["Hello<|im_end|>"]
    talk = [user("Hi") | extra, assistant("Hello") | extra, user("And?"), assistant("Bye") | {"id": "8"}]
    assert notes(ours, *talk) == {"name, timestamp, id, tool_call_id not written by the template": 2 * 3,
                                  "id not written by the template": 3}
    named = TEMPLATES["chatml"].replace("message['content']", "message['name'] | default('') + message['content']")
    assert notes(tokenizer(named), *talk) == {"timestamp, id, tool_call_id not written by the template": 2 * 3,
                                              "id not written by the template": 3}


# ---- one thing under several names

@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
@pytest.mark.parametrize("template", [QWEN3, THINKING, R1], ids=["qwen3", "thinking", "r1"])
def test_4_3_thoughts_are_written_under_the_name_that_the_template_reads(tokenizer, template, name) -> None:
    found, = answers(tokenizer(template), user("Hi"), assistant("yes") | {name: "hm, é"})
    assert found == {R1: "hm, é\n</think>\n\nyes</s>"}.get(template, "<think>\nhm, é\n</think>\n\nyes<|im_end|>")


@pytest.mark.parametrize("template, name, what", [
    (QWEN3, "reasoning", "reasoning written as reasoning_content"), (QWEN3, "reasoning_content", None),
    (THINKING, "thinking", None), (THINKING, "reasoning_content", "reasoning_content written as thinking"),
    (R1, "thinking", "thinking written as <think>…</think> in the content"),
])
def test_another_name_that_was_taken_is_said(tokenizer, template, name, what) -> None:
    found = notes(tokenizer(template), user("Hi"), assistant("yes") | {name: "hm"})
    assert found == ({what: 3} if what else {})


@pytest.mark.parametrize("template, given, what", [
    (QWEN2_5, '{"city": "Bern"}', "arguments of tool calls, which are text, written as an object"),
    (QWEN2_5, {"city": "Bern"}, None), (MISTRAL, '{"city": "Bern"}', None),
    (MISTRAL, {"city": "Bern"}, "arguments of tool calls, which are an object, written as text"),
])
def test_another_kind_of_arguments_that_was_taken_is_said(tokenizer, template, given, what) -> None:
    assert notes(tokenizer(template), user("Hi"), calls(given)) == ({what: 3} if what else {})


@pytest.mark.parametrize("given", [{"city": "Zürich"}, '{"city": "Zürich"}'], ids=["object", "text"])
@pytest.mark.parametrize("template, expected", [
    (QWEN2_5, '<tool_call>{"name": "rain", "arguments": {"city": "Zürich"}}</tool_call><|im_end|>'),
    (QWEN3, '<think>\n\n</think>\n\n<tool_call>rain {"city": "Zürich"}</tool_call><|im_end|>'),
    (LLAMA3_1, '{"name": "rain", "parameters": {"city": "Zürich"}}<|eot_id|>'),
    (MISTRAL, '[TOOL_CALLS]rain[ARGS]{"city": "Zürich"}</s>'),
    (GLM4, 'rain\n{"city": "Zürich"}<|observation|>'),
], ids=["qwen2.5", "qwen3", "llama 3.1", "mistral", "glm4"])
def test_4_3_tool_arguments_are_written_as_json_once(tokenizer, template, expected, given) -> None:
    ours = tokenizer(template)
    result = {"role": "tool", "content": "3", "tool_call_id": "abcdefghi", "name": "rain"}
    called, answered = answers(ours, user("Hi"), calls(given), result, assistant("3 mm"))
    assert called.strip() == expected and "3 mm" in answered


def test_4_3_calls_of_r1_have_a_content_of_null(tokenizer) -> None:
    """Where the content is "" its template writes an empty answer and no call."""
    found, = answers(tokenizer(R1), user("Hi"), calls({"city": "Bern"}))
    assert found == '\n</think>\n\nfunction rain\n```json\n{"city": "Bern"}\n```</s>'


def test_arguments_that_are_no_json_are_named(tokenizer) -> None:
    with pytest.raises(DataError, match="message 2.* tool_calls, whose arguments are no JSON"):
        answers(tokenizer(QWEN2_5), user("Hi"), calls("city=Bern"))


def test_a_call_of_sharegpt_and_of_openais_older_kind(tokenizer) -> None:
    call = {"name": "rain", "arguments": {"city": "Bern"}}
    items = [{"messages": [user("Hi"), {"role": "assistant", "content": None, "function_call": call}]},
             {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(call)}]}]
    ours = tokenizer(QWEN2_5)
    for item in items:
        example, = sft.examples(ours, chat_of(item, "x"))
        assert spelled(ours, example)[1] == [
            '<tool_call>{"name": "rain", "arguments": {"city": "Bern"}}</tool_call><|im_end|>']


# ---- which answers are learnt

@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0, "train": False}])
def test_4_3_a_turn_that_is_not_to_be_learnt_is_context(tokenizer, key) -> None:
    ours = tokenizer(TEMPLATES["chatml"])
    talk = [user("Hi"), assistant("Hello") | key, user("And?"), assistant("Bye") | {"weight": 1, "train": True}]
    example, = sft.examples(ours, chat_of({"messages": talk}, "x"))
    plain, = sft.examples(ours, Chat("x", [{k: m[k] for k in ("role", "content")} for m in talk]))
    assert spelled(ours, example)[1] == ["Bye<|im_end|>"] and example.tokens.tolist() == plain.tokens.tolist()


def test_4_7_a_chat_that_the_assistant_opens_and_an_empty_answer(tokenizer) -> None:
    ours = tokenizer(TEMPLATES["chatml"])
    assert answers(ours, assistant("Welcome"), user("Hi"), assistant("Hello")) == ["Hello<|im_end|>"]
    assert answers(ours, user("Hi"), assistant(" "), user("Hi?"), assistant("Hello")) == ["Hello<|im_end|>"]
    assert answers(ours, user("Hi"), assistant("")) == []


def test_4_7_a_prompt_beside_messages_is_their_first_question(tmp_path) -> None:
    """UltraChat, no_robots."""
    item = {"prompt": "Hi", "prompt_id": "7", "messages": [user("Hi"), assistant("Hello")], "category": "Chat"}
    chat, = sft.read(lines(tmp_path / "x.jsonl", item))
    assert chat.messages == item["messages"] and chat.first == 0 and not chat.plain


# ---- ends

def test_4_3_an_answer_in_the_middle_learns_to_end(tokenizer) -> None:
    """The ids stay those of inference; the target behind an answer is what generation stops at."""
    ours = tokenizer(SIMPLE)
    example, = sft.examples(ours, Chat("x", [user("a"), assistant("b"), user("c"), assistant("d")]))
    text = ours.decode(example.tokens, skip_special=False)
    assert text == "User: a\nAssistant: b\nUser: c\nAssistant: d\n</s>"
    learnt = [ours.decode([id], skip_special=False) for id in example.targets if id >= 0]
    assert "".join(learnt) == " b\n</s> d\n</s>" and learnt.count("</s>") == 2
    asked = Conversation(ours, [user("a"), assistant("b"), user("c")]).prompt_ids()
    assert example.tokens[: len(asked)].tolist() == asked
    assert sft.picture(ours, example, colour=False) == "User: a\nAssistant:⟦ b\n→</s>⟧User: c\nAssistant:⟦ d\n</s>⟧"
    row = sft.Chats("x", [example], 64, 0).row(0)
    assert row[1][: len(example.tokens)].tolist() == example.targets.tolist()


def test_4_3_a_role_marker_at_which_generation_stops_is_the_end(tokenizer) -> None:
    ours = tokenizer(GLM4)
    example, = sft.examples(ours, Chat("x", [user("a"), assistant("b"), user("c"), assistant("d")]))
    assert spelled(ours, example) == ("<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>\nd<|user|>",
                                      ["b<|user|>", "d<|user|>"])
    stop = ours.special_tokens["<|user|>"]
    assert stop in ours.stop_ids and (example.stops < 0).all()


def test_what_stands_behind_a_stop_id_is_no_silent_loss(tokenizer) -> None:
    """gpt-oss with <|end|> among its stop ids: the final answer would never be learnt."""
    template = TEMPLATES["chatml"].replace("message['content']", "('hm<|end|>' if message.role == 'assistant' else '') + message['content']")
    ours = tokenizer(template)
    ours.stop_ids = (*ours.stop_ids, ours.special_tokens["<|end|>"])
    with pytest.raises(DataError, match="message 2: the template writes \"Hello\" behind <|end|>.*eos_token_id"):
        answers(ours, user("Hi"), assistant("Hello"))


# ---- prompts that open thoughts

def test_4_7_r1_distill_is_learnt_as_it_is_asked(tokenizer, folder) -> None:
    """Its prompt ends in <think>, its template cuts the thoughts of what was said."""
    ours = tokenizer(R1)
    talk = [user("a"), assistant("<think>\nhm\n</think>\n\nyes"), user("b"), assistant("no")]
    writer = Writer(ours)
    first, second = writer.examples(Chat("x", talk))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for example, i in ((first, 1), (second, 3)):
        prompt = theirs.apply_chat_template(talk[:i], chat_template=R1, add_generation_prompt=True, return_dict=False)
        assert example.tokens[: len(prompt)].tolist() == prompt == Conversation(ours, talk[:i]).prompt_ids()
        assert (example.targets[: len(prompt) - 1] == -100).all()
    assert spelled(ours, first) == ("<s><|User|>a<|Assistant|><think>\nhm\n</think>\n\nyes</s>",
                                    ["hm\n</think>\n\nyes</s>"])
    assert spelled(ours, second)[1] == ["\n</think>\n\nno</s>"] and sum(writer.notes.values()) == 1
    assert "<|Assistant|>\n\nyes</s><|User|>b" in spelled(ours, second)[0], "as the template writes what was said"


def test_4_7_the_tags_of_thoughts_may_be_special_tokens(tmp_path) -> None:
    """What a person typed is letters; the tag that closes the thoughts is the model's own token."""
    byte_bpe(("</s>", "<|User|>", "<|Assistant|>", "<think>", "</think>")).save(str(tmp_path / "tokenizer.json"))
    ours = load(write(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}))
    ours.chat_template = R1.replace("{{ bos_token }}", "")
    example, = sft.examples(ours, Chat("x", [user("a </s>"), assistant("<think>\nhm </s>\n</think>\n\nyes")]))
    assert spelled(ours, example) == ("<|User|>a </s><|Assistant|><think>\nhm </s>\n</think>\n\nyes</s>",
                                      ["hm </s>\n</think>\n\nyes</s>"])
    for text, count in (("</s>", 1), ("<think>", 1), ("</think>", 1)):
        assert example.tokens.tolist().count(ours.special_tokens[text]) == count


# ---- the ids of pieces are those of the whole

@pytest.mark.parametrize("template", [TEMPLATES["chatml"], TEMPLATES["llama 3"], QWEN3, MISTRAL, R1, SIMPLE])
def test_4_8_pieces_have_the_ids_of_the_whole(tokenizer, monkeypatch, template) -> None:
    said = ["Hi  <|im_end|> there\n", " é👍 <s>", "x", "\n\n1 2 3 ", "   "]
    talk = [turn for text in said for turn in (user(text), assistant(text + "."))]
    pieces, whole = Writer(tokenizer(template)), Writer(tokenizer(template))
    pieces._checks, whole._by_pieces = 0, False
    for ours, theirs in zip(pieces.examples(Chat("x", talk)), whole.examples(Chat("x", talk)), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.targets.tolist() == theirs.targets.tolist()


def test_4_8_where_pieces_differ_the_definition_is_used(tmp_path, monkeypatch) -> None:
    metaspace_bpe().save(str(tmp_path / "tokenizer.json"))
    ours = load(write(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>",
                                                  "eos_token": "</s>"}))
    ours.chat_template = TEMPLATES["llama 2"]
    talk = [user("hello world"), assistant("the dogs"), user("so"), assistant("b")]
    writer = Writer(ours)
    example, = writer.examples(Chat("x", talk))
    assert example.tokens.tolist() == Conversation(ours, talk).prompt_ids(add_generation_prompt=False)

    honest = text_chat.ids
    monkeypatch.setattr("nanollm.data.chat_writing.ids", lambda tokenizer, text: [*honest(tokenizer, text), 5])
    writer = Writer(ours)
    assert writer.ids("<s>a</s>")[-1] == 5 and not writer._by_pieces
