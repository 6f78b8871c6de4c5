"""Files and sets of chats: containers, columns, LLaMA-Factory's dataset_info.json; mixtures, own validation files,
long chats; the examples that are kept in the run folder (FINDINGS §4.7, §4.8).

Files are written by the libraries that define their formats: gzip, zstandard, csv, pyarrow.
"""

import bz2
import csv
import gzip
import json
import lzma
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nanollm.data import chat_store, sft
from nanollm.data.chat_files import resolve
from nanollm.data.chat_sets import Sets
from nanollm.data.encode import marks
from nanollm.data.sft import Chat, Chats, Writer
from nanollm.errors import DataError, InputError, RunError
from nanollm.text.tokenizer import Tokenizer, load
from nanollm.training import corpus as corpora
from nanollm.training import runs
from nanollm.training.corpus import open_chats
from nanollm.training.options import parse
from tests.test_chat import TEMPLATES, TOOLS
from tests.test_sft import assistant, example, lines, spelled, user
from tests.tok_folders import begin_with, byte_bpe, write
from tests.toys import OneRank

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder with a template. It has a token more than any chat uses."""
    folder = tmp_path_factory.mktemp("init")
    byte_bpe(("</s>", "<|im_start|>", "<|im_end|>", "[PAD]")).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    return write(folder, tokenizer_config=config)


def opened(init: Path, out: Path, *arguments: object):
    options = parse("", ["--init", str(init), "--out", str(out), "--context", "64", *map(str, arguments)])
    return open_chats(options, OneRank())


def talks(count: int, words: str = "word ") -> list[dict]:
    return [{"messages": [user(f"question {i}"), assistant(words + str(i))]} for i in range(count)]


# ---- files

def said(path: Path) -> list[str]:
    return [chat.messages[-1]["content"] for chat in sft.read(path)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.NDJSON", "x.json", "x.csv", "x.tsv", "x.parquet", "x.jsonl.gz",
                                  "x.json.zst", "x.jsonl.bz2", "x.ndjson.xz"])
def test_5_each_container_holds_the_same(tmp_path: Path, name: str) -> None:
    path, rows = tmp_path / name, "".join(json.dumps(item) + "\n" for item in PAIRS).encode()
    if name in ("x.csv", "x.tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], dialect="excel-tab" if "t" in name else "excel")
            writer.writeheader()
            writer.writerows(PAIRS)
    elif name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    else:
        data = json.dumps(PAIRS).encode() if ".json" in name and "jsonl" not in name else rows
        packers = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        path.write_bytes(packers.get(path.suffix, bytes)(data))
    assert said(path) == ["answer 0", "answer 1", "answer 2"]
    assert sft.read(path)[1].where.startswith(f"{path}, ")


@pytest.mark.parametrize("encoding, note", [("utf-16", None), ("cp1252", "not UTF-8, read as cp1252")])
def test_chats_are_read_in_the_encodings_that_text_is(tmp_path: Path, encoding: str, note: str | None) -> None:
    notes: list[str] = []
    path = tmp_path / "x.csv"
    path.write_text("prompt;completion\nwo?;im Café à gauche\n", encoding=encoding)
    chat, = sft.read(path, say=notes.append)
    assert chat.messages == [user("wo?"), assistant("im Café à gauche")]
    assert [line.startswith(f"{path}: {note}") for line in notes] == [True] * bool(note)


def test_dates_in_parquet_are_text(tmp_path: Path) -> None:
    item = {"messages": [user("a") | {"timestamp": datetime(2026, 1, 2)}, assistant("b")]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([item]), tmp_path / "x.parquet")
    assert sft.read(tmp_path / "x.parquet")[0].messages[0]["timestamp"] == "2026-01-02 00:00:00"


@pytest.mark.slow
def test_chats_of_the_hub_are_streamed(tmp_path: Path) -> None:
    """As test_documents has it of text: a local folder stands for a data set of the hub."""
    pytest.importorskip("datasets", reason="needs the extra data")
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl", *PAIRS)
    lines(tmp_path / "set" / "validation.jsonl", {"prompt": "a", "completion": "other"})
    assert said(Path(f"hf:{tmp_path / 'set'}")) == ["answer 0", "answer 1", "answer 2"]
    assert said(Path(f"hf:{tmp_path / 'set'}::validation")) == ["other"]
    (tmp_path / "dataset_info.json").write_text(json.dumps({"there": {
        "hf_hub_url": str(tmp_path / "set"), "split": "validation", "columns": {"prompt": "prompt",
                                                                                "response": "completion"}}}))
    chat, = sft.read("there", tmp_path)
    assert chat.messages == [user("a"), assistant("other")]
    assert chat.where == f"hf:{tmp_path / 'set'}::validation, row 1"
    with pytest.raises(DataError, match="hf:.*none: cannot be read"):
        said(Path(f"hf:{tmp_path / 'set'}::none"))


def test_5_messages_in_parquet(tmp_path: Path) -> None:
    """A struct has all fields of its column: those that are null are not there."""
    items = [{"messages": [user("a"), assistant("b") | {"weight": 1}], "id": 7}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "x.parquet")
    assert sft.read(tmp_path / "x.parquet")[0].messages == [user("a"), assistant("b")]


def test_a_folder_without_lines_is_read_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(PAIRS[:2]))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert said(tmp_path) == ["answer 0", "answer 1"]


# ---- columns and dataset_info.json

@pytest.mark.parametrize("columns, messages", [
    ({"prompt": "question", "response": "answer"}, [user("q"), assistant("a")]),
    ({"instruction": "question", "output": "answer", "system": "who"},
     [{"role": "system", "content": "s"}, user("q"), assistant("a")]),
    ({"prompt": "question", "completion": "answer"}, [user("q"), assistant("a")]),
    ({"messages": "talk"}, [user("t"), assistant("u")]),
])
def test_5_columns_are_mapped(tmp_path: Path, columns, messages) -> None:
    item = {"question": "q", "answer": "a", "who": "s", "talk": [user("t"), assistant("u")]}
    chat, = sft.read(lines(tmp_path / "x.jsonl", item), columns=columns)
    assert chat.messages == messages


@pytest.mark.parametrize("columns, words", [
    ({"question": "prompt"}, "--columns question=prompt: no format has question; expected one of"),
    ({"prompt": "q", "response": "a"}, "line 1: expected the columns that --columns names; a is not one"),
])
def test_5_columns_that_do_not_exist_are_named(tmp_path: Path, columns, words) -> None:
    with pytest.raises(DataError, match=words):
        sft.read(lines(tmp_path / "x.jsonl", {"q": "a", "b": "c"}), columns=columns)


INFO = {
    "plain": {"file_name": "plain.json"},
    "named": {"file_name": "named.json", "columns": {"prompt": "q", "query": "more", "response": "a", "history": "h"}},
    "shared": {"file_name": "shared.json", "formatting": "sharegpt", "columns": {
        "messages": "talk", "system": "sys", "tools": "tools"}, "tags": {
        "role_tag": "who", "content_tag": "text", "user_tag": "U", "assistant_tag": "A", "function_tag": "F",
        "observation_tag": "O"}},
    "open": {"file_name": "open.jsonl", "formatting": "openai"},
    "ranked": {"file_name": "x.json", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
    "kto": {"file_name": "x.json", "columns": {"prompt": "p", "response": "r", "kto_tag": "k"}},
    "hub": {"ms_hub_url": "a/b"},
    "pictures": {"file_name": "x.json", "columns": {"prompt": "p", "response": "r", "images": "i"}},
}


@pytest.fixture
def described(tmp_path: Path) -> Path:
    call = json.dumps({"name": "weather", "arguments": {"city": "Bern"}})
    for name, items in {
        "plain.json": [{"instruction": "a", "input": "b", "output": "c", "system": "s"}],
        "named.json": [{"q": "a", "more": "b", "a": "c", "h": [["x", "y"]], "instruction": "no", "system": "no"}],
        "shared.json": [{"talk": [{"who": "U", "text": "a"}, {"who": "F", "text": call}, {"who": "O", "text": "3"},
                                  {"who": "A", "text": "c"}], "sys": "s", "tools": json.dumps([TOOLS[0]["function"]])}],
        "dataset_info.json": INFO,
    }.items():
        (tmp_path / name).write_text(json.dumps(items))
    lines(tmp_path / "open.jsonl", {"messages": [user("a"), assistant("b")]})
    return tmp_path


SYSTEM = {"role": "system", "content": "s"}


def test_5_llama_factorys_sets_are_read(described: Path) -> None:
    """data/README.md of LLaMA-Factory: a set with columns has these and no others."""
    def read(name: str) -> Chat:
        by_folder, = sft.read(name, described)
        by_file, = sft.read(f"{described}/dataset_info.json:{name}")
        assert by_folder == by_file
        return by_folder

    assert read("plain").messages == [user("a\nb"), assistant("c")], "no system column is named, so it is not read"
    assert read("named").messages == [user("x"), assistant("y"), user("a\nb"), assistant("c")]
    assert read("open").messages == [user("a"), assistant("b")]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    assert read("shared").messages == [SYSTEM, user("a"), {"role": "assistant", "content": "", "tool_calls": [call]},
                                       {"role": "tool", "content": "3"}, assistant("c")]
    assert read("shared").tools == TOOLS and read("shared").answers == [2, 4]


@pytest.mark.parametrize("name, words", [
    ("ranked", "ranked: preference data, which --preference and --reward read"), ("kto", "preference data"),
    ("hub", "a 'file_name' or a 'hf_hub_url', found"), ("pictures", 'no more, found \\["images"\\]'),
    ("nothing", "no set 'nothing', and no such file or folder; expected one of plain, named"),
])
def test_5_sets_that_are_not_for_this_are_named(described: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        sft.read(name, described)


def test_5_a_dataset_info_without_a_name_says_what_it_holds(described: Path) -> None:
    """It was read as chats, and lacked their keys."""
    with pytest.raises(DataError, match="name one of them, as .*dataset_info.json:plain; there are plain, named"):
        sft.read(described / "dataset_info.json")


def test_5_a_set_of_the_hub_is_named_as_a_person_would(tmp_path: Path) -> None:
    """Errors spoke of hf:owner/name:::"""
    sets = {"a": {"hf_hub_url": "o/n"}, "b": {"hf_hub_url": "o/n", "split": "x"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(sets))
    assert resolve("a", tmp_path)[0] == "hf:o/n" and resolve("b", tmp_path)[0] == "hf:o/n::x"


# ---- several sets

def test_6_sets_are_mixed_by_weight_and_measured_together(init: Path, tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl", *talks(40)), lines(tmp_path / "b.jsonl", *talks(30, "other "))
    corpus = opened(init, tmp_path / "run", "--chat", a, b, "--mix", 0.75, 0.25)
    assert corpus.stream.counts == [768, 256] and [source.name for source in corpus.stream.sources] == [str(a), str(b)]
    assert corpus.held_out is not None and len(corpus.held_out.examples) == 2 + 2       # round(5 %) of 40 and of 30
    assert sum("held out" in note for note in corpus.notes) == 2
    rows = corpus.stream.batch(0, 1024)
    assert rows.positions is not None and (rows.positions >= 0).any(1).all()


def test_6_chats_are_mixed_with_text(init: Path, tmp_path: Path) -> None:
    """One stream with rows of both kinds: padding is nowhere real, text is everywhere."""
    from nanollm.data import prepare
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} quick brown foxes\n" * 30)
    prepare.prepare(prepare.read(tmp_path / "text"), tmp_path / "shards", vocab=None, tokenizer=init, context=64)
    chats = lines(tmp_path / "a.jsonl", *talks(40))
    options = parse("", ["--init", str(init), "--chat", str(chats), "--data", str(tmp_path / "shards"), "--mix", "3",
                         "1", "--context", "64", "--out", str(tmp_path / "run")])
    corpus = corpora.open_corpus(options, OneRank(), 0)
    assert corpus.stream.counts == [768, 256] and corpus.chat and corpus.held_out.name == f"{chats}, held out"
    batch = corpus.stream.batch(0, 1024)
    where = [corpus.stream.place(row)[0] for row in range(1024)]
    padded = (~batch.real).any(1)
    assert padded[[i for i, source in enumerate(where) if source == 0]].any()
    assert not padded[[i for i, source in enumerate(where) if source == 1]].any()
    assert options.title.endswith(" on a.jsonl, shards")


@pytest.mark.parametrize("arguments, words", [
    (["--chat", "a", "b", "--mix", "1"], "--mix has 1 weights for 2 --chat and 0 --data"),
    (["--data", "a", "--long", "drop"], "--long goes with --chat"),
    (["--data", "a", "--columns", "prompt=q"], "--columns goes with --chat"),
])
def test_6_options_that_do_not_go_together(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse("", ["--init", "x", *arguments])


def test_6_a_validation_file_of_its_own(init: Path, tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl", *talks(40)), lines(tmp_path / "b.jsonl", *talks(3, "other "))
    corpus = opened(init, tmp_path / "run", "--chat", a, "--held-out", b)
    assert corpus.held_out is not None and corpus.held_out.name == f"{b}, held out"
    assert len(corpus.held_out.examples) == 3 and len(corpus.stream.sources[0].examples) == 40


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """(text to train on, a folder to measure on, its documents)."""
    (tmp_path / "train.txt").write_text("".join(f"{i} quick brown foxes\n" for i in range(400)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("jumps over<|endoftext|>the lazy é dog. " + "and again " * 30)
    lines(tmp_path / "other" / "b.jsonl", {"text": ""}, {"text": "a record"})
    return (tmp_path / "train.txt", tmp_path / "other",
            ["jumps over", "the lazy é dog. " + "and again " * 30, "a record"])


def test_6_chats_are_mixed_with_text_that_is_new(init: Path, texts, tmp_path: Path) -> None:
    """Both are kept in the run folder; with --held-out all of the text is trained on."""
    chats, held = lines(tmp_path / "a.jsonl", *talks(40)), lines(tmp_path / "b.jsonl", *talks(3, "other "))
    arguments = ("--chat", chats, "--held-out", held, "--mix", "1", "1", "--context", "64")
    corpus = opened_text(init, tmp_path / "run", texts[0], *arguments).keep(OneRank())
    assert corpus.held_out.name == f"{held}, held out" and corpus.stream.counts == [512, 512]
    again = opened_text(init, tmp_path / "run", texts[0], *arguments)
    assert again.draft is None and again.stream.fingerprint == corpus.stream.fingerprint
    from nanollm.data import prepare
    assert prepare.facts(tmp_path / "run" / "data").train_bytes == len(texts[0].read_bytes())


def opened_text(init: Path, out: Path, data: Path, *arguments: object):
    return corpora.open_corpus(parse("", ["--init", str(init), "--data", str(data), "--context", "16", "--out",
                                          str(out), *map(str, arguments)]), OneRank(), 0)


def stream(source) -> list[int]:
    """All targets, in order."""
    return [int(target) for row in range(source.rows) for target in source.row(row)[1] if target >= 0]


def test_6_text_is_measured_on_text_of_its_own(init: Path, texts, tmp_path: Path) -> None:
    """All of --data is trained on, each token of the other is predicted once, and the end of each document."""
    train, other, documents = texts
    corpus, ours = opened_text(init, tmp_path / "run", train, "--held-out", other), load(init)
    ids = [id for text in documents for id in [ours.eos_id, *ours.encode(text, bos=False)]] + [ours.eos_id]
    assert stream(corpus.held_out) == ids[1:]
    assert corpus.facts.train_bytes == len(train.read_bytes()) and corpus.facts.held_out_documents == 3
    size = len("".join(documents).encode())
    assert corpus.in_bytes(2.0) == {"held_out_bits_per_byte": pytest.approx(2.0 / np.log(2) * (len(ids) - 1) / size)}
    plain = opened_text(init, tmp_path / "plain", train)
    assert plain.facts.train_bytes < corpus.facts.train_bytes


@pytest.mark.parametrize("prefix", [False, True], ids=["eos", "bos and eos"])
def test_6_shards_are_measured_on_the_same_rows(init: Path, texts, tmp_path: Path, prefix: bool) -> None:
    from nanollm.data import prepare
    train, other, _ = texts
    if prefix:
        model = tmp_path / "model"
        shutil.copytree(init, model)
        backend = byte_bpe(("</s>", "<|im_start|>", "<|im_end|>", "[PAD]"))
        begin_with(backend, "<|im_start|>")
        backend.save(str(model / "tokenizer.json"))
        init = model
    assert (marks(load(init)).after != ()) == prefix
    new = opened_text(init, tmp_path / "run", train, "--held-out", other)
    prepare.prepare(prepare.read(train), tmp_path / "shards", vocab=None, tokenizer=init, context=16)
    there = opened_text(init, tmp_path / "again", tmp_path / "shards", "--held-out", other)
    assert new.held_out.rows == there.held_out.rows > 2
    for row in range(new.held_out.rows):
        assert all((a == b).all() for a, b in zip(new.held_out.row(row), there.held_out.row(row), strict=True))
    assert there.in_bytes(1.0) == new.in_bytes(1.0) and there.facts is None
    assert there.notes[-1] == f"measured on {other}, held out"


def test_6_text_is_measured_on_shards(init: Path, texts, tmp_path: Path) -> None:
    from nanollm.data import prepare
    train, _, _ = texts
    prepare.prepare(prepare.read(train), tmp_path / "shards", vocab=None, tokenizer=init, context=16)
    corpus = opened_text(init, tmp_path / "run", train, "--held-out", tmp_path / "shards")
    assert corpus.held_out.name == f"{tmp_path / 'shards'}, held out" and corpus.in_bytes(1.0) == {}
    assert prepare.facts(corpus.draft).held_out_tokens == 0 and not [*corpus.draft.glob("held_out*")]
    kept = corpus.keep(OneRank())
    assert kept.held_out.shards[0].path.parent == tmp_path / "shards"
    assert kept.stream.sources[0].shards[0].path.parent == tmp_path / "run" / "data"
    prepare.prepare(prepare.read(train), tmp_path / "others", vocab=300, tokenizer=None, context=16)
    with pytest.raises(DataError, match="others, held out: made with another tokenizer"):
        opened_text(init, tmp_path / "run", train, "--held-out", tmp_path / "others")


def test_6_other_text_to_measure_on_is_other_data(init: Path, texts, tmp_path: Path) -> None:
    """Made once; and again where the text to measure on is another, or there is none."""
    train, other, _ = texts
    out = tmp_path / "run"
    opened_text(init, out, train, "--held-out", other).keep(OneRank())
    assert opened_text(init, out, train, "--held-out", other).draft is None
    lines(other / "b.jsonl", {"text": "0 quick brown foxes"}, {"text": train.read_text()})
    changed = opened_text(init, out, train, "--held-out", other)
    assert changed.draft is not None
    assert "1 document trained on and held out both" in changed.notes
    assert opened_text(init, out, train).draft is not None


def test_a_run_with_one_set_was_recorded_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"options": {"chat": "a.jsonl"}}))
    runs.compare(tmp_path, {"options": {"chat": [Path("a.jsonl")], "long": None, "columns": None}})
    with pytest.raises(RunError, match="--chat"):
        runs.compare(tmp_path, {"options": {"chat": [Path("a.jsonl"), Path("b.jsonl")]}})


# ---- what fits no row

def test_4_7_24_chats_of_which_the_one_held_out_is_too_long(init: Path, tmp_path: Path) -> None:
    items = talks(24)
    held, = sft.split(sft.read(lines(tmp_path / "a.jsonl", *items)))[1]
    items[int(held.where.split()[-1]) - 1]["messages"][1]["content"] = "word " * 500
    lines(tmp_path / "a.jsonl", *items)
    order = {chat.where for chat in sft.split(sft.read(tmp_path / "a.jsonl"))[1]}
    corpus = opened(init, tmp_path / "run", "--chat", tmp_path / "a.jsonl")
    assert corpus.held_out is not None and corpus.held_out.dropped == 0 and len(corpus.held_out.examples) == 1
    assert order and any("1 examples are longer" in note for note in corpus.notes)


LONG = [example(*range(1, 13), answer="..xx..xx..xx"), example(1, 2, 3, answer="..x"),
        example(*range(40), answer="." + "x" * 39)]


def test_7_long_chats_by_choice() -> None:
    """By hand, T = 8: of the first, the turns to token 8 fit; of the third no answer does."""
    dropped, cut = Chats("x", LONG, 8, 0), Chats("x", LONG, 8, 0, "truncate")
    assert (dropped.dropped, dropped.cut, len(dropped.examples)) == (2, 0, 1) and dropped.lost == pytest.approx(45 / 46)
    assert (cut.dropped, cut.cut, len(cut.examples)) == (1, 1, 2) and cut.lost == pytest.approx(41 / 46)
    assert cut.examples[0].targets.tolist() == [-100, 3, 4, -100, -100, 7, 8]
    assert cut.examples[0].tokens.tolist() == [*range(1, 8)]
    assert dropped.note == ("2 examples are longer than --context 8 and are left out: 97.8% of the tokens to learn; "
                            "--long truncate keeps their first turns")
    assert "1 examples are longer than --context 8 and keep their first turns, 1 more are left out: 89.1%" in cut.note
    with pytest.raises(DataError, match="x: an example of 40 tokens is longer than --context 8.*--long drop"):
        Chats("x", LONG, 8, 0, "error")
    assert Chats("x", LONG, 40, 0, "error").note is None


def test_7_the_note_reaches_the_user(init: Path, tmp_path: Path) -> None:
    items = [*talks(3), {"messages": [user("a"), assistant("b"), user("c"), assistant("word " * 200)]}]
    items[0]["messages"][0]["id"] = "7"
    items[0] |= {"source": "here", "to\x1bpic": None}
    items[1] |= {"source": "there", "to\x1bpic": 3}
    path = lines(tmp_path / "a.jsonl", *items, {"messages": [user("a"), assistant("")]})
    notes = "\n".join(opened(init, tmp_path / "run", "--chat", path, "--long", "truncate").notes)
    assert "1 examples are longer than --context 64 and keep their first turns" in notes
    assert "id not written by the template, 1 message\n" in notes
    assert f"{path}: of no format, passed over: \"source\", \"to\\u001bpic\"\n" in notes
    assert "1 answer: empty, not learnt" in notes and "1 chat: passed over, with no answer to learn" in notes


# ---- an added token that nobody uses

def test_4_7_a_token_that_no_chat_uses_is_no_error(init: Path, tmp_path: Path) -> None:
    corpus = opened(init, tmp_path / "run", "--chat", lines(tmp_path / "a.jsonl", *talks(3)))
    assert load(init).special_tokens["[PAD]"] == load(init).vocab_size - 1
    assert corpus.vocab == load(init).vocab_size - 1, "the model needs no row for it"


# ---- kept in the run folder

def test_4_8_examples_are_written_once(init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "a.jsonl", *talks(30))
    first = opened(init, tmp_path / "run", "--chat", path)
    folder, = (tmp_path / "run" / "chats").iterdir()
    monkeypatch.setattr(Writer, "examples", lambda *_: pytest.fail("they are there"))
    again = opened(init, tmp_path / "run", "--chat", path)
    assert again.stream.fingerprint == first.stream.fingerprint and again.notes == first.notes
    assert [*(tmp_path / "run" / "chats").iterdir()] == [folder]


def test_4_8_examples_of_other_chats_are_removed_once_a_run_has_begun(init: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *talks(3))
    opened(init, tmp_path / "run", "--chat", path).keep(OneRank())
    lines(path, *talks(4))
    (tmp_path / "run" / "chats" / ".killed").mkdir()
    corpus = opened(init, tmp_path / "run", "--chat", path)
    assert len([*(tmp_path / "run" / "chats").iterdir()]) == 3, "the checks come first"
    kept = corpus.keep(OneRank())
    assert [*(tmp_path / "run" / "chats").iterdir()] == [corpus.examples]
    assert (kept.stream.sources[0].row(0)[0] == corpus.stream.sources[0].row(0)[0]).all()


def test_4_8_other_chats_another_template_or_another_end_are_other_examples(init: Path, tmp_path: Path) -> None:
    chats = [Chat("x", [user("a"), assistant("b")])]
    ours, folders = load(init), set()

    def where(tokenizer: Tokenizer, chats: list[Chat]) -> None:
        folders.add(chat_store.folder_for(tmp_path, tokenizer, chats))

    where(ours, chats)
    where(ours, [Chat("elsewhere", chats[0].messages)])
    assert len(folders) == 1
    where(ours, [Chat("x", chats[0].messages, unlearnt=(1,))])
    where(ours, [Chat("x", chats[0].messages, TOOLS)])
    ours.stop_ids = (1,)
    where(ours, chats)
    ours.chat_template = TEMPLATES["llama 3"]
    where(ours, chats)
    assert len(folders) == 5


def test_4_8_many_processes_write_what_one_writes(init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load(init)
    dated = {"messages": [user("a") | {"timestamp": 7}, assistant("b")]}
    chats = sft.read(lines(tmp_path / "a.jsonl", *talks(18), dated, dated))
    monkeypatch.setattr(chat_store, "MANY", 10)
    monkeypatch.setattr(chat_store, "CHUNK", 3)
    chat_store.build(tmp_path / "many", ours, chats)
    monkeypatch.setattr(chat_store, "MANY", 10**9)
    chat_store.build(tmp_path / "one", ours, chats)
    for name in ("tokens", "targets", "edges", "counts"):
        assert (np.load(tmp_path / "many" / f"{name}.npy") == np.load(tmp_path / "one" / f"{name}.npy")).all()
    found, said = chat_store.load(tmp_path / "many")
    assert said == chat_store.load(tmp_path / "one")[1] == {"timestamp not written by the template": 2}
    assert [spelled(ours, example) for example, in found] == [
        spelled(ours, example) for chat in chats for example in sft.examples(ours, chat)]


def test_4_8_an_error_of_a_process_leaves_nothing(init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_store, "MANY", 2)
    thinks = {"messages": [user("a"), assistant("b") | {"thinking": "c"}]}
    chats = sft.read(lines(tmp_path / "a.jsonl", *talks(4), thinks))
    with pytest.raises(DataError, match="line 5, message 2.* does not write thinking"):
        chat_store.build(tmp_path / "data" / "x", load(init), chats)
    assert not (tmp_path / "data").exists() or not [*(tmp_path / "data").iterdir()]


def test_a_store_that_is_damaged_is_named(init: Path, tmp_path: Path) -> None:
    ours, chats = load(init), sft.read(lines(tmp_path / "a.jsonl", *talks(2)))
    chat_store.build(tmp_path / "x", ours, chats)
    whole = (tmp_path / "x" / "tokens.npy").read_bytes()
    for damaged in (b"", whole[:-8], whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:]):
        (tmp_path / "x" / "tokens.npy").write_bytes(damaged)
        with pytest.raises(DataError, match="x: cannot be read.*remove it"):
            Sets([tmp_path / "a.jsonl"], None).rows(tmp_path / "x", ours, 64, "drop")
