"""Chats to learn from: the ids of training are the ids of inference, the answers are learnt and nothing else, rows
lose nothing.

The oracle for the answers is transformers, with {% generation %} in the template; formats and rows are written out by
hand.
"""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Regex, pre_tokenizers

from nanollm.data import sft
from nanollm.data.sft import Chat, Chats, Example
from nanollm.errors import DataError, TokenizerError
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer, load
from tests.test_chat import SYSTEM, TEMPLATES, TOOLS
from tests.tok_folders import begin_with, byte_bpe, metaspace_bpe, write

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = TEMPLATES["chatml"]
MARKED = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FORGETS = """{%- for m in messages %}
    {%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<|im_start|>assistant\n<think>\n' + m.content.split('</think>')[0].replace('<think>', '').strip('\n') + '\n</think>\n\n' + text + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
SIMPLE = """{% for m in messages %}{{ m.role.capitalize() + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALK = [
    SYSTEM, user("hello world"), assistant("I read <b>code</b>, 123"), user("and then?"), assistant("they jump over"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stops at </s>, <|im_end|> and <|eot_id|>."""
    folder = tmp_path_factory.mktemp("sft")
    backend = byte_bpe(SPECIAL)
    pieces = [
        pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        pieces
    )  # GPT-2's would cut "\n\n" in two before a letter, but not at the end
    begin_with(backend, "<s>")
    backend.save(str(folder / "tokenizer.json"))
    stops = [backend.token_to_id(text) for text in ("</s>", "<|im_end|>", "<|eot_id|>")]
    return write(
        folder,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        generation_config={"eos_token_id": stops},
    )


@pytest.fixture
def tokenizer(folder: Path, tmp_path: Path):
    """The tokenizer of the folder with this template."""
    def with_template(template: str | None) -> Tokenizer:
        loaded = load(folder)
        loaded.chat_template = template
        return loaded
    return with_template


def lines(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def spelled(tokenizer: Tokenizer, example: Example) -> tuple[str, list[str]]:
    """The text of an example, and the texts of its answers."""
    edges = np.flatnonzero(np.diff(example.answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return (tokenizer.decode(example.tokens, skip_special=False),
            [tokenizer.decode(example.tokens[start:end], skip_special=False) for start, end in edges])


def example(*tokens: int, answer: str) -> Example:
    return marked(np.array(tokens, np.int64), np.array([mark == "x" for mark in answer]))


def marked(tokens: np.ndarray, answer: np.ndarray) -> Example:
    """An example of which these tokens are answers, each predicted by the one before it."""
    return Example(tokens, np.append(np.where(answer[1:], tokens[1:], -100), -100))


# ---- formats

FORMATS = {
    "messages": ({"messages": TALK, "id": 7, "tools": None}, TALK),
    "messages with parts of text": (
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("c")]},
        [user("ab"), assistant("c")],
    ),
    "messages with a tool call": (
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"x": 1}], "name": None}]},
        [user("a"), {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}],
    ),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n1 2"), assistant("3")]),
    "alpaca, bare": ({"instruction": "Hi", "input": "", "output": "Ho", "system": ""}, [user("Hi"), assistant("Ho")]),
    "alpaca, whole": (
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"], ["e", "f"]]},
        [
            {"role": "system", "content": "s"}, user("a"), assistant("b"), user("e"), assistant("f"), user("c"),
            assistant("d"),
        ],
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "user", "value": "c"},
                {"from": "assistant", "value": "d"},
            ],
        },
        [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")],
    ),
    "sharegpt with more keys": (
        {
            "conversations": [
                {"from": "human", "value": "a", "role": "x", "content": None}, {"from": "gpt", "value": "b"},
            ]
        },
        [user("a"), assistant("b")],
    ),
    "a system prompt beside the messages": (
        {"system_prompt": "s", "messages": [user("a"), assistant("b")], "tools": ""},
        [{"role": "system", "content": "s"}, user("a"), assistant("b")],
    ),
    "prompt and response": (
        {"prompt": "c", "query": "d", "response": "e", "history": [["a", "b"]], "system": ""},
        [user("a"), assistant("b"), user("c\nd"), assistant("e")],
    ),
    "tools as text": ({"messages": TALK, "tools": json.dumps(TOOLS)}, TALK),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, [user("a"), assistant("b")]),
    "prompt and completion of messages": (
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
        [user("a"), assistant("b"), user("c"), assistant("d")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_becomes_messages(tmp_path, name):
    item, messages = FORMATS[name]
    (chat,) = sft.read(lines(tmp_path / "x.jsonl", item))
    assert chat.messages == messages and chat.where.endswith("x.jsonl, line 1")
    assert chat.plain == (name == "prompt and completion")
    learnt = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert chat.answers == (learnt if name != "prompt and completion of messages" else [3])     # the prompt is context


def test_tools_come_along(tmp_path):
    (chat,) = sft.read(lines(tmp_path / "x.jsonl", {"messages": TALK, "tools": TOOLS}))
    assert chat.tools == TOOLS


def test_a_file_a_list_and_a_folder_are_read_in_order(tmp_path):
    items = [{"prompt": text, "completion": "x"} for text in "abc"]
    (tmp_path / "z.json").write_text(json.dumps(items, indent=1))
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    lines(tmp_path / "sub" / "m.jsonl", items[2])
    lines(tmp_path / ".hidden" / "a.jsonl", items[0])
    (tmp_path / "b.jsonl").write_bytes(
        "\ufeff{}\r\n\r\n{}\n".format(
            json.dumps(items[0]), json.dumps({**items[1], "note": "\u2028"}, ensure_ascii=False)
        ).encode()
    )

    def asked(path: Path) -> list[tuple[str, str]]:
        return [(chat.messages[0]["content"], chat.where.removeprefix(str(tmp_path))) for chat in sft.read(path)]

    assert asked(tmp_path / "z.json") == [("a", "/z.json, item 1"), ("b", "/z.json, item 2"), ("c", "/z.json, item 3")]
    assert asked(tmp_path) == [("a", "/b.jsonl, line 1"), ("b", "/b.jsonl, line 3"), ("c", "/sub/m.jsonl, line 1")]


GOOD = {"prompt": "a", "completion": "b"}
REFUSED = {
    "no format": (
        {"text": "a", "prompt": "b"},
        ['"text", "prompt"', "messages, [tools]", "instruction, output", "conversations", "prompt, completion"],
    ),
    "two formats": ({"messages": TALK, "output": "b"}, ["one format", '"output"']),
    "a key of another format": ({"messages": TALK, "input": "b"}, ["one format", '"input"']),
    "another prompt than the first question": ({"messages": TALK, "prompt": "b"}, ["one format", '"prompt"']),
    "two system messages": ({"messages": TALK, "system": "b"}, ["one system message", '"b"']),
    "two systems": ({"instruction": "a", "output": "b", "system": "c", "system_prompt": "d"}, ["one of 'system' and"]),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["chosen, rejected", "preference data", "--preference"]),
    "a chat with a weight": ({"messages": TALK, "weight": 0.5}, ["'weight' of a whole chat", "--mix", "0.5"]),
    "weights that do not agree": (
        {"messages": [user("a"), assistant("b") | {"weight": 0, "train": True}]}, ["message 2", "agree", '"train"'],
    ),
    "a question to learn": ({"messages": [user("a") | {"train": True}, assistant("b")]}, ["message 1", "'train'"]),
    "a train that is no truth": ({"messages": [user("a"), assistant("b") | {"train": "no"}]}, ["'train'", '"no"']),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]},
        ["message 2", "JSON", "f(x)"],
    ),
    "two thoughts": (
        {"messages": [user("a"), assistant("b") | {"thinking": "c", "reasoning": "d"}]}, ["message 2", "one of"],
    ),
    "no object": ([1], ["an object", "[1]"]),
    "no list of messages": ({"messages": "a"}, ["'messages' to be a list", '"a"']),
    "no messages": ({"messages": []}, ["an answer of the assistant"]),
    "no answer": ({"messages": [user("a")]}, ["an answer of the assistant", '["user"]']),
    "no answer in the completion": (
        {"prompt": [user("a"), assistant("b")], "completion": [user("c")]}, ["an answer of the assistant"],
    ),
    "nothing before the answer": ({"messages": [assistant("b")]}, ["something before it", '["assistant"]']),
    "an unknown role": (
        {"messages": [user("a"), {"role": "robot", "content": "b"}]},
        ["message 2", "'role'", "one of system", '"robot"'],
    ),
    "a role that is no text": ({"messages": [user("a"), {"role": ["user"], "content": "b"}]}, ["message 2", "'role'"]),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "b"}]}, ["message 1", "'from'", "narrator"],
    ),
    "a message that is none": ({"messages": ["a"]}, ["message 1", "an object"]),
    "no content": ({"messages": [{"role": "user"}, assistant("b")]}, ["message 1", "'content' to be text", "null"]),
    "a number for content": ({"messages": [user("a"), assistant(3)]}, ["message 2", "'content' to be text", "3"]),
    "no parts": ({"messages": [user([]), assistant("b")]}, ["message 1", "'content' to be text"]),
    "an image": (
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "image", "url": "b"}]), assistant("b")]},
        ["message 1", "parts of type text", "image"],
    ),
    "a part without text": (
        {"messages": [user([{"type": "text"}]), assistant("b")]}, ["message 1", "parts of type text"],
    ),
    "an answer with a weight": (
        {"messages": [user("a"), assistant("b") | {"weight": 0.5}]}, ["message 2", "'weight' to be 0 or 1", "0.5"],
    ),
    "a number for an instruction": ({"instruction": 1, "output": "b"}, ["'instruction' to be text", "1"]),
    "a history of texts": ({"instruction": "a", "output": "b", "history": ["c", "d"]}, ["'history'", "pairs"]),
    "a history of threes": ({"instruction": "a", "output": "b", "history": [["c", "d", "e"]]}, ["'history'", "pairs"]),
    "a prompt of another kind": ({"prompt": "a", "completion": [assistant("b")]}, ["both text or both lists"]),
    "tools that are no list": ({"messages": TALK, "tools": "a"}, ["'tools' to be a list"]),
    "half a character": ({"prompt": "\ud800", "completion": "b"}, ["surrogates"]),
    "a key that drives the terminal": ({"\x1b]0;hi\x07": 1}, ["\\u001b]0;hi\\u0007"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_the_line(tmp_path, name):
    item, words = REFUSED[name]
    with pytest.raises(DataError) as error:
        sft.read(lines(tmp_path / "x.jsonl", GOOD, item))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'x.jsonl'}, line 2") and all(word in message for word in words), message
    assert "\n" not in message and message.isprintable() and len(message) < 900


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n\n{"prompt": \n', ["x.jsonl, line 3", "not JSON"]),
    ("x.jsonl", b'{"prompt": "\xc3\xa9\xff\xfe\xfd\x81", "completion": "b"}\n', ["x.jsonl: not a text file", "UTF-8"]),
    ("x.jsonl", b"[" * 100_000, ["x.jsonl, line 1", "not JSON"]),
    ("x.jsonl", b"\n \n", ["x.jsonl: no chats"]),
    ("x.json", b'{"rows": [{"prompt": "a", "completion": "b"}]}', ["x.json, item 1: expected the keys", '"rows"']),
    ("x.json", b'[{"prompt": "a", "completion": "b"}, {]', ["x.json, item 2: not JSON"]),
    ("x.json", b'[{"prompt": "a", "completion": "b"}, 2]', ["x.json, item 2", "an object"]),
    ("x.json", b"[]", ["x.json: no chats"]),
    ("x.csv", b"prompt,completion\n", ["x.csv: no chats"]),
    ("x.csv", b"prompt,completion\na,b,c\n", ["x.csv, line 2", "found 3 columns, expected 2"]),
    ("x.csv", b'prompt,completion\n"a"b,c\n', ["x.csv, line 2: not a table"]),
    ("x.txt", b"a", ["x.txt", ".jsonl"]),
    ("x.jsonl.gz", b"a", ["x.jsonl.gz: cannot be unpacked"]),
    ("x.jsonl.zst", b"a", ["x.jsonl.zst: cannot be unpacked"]),
    ("x.parquet", b"a", ["x.parquet: cannot be read", "Parquet"]),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        sft.read(tmp_path / name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_folder_without_chats_and_a_path_without_anything_are_errors(tmp_path):
    with pytest.raises(DataError, match="no chats in it; expected .jsonl, .ndjson, .parquet files"):
        sft.read(tmp_path)
    with pytest.raises(DataError, match="nothing: cannot be read: No such file"):
        sft.read(tmp_path / "nothing")


# ---- ids

@pytest.mark.parametrize(
    "template", [CHATML, TEMPLATES["llama 3"], TEMPLATES["llama 2"], FORGETS, SIMPLE],
    ids=["chatml", "llama 3", "llama 2", "forgets", "simple"],
)
def test_the_ids_of_training_are_those_of_inference(tokenizer, template):
    """Each answer stands behind the very ids that ask for it, in the one example that learns it."""
    ours = tokenizer(template)
    talk = [*TALK[:2], assistant("<think>\nhm\n</think>\n\nyes"), *TALK[3:]]
    made = sft.examples(ours, Chat("x", talk))
    spans = [
        (one.tokens.tolist(), int(start))
        for one in made
        for start in np.flatnonzero(np.diff(one.answer.astype(int), prepend=0) == 1)
    ]
    assert len(spans) == 2 and len(made) == (2 if template == FORGETS else 1)
    for i, (ids, start) in zip((2, 4), spans, strict=True):
        prompt = Conversation(ours, talk[:i]).prompt_ids()
        assert ids[: len(prompt)] == prompt and start == len(prompt)
    assert all(one.tokens[-1] in ours.stop_ids and one.answer[-1] for one in made)
    assert made[0].tokens.tolist().count(ours.bos_id) == {TEMPLATES["llama 3"]: 1, TEMPLATES["llama 2"]: 2}.get(
        template, 0
    )


def test_what_a_template_makes_of_a_chat_is_as_written_here(tokenizer):
    text, answers = spelled(ours := tokenizer(CHATML), sft.examples(ours, Chat("x", TALK[1:]))[0])
    assert text == (
        "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\nI read <b>code</b>, 123<|im_end|>\n"
        "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\nthey jump over<|im_end|>"
    )
    assert answers == ["I read <b>code</b>, 123<|im_end|>", "they jump over<|im_end|>"]

    ours, talk = tokenizer(FORGETS), [user("a"), assistant("<think>\nhm\n</think>\n\nyes"), user("b"), assistant("no")]
    first, second = (spelled(ours, one) for one in sft.examples(ours, Chat("x", talk)))
    assert first == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nyes<|im_end|>",
        ["<think>\nhm\n</think>\n\nyes<|im_end|>"],
    )
    assert (
        second[0].startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
        and len(second[1]) == 1
    )


def test_the_end_is_learnt_where_the_template_writes_none(tokenizer):
    ours = tokenizer(SIMPLE)
    (one,) = sft.examples(ours, Chat("x", TALK[1:]))
    assert spelled(ours, one) == (
        "User: hello world\nAssistant: I read <b>code</b>, 123\nUser: and then?\nAssistant: they jump over\n</s>",
        [" I read <b>code</b>, 123\n", " they jump over\n</s>"],
    )


@pytest.mark.parametrize(
    "chat",
    [
        TALK, TALK[:3], [user("a"), assistant("b")],
        [user("é👍"), assistant("  你好 \n"), user("\n"), assistant("\n\nx")],
    ],
)
def test_the_answers_are_those_that_transformers_marks(folder, tmp_path, tokenizer, chat):
    """{% generation %} stands around an answer and its end. Ours stops there; the template's "\\n" after the last
    end is cut off."""
    theirs = transformers.AutoTokenizer.from_pretrained(shutil.copytree(folder, tmp_path / "copy")).apply_chat_template(
        chat, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True)
    ours = tokenizer(MARKED)
    (one,) = sft.examples(ours, Chat("x", chat))
    n = len(one.tokens)
    assert (
        theirs["input_ids"][:n] == one.tokens.tolist()
        and theirs["assistant_masks"][:n] == one.answer.astype(int).tolist()
    )
    assert ours.decode(theirs["input_ids"][n:], skip_special=False) == "\n" and sum(theirs["assistant_masks"][n:]) == 0
    assert sum(one.answer) > 1


def test_an_answer_ends_where_generation_would(tokenizer):
    """Phi-3's way: the turn ends with one stop id, the whole chat with another, which no model ever gets to say."""
    ours = tokenizer(CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"))
    assert Conversation(ours, TALK).prompt_ids(add_generation_prompt=False)[-1] == ours.eos_id
    (one,) = sft.examples(ours, Chat("x", TALK))
    assert one.tokens.tolist() == sft.examples(tokenizer(CHATML), Chat("x", TALK))[0].tokens.tolist()
    assert spelled(ours, one)[1] == ["I read <b>code</b>, 123<|im_end|>", "they jump over<|im_end|>"]


def test_nobody_ends_a_turn_by_typing(tokenizer):
    ours = tokenizer(CHATML)
    typed = "a<|im_end|>\n<|im_start|>assistant\nb</s>"
    (one,) = sft.examples(ours, Chat("x", [user(typed), assistant("<|im_end|>c")]))
    end = ours.special_tokens["<|im_end|>"]
    assert (one.tokens == end).sum() == 2 and ours.special_tokens["</s>"] not in one.tokens
    assert (
        spelled(ours, one)[1] == ["<|im_end|>c<|im_end|>"] and one.answer.sum() > 4
    )  # the first is spelled in letters
    assert np.flatnonzero(one.tokens == end)[-1] == len(one.tokens) - 1


def test_a_token_that_spans_the_border_is_answer(tokenizer):
    """After "Assistant: " comes "the", but " the" is one token: the space is the model's to say, too."""
    ours = tokenizer(SIMPLE.replace("'Assistant:'", "'Assistant: '"))
    asked = Conversation(ours, [user("a")]).prompt_ids()
    (one,) = sft.examples(ours, Chat("x", [user("a"), assistant("the dogs")]))
    assert ours.decode(asked).endswith(": ") and one.tokens.tolist()[: len(asked)] != asked
    assert spelled(ours, one) == ("User: a\nAssistant: the dogs\n</s>", [" the dogs\n</s>"])
    assert one.tokens[one.answer][0] == ours.encode(" the", bos=False)[0] and len(ours.encode(" the", bos=False)) == 1


def test_a_border_inside_the_last_turn_parts_the_two(tmp_path):
    """GPT-2's rule: "\\n\\n" is one token at the end, where it asks, and two before a letter. The first "\\n" was
    the last turn's."""
    byte_bpe(SPECIAL).save(str(tmp_path / "tokenizer.json"))
    ours = load(write(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}))
    ours.chat_template = "{% for m in messages %}{{ ('\\n' if m.role == 'assistant' else '') + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
    first, second = sft.examples(ours, Chat("x", [user("a"), assistant("b"), assistant("c")]))
    assert spelled(ours, first) == ("a\n\nb\n</s>", ["\n\nb\n</s>"]) and spelled(ours, second) == (
        "a\n\nb\n\nc\n</s>", ["\n\nc\n</s>"],
    )
    assert all(one.tokens.shape == one.answer.shape for one in (first, second))


def test_a_prompt_and_a_completion_need_no_template(tokenizer):
    ours, chat = tokenizer(None), Chat("x", [user("the qui"), assistant("ck brown")], first=1, plain=True)
    asked, whole, border = ours.encode("the qui"), ours.encode("the quick brown"), 2
    assert (
        asked[:border] == whole[:border] == ours.encode("the") and asked[border] != whole[border]
    )  # " " + "qui", " q" + "uick"
    (one,) = sft.examples(ours, chat)
    assert one.tokens.tolist() == [*whole, ours.eos_id] and one.answer.tolist() == [
        i >= border for i in range(len(whole) + 1)
    ]
    (typed,) = sft.examples(ours, Chat("x", [user("a</s>"), assistant("</s>b")], first=1, plain=True))
    assert (typed.tokens == ours.eos_id).sum() == 1
    templated = tokenizer(CHATML)
    assert spelled(templated, sft.examples(templated, chat)[0])[1] == ["ck brown<|im_end|>"]
    with pytest.raises(
        TokenizerError, match="x, line 3: .*no chat template.*chat_template.jinja.*a prompt and a completion"
    ):
        sft.examples(ours, Chat("x, line 3", TALK))


def test_only_the_completion_of_messages_is_learnt(tokenizer):
    ours = tokenizer(CHATML)
    (one,) = sft.examples(ours, Chat("x", TALK, first=4))
    (both,) = sft.examples(ours, Chat("x", TALK))
    assert one.tokens.tolist() == both.tokens.tolist() and spelled(ours, one)[1] == ["they jump over<|im_end|>"]


def test_what_follows_the_last_answer_plays_no_part(tokenizer):
    ours = tokenizer(CHATML)
    one, more = (sft.examples(ours, Chat("x", talk))[0] for talk in (TALK, [*TALK, user("thanks")]))
    assert one.tokens.tolist() == more.tokens.tolist() and one.answer.tolist() == more.answer.tolist()


def test_tools_are_shown_to_the_template(tokenizer):
    ours = tokenizer(TEMPLATES["llama 3"])
    text = spelled(ours, sft.examples(ours, Chat("x", TALK, tools=TOOLS))[0])[0]
    assert '"name": "weather"' in text and "weather" not in spelled(ours, sft.examples(ours, Chat("x", TALK))[0])[0]


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('roles must alternate') }}", ["roles must alternate"]),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            ["message 3", "does not write content"],
        ),
        (CHATML.replace("assistant\n", "assistant\nSure: "), ["message 3", "Sure: ", "change the template"]),
    ],
)
def test_a_template_that_cannot_be_learnt_from_is_named(tokenizer, template, words):
    assert template != CHATML
    with pytest.raises(DataError) as error:
        sft.examples(tokenizer(template), Chat("x.jsonl, line 3", TALK))
    assert str(error.value).startswith("x.jsonl, line 3") and all(word in str(error.value) for word in words)


def test_a_tokenizer_that_never_stops_is_refused(tmp_path):
    byte_bpe(()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="x, line 1: the tokenizer has no stop id"):
        sft.examples(load(tmp_path), Chat("x, line 1", [user("a"), assistant("b")], first=1, plain=True))


def test_a_tokenizer_with_spaces_as_pieces_is_served(tmp_path):
    """Llama 2's kind: the text of the answer is that of the message, whatever the tokenizer does about spaces."""
    metaspace_bpe().save(str(tmp_path / "tokenizer.json"))
    ours = load(
        write(
            tmp_path,
            tokenizer_config={"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        )
    )
    ours.chat_template = TEMPLATES["llama 2"]
    (one,) = sft.examples(ours, Chat("x", TALK))
    prompt = Conversation(ours, TALK[:4]).prompt_ids()
    assert one.tokens.tolist()[: len(prompt)] == prompt and one.answer.tolist()[len(prompt) - 1 : len(prompt) + 1] == [
        False, True,
    ]
    assert [answer.strip() for answer in spelled(ours, one)[1]] == [
        "I read <b>code</b>, 123 </s>", "they jump over </s>",
    ]


# ---- the picture

def test_the_picture_shows_answers_and_special_tokens(tokenizer):
    ours = tokenizer(CHATML)
    (one,) = sft.examples(ours, Chat("x", [user("hello"), assistant("你好 👍"), user("so"), assistant("b")]))
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert (
        sft.picture(ours, one, colour=False)
        == ask.format("hello") + "⟦你好 👍<|im_end|>⟧\n" + ask.format("so") + "⟦b<|im_end|>⟧"
    )
    assert sft.picture(ours, one, colour=True) == sft.picture(ours, one, colour=False).replace("⟦", "\x1b[32m").replace(
        "⟧", "\x1b[0m"
    )


def test_the_data_cannot_drive_the_terminal(tokenizer):
    ours = tokenizer(CHATML)
    evil = "\x1b[2J\x1b]0;t\x07\x9b31m\r\b\x7f\x00\u202e\u2028⟧"
    (one,) = sft.examples(ours, Chat("x", [user(evil + "\tok\n"), assistant(evil)]))
    shown = sft.picture(ours, one, colour=True).replace("\x1b[32m", "", 1).replace("\x1b[0m", "", 1)
    assert shown.replace("\n", "").replace("\t", "").isprintable() and "\tok\n" in shown
    assert shown.count(r"\x1b[2J\x1b]0;t\x07\x9b31m\r\x08\x7f\x00\u202e\u2028\u27e7") == 2


# ---- rows

SMALL = [example(5, 6, 7, answer="..x"), example(8, 9, 10, 11, 12, answer=".xx.x"), example(13, 14, answer=".x")]


def test_rows_are_as_written_by_hand():
    """T = 8: the longest first, 5 tokens, then 3; the 2 do not fit and open a row, the rest of which is padding."""
    source = Chats("chats", SMALL, 8, pad=3)
    assert source.rows == 2 and source.dropped == 0 and source.name == "chats"
    tokens, targets, positions = source.row(0)
    assert tokens.tolist() == [8, 9, 10, 11, 12, 5, 6, 7]
    assert targets.tolist() == [9, 10, -100, 12, -100, -100, 7, -100]
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    tokens, targets, positions = source.row(1)
    assert tokens.tolist() == [13, 14, 3, 3, 3, 3, 3, 3]
    assert targets.tolist() == [14] + [-100] * 7
    assert positions.tolist() == [0, 1] + [-1] * 6
    assert all(part.dtype == np.int64 and part.shape == (8,) for part in source.row(1))


def random_examples(count: int, longest: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return [marked(rng.integers(1, 500, n), np.concatenate([[False], rng.random(n - 1) < 0.5])) for n in lengths]


def test_every_example_is_in_the_rows_once():
    examples = random_examples(200, 40)
    source = Chats("chats", examples, 32, pad=0)
    found = []
    for index in range(source.rows):
        tokens, targets, positions = source.row(index)
        used = int((positions >= 0).sum())
        assert (positions[used:] == -1).all() and (targets[used:] == -100).all() and (tokens[used:] == 0).all()
        starts = [*np.flatnonzero(positions == 0), used]
        for start, stop in itertools.pairwise(starts):
            assert positions[start:stop].tolist() == [*range(stop - start)]
            found.append((tuple(tokens[start:stop]), tuple(targets[start:stop])))
    kept = [one for one in examples if len(one.tokens) <= 32]
    expected = [
        (tuple(one.tokens), tuple(int(t) if a else -100 for t, a in zip(one.tokens[1:], one.answer[1:], strict=True)) + (-100,))
        for one in kept
    ]
    assert sorted(found) == sorted(expected) and source.dropped == 200 - len(kept) > 0
    fewest = sum(len(one.tokens) for one in kept) / 32
    assert fewest <= source.rows <= 11 / 9 * fewest + 1


def test_packing_is_first_fit_decreasing():
    """By hand, T = 10: 7 → row 0, 6 → row 1, 4 → row 1, 3 → row 0, 3 → row 2 (the second 3: no room), 2 → row 2."""
    assert sft.pack([3, 7, 2, 6, 3, 4], 10) == [[1, 0], [3, 5], [4, 2]]
    assert sft.pack([15, 12, 6, 2], 20) == [[0, 3], [1, 2]], "the first row with room, not the fullest"
    assert sft.pack([10, 10], 10) == [[0], [1]] and sft.pack([1] * 10, 10) == [[*range(10)]]


def test_an_example_changes_its_own_cells_only():
    examples = random_examples(40, 20)
    changed = list(examples)
    changed[7] = marked(examples[7].tokens + 1000, ~examples[7].answer & (np.arange(len(examples[7].tokens)) > 0))
    before, after = Chats("a", examples, 24, 0), Chats("a", changed, 24, 0)
    assert before.rows == after.rows and before.fingerprint != after.fingerprint
    cells = 0
    for index in range(before.rows):
        (tokens, targets, positions), (tokens2, targets2, positions2) = before.row(index), after.row(index)
        own = tokens2 >= 1000
        assert (
            (tokens[~own] == tokens2[~own]).all()
            and (targets[~own] == targets2[~own]).all()
            and (positions == positions2).all()
        )
        cells += int(own.sum())
    assert cells == len(examples[7].tokens)


def test_the_fingerprint_is_of_tokens_answers_and_context():
    again = Chats("another name", SMALL, 8, pad=0)
    others = [
        Chats("a", SMALL, 9, 0), Chats("a", SMALL[:2], 8, 0),
        Chats("a", [*SMALL[:2], example(13, 15, answer=".x")], 8, 0),
        Chats("a", [example(5, 6, 7, answer=".xx"), *SMALL[1:]], 8, 0),
    ]
    assert again.fingerprint == Chats("a", SMALL, 8, 3).fingerprint
    assert len({again.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert 0 <= again.fingerprint < 2**32


def test_what_fits_no_row_is_dropped_and_nothing_left_is_an_error():
    source = Chats("chats", SMALL, 3, pad=0)
    assert source.dropped == 1 and source.rows == 2
    with pytest.raises(DataError, match="chats: none of 1 examples fits --context 4; the longest has 5 tokens"):
        Chats("chats", SMALL[1:2], 4, pad=0)
    with pytest.raises(DataError, match="chats: none of 0 examples"):
        Chats("chats", [], 4, pad=0)


def test_ids_that_the_model_lacks_are_refused():
    source = Chats("chats", SMALL, 8, pad=0)
    source.verify(15)
    source.unchanged()
    with pytest.raises(DataError, match="chats: token id 14, expected ids below 14"):
        source.verify(14)
    with pytest.raises(DataError, match="token id 99"):
        Chats("chats", SMALL, 8, pad=99).verify(15)


# ---- holding out

def chats(count: int) -> list[Chat]:
    return [Chat(f"line {i}", [user(f"question {i}"), assistant("a")]) for i in range(count)]


def test_a_twentieth_is_held_out_whatever_the_order():
    kept, held = sft.split(chats(200))
    assert len(held) == 10 and len(kept) == 190 and not {chat.where for chat in kept} & {chat.where for chat in held}
    assert [chat.where for chat in kept] == [chat.where for chat in chats(200) if chat not in held], (
        "and in the order of the file"
    )
    again = sft.split(chats(200)[::-1])[1]
    assert {chat.where for chat in again} == {chat.where for chat in held}
    assert len(sft.split(chats(200), share=0.25)[1]) == 50


def test_a_few_more_chats_move_few_others():
    held, more = ({chat.where for chat in sft.split(chats(count))[1]} for count in (400, 420))
    assert len(more - held - {f"line {i}" for i in range(400, 420)}) <= 1


def test_equal_chats_are_on_one_side():
    twice = [*chats(60), *(Chat(f"copy of {chat.where}", chat.messages) for chat in chats(60))]
    kept, held = sft.split(twice)
    assert len(held) == 6 and {f"copy of {chat.where}" for chat in held if "copy" not in chat.where} == {
        chat.where for chat in held if "copy" in chat.where
    }
    assert not {chat.messages[0]["content"] for chat in kept} & {chat.messages[0]["content"] for chat in held}


def test_of_few_chats_none_is_held_out():
    assert sft.split(chats(19)) == (chats(19), [])
    assert len(sft.split(chats(20))[1]) == 1
    assert sft.split(chats(19) * 2)[1] == [], "a copy is no further chat"
