"""Preference data in the formats of trl and of LLaMA-Factory, and what is wrong with it."""

import json
from pathlib import Path

import pytest

from nanollm.data.chat_files import read
from nanollm.data.preference_formats import PREFERENCES, Preference, preference
from nanollm.errors import DataError


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def turn(name: str, text: str) -> dict:
    return {"from": name, "value": text}


PROMPT = [user("a"), assistant("b"), user("c")]
TURNS = [turn("human", "a"), turn("gpt", "b"), turn("human", "c")]
SYSTEM = {"role": "system", "content": "s"}
# item → the prompt, the answers
PAIRS = {
    "texts": ({"prompt": "a", "chosen": "y", "rejected": "n"}, [user("a")]),
    "messages": ({"prompt": PROMPT, "chosen": [assistant("y")], "rejected": [assistant("n")]}, PROMPT),
    "messages and texts": ({"prompt": PROMPT, "chosen": "y", "rejected": "n"}, PROMPT),
    "a text and messages": ({"prompt": "a", "chosen": [assistant("y")], "rejected": [assistant("n")]}, [user("a")]),
    "messages without a prompt": ({"chosen": [*PROMPT, assistant("y")], "rejected": [*PROMPT, assistant("n")]}, PROMPT),
    "the prompt twice, as in UltraFeedback": (
        {"prompt": "a", "chosen": [user("a"), assistant("y")], "rejected": [user("a"), assistant("n")],
         "score_chosen": 7.5}, [user("a")]),
    "dialogues in a text, as in HH": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: y",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: n"}, PROMPT),
    "texts without a prompt": ({"chosen": "The sky is y", "rejected": "The sky is n"}, [user("The sky is")]),
    "alpaca": ({"instruction": "a", "input": "b", "chosen": "y", "rejected": "n"}, [user("a\nb")]),
    "alpaca, whole": ({"instruction": "c", "system": "s", "history": [["a", "b"]], "chosen": "y", "rejected": "n"},
                      [SYSTEM, *PROMPT]),
    "prompt and query": ({"prompt": "a", "query": "b", "chosen": "y", "rejected": "n"}, [user("a\nb")]),
    "sharegpt": ({"conversations": TURNS, "system": "s", "chosen": turn("gpt", "y"), "rejected": turn("gpt", "n")},
                 [SYSTEM, *PROMPT]),
    "sharegpt and texts": ({"conversations": TURNS, "chosen": "y", "rejected": "n"}, PROMPT),
    "openai": ({"messages": PROMPT, "chosen": assistant("y"), "rejected": assistant("n"), "tools": ""}, PROMPT),
}
ANSWERS = {"texts without a prompt": (" y", " n")}      # the space is of the answer: most tokens begin with one


@pytest.mark.parametrize("name", PAIRS)
def test_each_format_becomes_a_prompt_and_two_answers(name):
    item, prompt = PAIRS[name]
    found = preference(item, "here")
    assert found.prompt.messages == prompt and not found.tied
    for made, text in zip(found.answers, ANSWERS.get(name, ("y", "n")), strict=True):
        assert made.messages == [*prompt, assistant(text)] and made.answers == [len(prompt)]


LABELS = {
    "texts": ({"prompt": "a", "completion": "y", "label": False}, [user("a")]),
    "messages": ({"prompt": PROMPT, "completion": [assistant("y")], "label": False}, PROMPT),
    "alpaca": ({"instruction": "a", "input": "", "output": "y", "kto_tag": False}, [user("a")]),
    "alpaca with a history": ({"instruction": "c", "history": [["a", "b"]], "output": "y", "kto_tag": False}, PROMPT),
    "sharegpt": ({"conversations": [*TURNS, turn("gpt", "y")], "kto_tag": False}, PROMPT),
    "openai": ({"messages": [*PROMPT, assistant("y")], "label": False}, PROMPT),
}


@pytest.mark.parametrize("name", LABELS)
def test_each_format_becomes_an_answer_with_a_label(name):
    item, prompt = LABELS[name]
    found = preference(item, "here")
    assert (found.prompt.messages, found.label, len(found.answers)) == (prompt, False, 1)
    assert found.answers[0].messages == [*prompt, assistant("y")] and found.answers[0].answers == [len(prompt)]


def test_answers_of_several_turns_are_compared_whole():
    more = [assistant("x"), user("and?"), assistant("y")]
    found = preference({"prompt": [user("a")], "chosen": more, "rejected": [assistant("n")]}, "here")
    assert found.answers[0].answers == [1, 3] and found.answers[1].answers == [1]


PAIR = {"prompt": "a", "chosen": "y", "rejected": "n"}
WRONG = {
    "no object": ([1], "an object"),
    "no answers": ({"prompt": "a"}, "the keys chosen, rejected"),
    "one answer": ({"prompt": "a", "chosen": "y"}, "the keys chosen, rejected"),
    "a pair with a label": (PAIR | {"label": True}, "the keys chosen, rejected"),
    "a label in words": ({"prompt": "a", "completion": "y", "label": "good"}, "one label, true or false"),
    "two labels": ({"prompt": "a", "completion": "y", "label": True, "kto_tag": True}, "one label"),
    "an empty answer": (PAIR | {"rejected": " "}, "an answer that says something"),
    "an empty answer with a label": ({"prompt": "a", "completion": "", "label": True}, "an answer that says something"),
    "prompts that differ": ({"chosen": [user("a"), assistant("y")], "rejected": [user("b"), assistant("n")]},
                            "that begin with the same one"),
    "questions that differ": (
        {"chosen": [*PROMPT, assistant("y")], "rejected": [*PROMPT[:2], user("d"), assistant("n")]},
        "go on with an answer of the assistant"),
    "an answer that is missing": ({"chosen": [*PROMPT, assistant("y")], "rejected": PROMPT}, "an answer of the"),
    "texts that share nothing": ({"chosen": "a", "rejected": "b"}, "that begin with the same one"),
    "two kinds": ({"prompt": "a", "chosen": "y", "rejected": [assistant("n")]}, "both text or both messages"),
    "a number": (PAIR | {"chosen": 3}, "'chosen' to be text"),
    "a margin without an end": (PAIR | {"margin": float("inf")}, "'margin' to be a finite number"),
    "a margin in words": (PAIR | {"margin": "much"}, "'margin' to be a finite number"),
    "a key that is misspelt": ({"prompt": "a", "choosen": "y", "rejected": "n"}, "did you mean chosen[?]"),
    "an answer of the user": (PAIR | {"prompt": [user("a")], "chosen": [user("y")], "rejected": [user("n")]},
                              "an answer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    item, words = WRONG[name]
    with pytest.raises(DataError, match=f"^here: expected .*{words}"):
        preference(item, "here")


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """Sets as LLaMA-Factory's dataset_info.json describes them."""
    data = {"ranked": [{"q": "a", "more": "b", "good": "y", "bad": "n", "other": 1}],
            "talks": [{"conversations": TURNS, "chosen": turn("gpt", "y"), "rejected": turn("gpt", "n")}],
            "open": [{"messages": PROMPT, "chosen": assistant("y"), "rejected": assistant("n")}],
            "kto": [{"instruction": "a", "output": "y", "label": True}],
            "plain": [{"instruction": "a", "output": "b"}]}
    for name, items in data.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(items))
    both = {"chosen": "chosen", "rejected": "rejected"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "ranked": {"file_name": "ranked.json", "ranking": True,
                   "columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad"}},
        "talks": {"file_name": "talks.json", "ranking": True, "formatting": "sharegpt",
                  "columns": {"messages": "conversations", **both}},
        "open": {"file_name": "open.json", "ranking": True, "formatting": "openai",
                 "columns": {"messages": "messages", **both}},
        "kto": {"file_name": "kto.json",
                "columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}},
        "plain": {"file_name": "plain.json"}}))
    return tmp_path


def test_sets_of_llama_factory(described):
    def read_one(name: str) -> Preference:
        found, = read(name, described, kind=PREFERENCES)
        return found

    for name, prompt in {"ranked": [user("a\nb")], "talks": PROMPT, "open": PROMPT}.items():
        found = read_one(name)
        assert [made.messages for made in found.answers] == [[*prompt, assistant(text)] for text in ("y", "n")]
    assert read_one("kto").label is True and read_one("kto").prompt.messages == [user("a")]
    with pytest.raises(DataError, match="plain: expected 'ranking' with the columns chosen and rejected"):
        read_one("plain")


def test_columns_are_renamed_and_unknown_ones_are_said(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"q": "a", "good": "y", "bad": "n", "id": 3}) + "\n")
    said: list[str] = []
    found, = read(tmp_path / "x.jsonl", None, {"prompt": "q", "chosen": "good", "rejected": "bad"}, said.append,
                  PREFERENCES)
    assert found.prompt.messages == [user("a")] and found.where.endswith("x.jsonl, line 1")
    assert said == [f'{tmp_path / "x.jsonl"}: of no format, passed over: "id"']
