"""The data folder and its command: nothing is lost, nothing is on both sides, and what fails leaves nothing."""

import gzip
import hashlib
import json
import runpy
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import nanollm.text.tokenizer
from nanollm.data import bpe, shards
from nanollm.data import prepare as text
from nanollm.data.documents import END, Part
from nanollm.data.split import Index, plan, sides
from nanollm.data.stream import open_folder
from nanollm.errors import DataError
from nanollm.text import render as rendering
from nanollm.text.chat import Conversation


@pytest.fixture(scope="module")
def docs() -> list[Part]:
    rng = np.random.default_rng(0)
    words = ["def ", "return ", "self", "\n    ", "x = ", "é", "(", ")", "\t", "while True:", END]
    return [Part(f"m{i:02}.py", "".join(rng.choice(words, rng.integers(20, 60))) + f"# {i}") for i in range(60)]


@pytest.fixture(scope="module")
def made(docs, tmp_path_factory) -> Path:
    """A data folder, in shards of 500 tokens."""
    folder = tmp_path_factory.mktemp("made") / "data"
    text.prepare(docs, folder, vocab=300, tokenizer=None, context=16, shard_tokens=500)
    return folder


def parted(docs: list[Part]) -> tuple[list[str], list[str]]:
    """The texts of both sides."""
    found, begun = ([], []), ["", ""]
    for side, part in sides(docs, plan(Index.of(docs))):
        begun[side] += part.text
        if part.ends:
            found[side].append(begun[side])
            begun[side] = ""
    return found


def stream(folder: Path, split: str) -> list[int]:
    return np.concatenate([shards.Shard(path).tokens for path in sorted(folder.glob(f"{split}-*.bin"))]).tolist()


def state(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# ---- the folder

def test_a_stream_is_written_in_equal_shards_however_it_comes(tmp_path):
    for number, cuts in enumerate([(0, 13), (0, 2, 3, 10, 10, 13), (0, 4, 8, 12, 13)]):
        (folder := tmp_path / str(number)).mkdir()
        writing = shards.Writing(folder, "train", 4, 20, 0, "ab" * 32)
        for a, b in pairwise(cuts):
            writing.add(np.arange(a, b))
        writing.close()
        found = [shards.Shard(path).tokens.tolist() for path in sorted(folder.iterdir())]
        assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
        assert writing.counts.tolist() == [1] * 13 + [0] * 7


def test_streams_hold_every_byte_and_a_mark_before_each_document_whatever_the_shards(made, docs):
    """Texts that spell the mark are among them, and are text."""
    tokenizer = nanollm.text.tokenizer.load(made)
    assert len(list(made.glob("train-*.bin"))) > 2 and any(END in d.text for d in docs)
    for split, part in zip(("train", "held_out"), parted(docs), strict=True):
        sizes = [shards.Shard(path).count for path in sorted(made.glob(f"{split}-*.bin"))]
        assert set(sizes[:-1]) <= {500} and 0 < sizes[-1] <= 500
        ids = np.array(stream(made, split))
        assert ids[0] == ids[-1] == tokenizer.eos_id
        pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id)[1:])[:-1]
        assert [tokenizer.decode(piece[1:].tolist()) for piece in pieces] == part


def test_shards_carry_the_mark_and_the_digest_of_the_tokenizer(made):
    train, held_out = open_folder(made, 16)
    expected = hashlib.sha256((made / "tokenizer.json").read_bytes()).hexdigest()
    assert (
        train.digest == held_out.digest == expected == json.loads((made / "meta.json").read_text())["tokenizer_sha256"]
    )
    assert train.end == nanollm.text.tokenizer.load(made).eos_id
    train.verify(300)
    held_out.verify(300)


def test_facts_by_hand(made, docs):
    kept, held = parted(docs)
    facts, train, held_out = text.facts(made), stream(made, "train"), stream(made, "held_out")
    counts = {token: 1 + train.count(token) for token in range(300)}
    nats = [-np.log(counts[token] / sum(counts.values())) for token in held_out[1:]]
    assert facts.unigram_loss == pytest.approx(np.mean(nats)) and facts.held_out_targets == len(nats)
    assert (facts.train_documents, facts.held_out_documents) == (len(kept), len(held))
    assert (facts.train_tokens, facts.held_out_tokens) == (len(train), len(held_out))
    joined = "".join(held).encode()
    assert facts.held_out_bytes == len(joined) and facts.train_bytes == len("".join(kept).encode())
    assert facts.gzip_bits_per_byte == 8 * len(gzip.compress(joined, 9)) / len(joined)
    assert text.facts(made.parent) is None


def test_a_folder_made_from_the_same_text_is_left_alone_and_made_anew_from_other_text(docs, tmp_path):
    folder = tmp_path / "data"
    text.prepare(docs, folder, vocab=300, tokenizer=None, context=16, shard_tokens=500)
    before, first = state(folder), text.facts(folder)
    text.prepare(docs, folder, vocab=300, tokenizer=None, context=16, shard_tokens=500)
    assert state(folder) == before
    text.prepare(docs[:20], folder, vocab=300, tokenizer=None, context=16, shard_tokens=500)
    assert text.facts(folder) != first and len(list(folder.glob("train-*"))) < len(
        [n for n in before if n.startswith("train-")]
    )
    text.prepare(docs, folder, vocab=290, tokenizer=None, context=16)
    assert json.loads((folder / "meta.json").read_text())["vocab"] == 290


@pytest.mark.parametrize("name", ["train-00001.bin", "tokenizer.json", "held_out-00000.bin"])
@pytest.mark.parametrize("lost", [True, False], ids=["lost", "damaged"])
def test_a_folder_with_a_file_lost_or_damaged_is_made_anew(docs, made, tmp_path, name, lost):
    folder = tmp_path / "data"
    shutil.copytree(made, folder)
    (folder / name).write_bytes((made / name).read_bytes()[:-4] + b"?]}\n")
    if lost:
        (folder / name).unlink()
    if lost and name.endswith(".bin"):
        with pytest.raises(DataError, match="python -m nanollm.data makes them"):
            open_folder(folder, 16)
    text.prepare(docs, folder, vocab=300, tokenizer=None, context=16, shard_tokens=500)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in made.iterdir()
    }


def test_the_tokenizer_of_another_folder_makes_the_same_streams(made, docs, tmp_path):
    """Files go along unchanged; the mark is its end of text, and text is encoded as text, without BOS."""
    text.prepare(docs, tmp_path / "data", vocab=None, tokenizer=made, context=16)
    for split in ("train", "held_out"):
        assert stream(tmp_path / "data", split) == stream(made, split)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "data" / name).read_bytes() == (made / name).read_bytes()
    assert text.facts(tmp_path / "data") == text.facts(made)


def test_a_tokenizer_without_an_end_marks_documents_with_its_beginning_or_is_refused(made, docs, tmp_path):
    for name, config in (("bos", {"bos_token": END}), ("none", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    text.prepare(docs, tmp_path / "data", vocab=None, tokenizer=tmp_path / "bos", context=16)
    assert stream(tmp_path / "data", "train") == stream(made, "train")
    with pytest.raises(DataError, match="none: found no eos_token"):
        text.prepare(docs, tmp_path / "other", vocab=None, tokenizer=tmp_path / "none", context=16)
    assert not (tmp_path / "other").exists()


def test_too_little_text_is_an_error_and_leaves_nothing(tmp_path):
    for words in ("one line", "two words\n" * 20):
        with pytest.raises(DataError, match="too little|do not fill"):
            text.prepare([Part("a", words)], tmp_path / "new", vocab=300, tokenizer=None, context=512)
    assert not (tmp_path / "new").exists()


def test_text_fills_a_context_if_it_has_one_token_more(made, docs, tmp_path):
    tokens = text.facts(made).train_tokens
    for folder in (tmp_path / "new", made):                                     # the second is there already
        with pytest.raises(DataError, match=f"{tokens} tokens.* do not fill one context of {tokens}"):
            text.prepare(docs, folder, vocab=300, tokenizer=None, context=tokens)
    text.prepare(docs, tmp_path / "new", vocab=300, tokenizer=None, context=tokens - 1)
    assert open_folder(tmp_path / "new", tokens - 1)[0].rows == 1


@pytest.mark.parametrize("when", ["train-00001.bin", "tokenizer.json", "meta.json"])
def test_a_disk_that_fills_up_leaves_nothing_half_made(docs, tmp_path, monkeypatch, when):
    def refuse(path: Path, *parts) -> None:
        if path.name == when and (when != "meta.json" or len(parts[0]) > 20):
            raise DataError(f"{path}: cannot be written: No space left on device")
        shards_write(path, *parts)
    shards_write = shards.write_file
    monkeypatch.setattr(shards, "write_file", refuse)
    monkeypatch.setattr(text, "write_file", refuse)
    monkeypatch.setattr(bpe, "write_file", refuse)
    with pytest.raises(DataError, match="No space left"):
        text.prepare(docs, tmp_path / "data", vocab=300, tokenizer=None, context=16, shard_tokens=500)
    assert not (tmp_path / "data").exists()


def test_a_folder_whose_making_was_killed_is_refused_and_made_anew(docs, made, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "meta.json").write_text('{"format": 1}\n')
    (folder / "train-00000.bin").write_bytes((made / "train-00000.bin").read_bytes())
    with pytest.raises(DataError, match="python -m nanollm.data makes them"):
        open_folder(folder, 16)
    text.prepare(docs, folder, vocab=300, tokenizer=None, context=16, shard_tokens=500)
    assert stream(folder, "train") == stream(made, "train")


def test_a_folder_of_something_else_is_never_touched(docs, made, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("years of work")
    (tmp_path / "file").write_text("of mine")
    for folder in (tmp_path / "model", tmp_path / "file"):
        with pytest.raises(DataError, match="name another folder"):
            text.prepare(docs, folder, vocab=300, tokenizer=None, context=16)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "years of work" and len(
        list((tmp_path / "model").iterdir())
    ) == 1


@pytest.mark.parametrize("options, words", [
    (dict(vocab=None, tokenizer=None), "one of the two"),
    (dict(vocab=300, tokenizer=Path("x")), "one of the two"),
    (dict(vocab=256, tokenizer=None), "257"),
    (dict(vocab=300, tokenizer=None, shard_tokens=16), "tokens a shard"),
    (dict(vocab=300, tokenizer=None, shard_tokens=2**31), "llm.c's limit"),
])
def test_impossible_requests_are_refused_before_any_work(docs, tmp_path, options, words):
    with pytest.raises(DataError, match=words):
        text.prepare(docs, tmp_path / "new", context=16, **options)
    assert not (tmp_path / "new").exists()


# ---- the tokenizer's files

def test_tokenizer_files_load_in_both_libraries(made):
    transformers = pytest.importorskip("transformers")
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == 0
    ours, theirs = nanollm.text.tokenizer.load(made), transformers.AutoTokenizer.from_pretrained(made)
    words = "def f(x):\n\treturn  é x\n"
    assert ours.encode(words) == theirs(words)["input_ids"] and ours.decode(ours.encode(words)) == words
    assert ours.eos_id == ours.bos_id == 0 and ours.stop_ids == (0,) and ours.doctor() == []


CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is  x?"},
    {"role": "assistant", "content": "x = 1\n"}, {"role": "user", "content": "And é?\n"},
    {"role": "assistant", "content": " the same: (é)"},
]


def test_a_chat_is_plain_words_and_transformers_writes_the_same(made):
    ours = rendering.render(bpe.CHAT, CHAT, add_generation_prompt=False, bos_token="<", eos_token=">")
    assert ours == "<Be brief.\nUser: What is  x?\nAssistant: x = 1\n>User: And é?\n\nAssistant:  the same: (é)>"
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(made), nanollm.text.tokenizer.load(made)
    for messages, prompt in ((CHAT, False), (CHAT[:2], True), (CHAT[:4], True)):
        rendered = rendering.render(
            tokenizer.chat_template, messages, add_generation_prompt=prompt, **tokenizer.named_tokens
        )
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert rendered.endswith("Assistant: " if prompt else END)
    with pytest.raises(Exception, match="found the role tool"):
        rendering.render(bpe.CHAT, [{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("answer", ["x = 1", "", " def", "\n\ndef f(x):\n", ": ::", "é", "\t \t", "Assistant: x"])
def test_the_ids_of_a_prompt_and_of_its_answer_are_the_ids_of_both(made, answer):
    tokenizer = nanollm.text.tokenizer.load(made)
    prompt = Conversation(tokenizer, CHAT[:2]).prompt_ids()
    whole = rendering.render(
        tokenizer.chat_template, [*CHAT[:2], {"role": "assistant", "content": answer}], add_generation_prompt=False,
        **tokenizer.named_tokens,
    )
    assert tokenizer.encode(whole, special=True) == prompt + tokenizer.encode(answer) + [tokenizer.eos_id]


# ---- the command

def command(monkeypatch, *args: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    text.main()


def test_the_command_makes_what_prepare_makes_and_says_so(docs, made, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name, content, _ in docs:
        (tmp_path / "in" / f"{name}.jsonl").write_text(json.dumps({"text": content}))
    command(
        monkeypatch, tmp_path / "in", "--out", tmp_path / "out", "--vocab", "300", "--context", "16",
        "--shard-tokens", "500",
    )
    assert stream(tmp_path / "out", "train") == stream(made, "train")
    facts, said = text.facts(made), capsys.readouterr().out
    assert (
        f"{facts.train_documents} documents" in said
        and f"{facts.held_out_documents} documents" in said
        and str(tmp_path / "out") in said
    )


def test_several_inputs_are_joined_and_their_names_told_apart(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("".join(f"{name} line {i}\n" for i in range(80)))
    seen, prepare = [], text.prepare
    monkeypatch.setattr(
        text, "prepare", lambda found, *args, **options: seen.extend(found) or prepare(found, *args, **options)
    )
    command(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out", "--vocab", "300", "--context", "16")
    assert [*dict.fromkeys(part.name for part in seen)] == [f"{(tmp_path / name).as_posix()}/x.txt" for name in "ab"]
    assert text.facts(tmp_path / "out").train_documents == 2


@pytest.mark.parametrize("args, code, words", [
    (["--out", "new", "--vocab", "300", "nowhere"], 1, "nowhere: no such file"),
    (["--out", "new", "--vocab", "300", "short.txt"], 1, "do not fill one context of 1024"),
    (["--out", "new", "--tokenizer", "nowhere", "short.txt"], 1, "nowhere: found no such folder"),
    (["--out", "new", "--vocab", "300", "--shards", "5"], 2, "did you mean --shard-tokens?"),
    (["--out", "new"], 2, "--vocab"),
    (["--vocab", "300"], 2, "--out"),
])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, args, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, *args)
    message = error.value.code if code == 1 else capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message and "\n" not in message and (code == 2) == (error.value.code == 2)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_the_help_of_the_module_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--help"])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("nanollm.data", run_name="__main__")
    said = " ".join(capsys.readouterr().out.split())
    assert error.value.code == 0 and all(
        word in said for word in ("python -m nanollm.data", "--tokenizer", "--vocab", "default 1024")
    )
