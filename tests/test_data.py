"""Documents, split, tokens, batches: nothing is lost, nothing is on both sides, and the same input gives the same output."""

import json

import numpy as np
import pytest
import torch

from nanollm import data
from nanollm.data import DataError, Document


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    words = ["def ", "return ", "self", "\n    ", "x = ", "é", "(", ")", "\t", "while True:"]
    return [Document(f"m{i:02}.py", "".join(rng.choice(words, rng.integers(20, 60))) + f"# {i}") for i in range(60)]


@pytest.fixture(scope="module")
def corpus(documents, tmp_path_factory):
    return data.prepare(documents, 300, 16, tmp_path_factory.mktemp("prepared"))


# ---- reading

def test_folder_reads_text_and_jsonl_in_order_and_passes_over_the_rest(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes("\ufefftwo\r\nlines".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 7}\n\n{"text": "é"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert data.read(tmp_path) == [
        ("a.jsonl:1", "one"), ("a.jsonl:3", "é"), ("latin.txt", "caf\ufffd"), ("sub/b.txt", "two\nlines")]


def test_standard_library_is_python_without_its_tests():
    documents = data.read(None)
    names = [document.name for document in documents]
    assert len(names) > 200 and len(set(names)) == len(names) and names == [d.name for d in data.read(None)]
    assert "argparse.py" in names and not any(name.startswith(("test/", "site-packages/")) for name in names)


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', ["x.jsonl, line 2", "not JSON"]),
    ("x.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', ["x.jsonl, line 3", '"text"', "body"]),
    ("x.jsonl", b"[1]\n", ["x.jsonl, line 1", "list"]),
    ("x.txt", b"abc\0def", ["x.txt", "not a text file"]),
    ("x.txt", b" \n", ["x.txt", "no text"]),
])
def test_a_bad_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        data.read(tmp_path / name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_folder_without_text_and_a_path_without_anything_are_errors(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match="no text"):
        data.read(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        data.read(tmp_path / "nothing")


# ---- splitting

def test_split_parts_whole_documents_by_name_only(documents):
    kept, held = data.split(documents)
    assert sorted(kept + held) == sorted(documents) and not set(kept) & set(held) and held
    share = sum(len(d.text) for d in held) / sum(len(d.text) for d in documents)
    assert 0.03 < share <= data.HELD_OUT
    again = data.split(documents[::-1])
    assert set(again[1]) == set(held)                                           # the order of the files plays no part


def test_a_text_that_occurs_twice_is_on_one_side(documents):
    copies = [Document("copy of " + d.name, d.text) for d in documents]
    kept, held = data.split(documents + copies)
    assert not {d.text for d in kept} & {d.text for d in held} and len(kept + held) == len(documents)


def test_few_documents_lose_their_ends():
    text = "".join(f"line {i}\n" for i in range(200))
    (kept,), (held,) = data.split([Document("a", text)])
    assert kept.text + held.text == text and held.text.startswith("line 19") and len(held.text) < 0.07 * len(text)


# ---- tokens

def test_streams_hold_every_byte_and_a_mark_before_each_document(corpus, documents):
    for stream, docs in zip((corpus.train, corpus.held_out), data.split(documents)):
        assert stream.dtype == np.uint16 and stream[0] == stream[-1] == corpus.end
        pieces = np.split(stream, np.flatnonzero(stream == corpus.end)[1:])[:-1]
        assert [corpus.tokenizer.decode(piece[1:].tolist()) for piece in pieces] == [d.text for d in docs]


def test_text_that_spells_the_mark_is_text(corpus):
    stream = data.encode(corpus.tokenizer, [Document("a", f"x{data.END}y")])
    assert (stream == corpus.end).sum() == 2 and corpus.tokenizer.decode(stream[1:-1].tolist()) == f"x{data.END}y"


def test_references_by_hand(corpus, documents):
    held = data.split(documents)[1]
    counts = {token: 1 for token in range(corpus.tokenizer.get_vocab_size())}
    for token in corpus.train.tolist():
        counts[token] += 1
    nats = [-np.log(counts[token] / sum(counts.values())) for token in corpus.held_out[1:].tolist()]
    assert corpus.facts.unigram_loss == pytest.approx(np.mean(nats))
    assert corpus.facts.held_out_bytes == sum(len(d.text.encode()) for d in held)
    assert corpus.bits_per_byte(2.0) == pytest.approx(2.0 / np.log(2) * len(nats) / corpus.facts.held_out_bytes)


def test_prepared_text_is_taken_up_again_and_only_if_it_is_the_same(documents, tmp_path, monkeypatch):
    first = data.prepare(documents, 300, 16, tmp_path)
    monkeypatch.setattr(data, "train_tokenizer", lambda *_: pytest.fail("prepared again"))
    again = data.prepare(documents, 300, 16, tmp_path)
    assert again.facts == first.facts and np.array_equal(again.train, first.train) and np.array_equal(again.held_out, first.held_out)
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    monkeypatch.undo()
    assert data.prepare(documents[:-1], 300, 16, tmp_path).facts != first.facts
    (tmp_path / "facts.json").write_text("{")
    assert data.prepare(documents, 300, 16, tmp_path).facts == first.facts


def test_too_little_text_is_an_error_and_leaves_nothing(tmp_path):
    for text in ("one line", "two words\n" * 20):
        with pytest.raises(DataError, match="too little|fewer|do not fill"):
            data.prepare([Document("a", text)], 300, 512, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tokenizer_files_load_in_both_libraries(corpus, tmp_path):
    data.save_tokenizer(corpus.tokenizer, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == corpus.end
    from nanollm import tokenizer
    ours, text = tokenizer.load(tmp_path), "def f(x):\n\treturn  é x\n"
    assert ours.encode(text) == corpus.tokenizer.encode(text).ids and ours.decode(ours.encode(text)) == text
    assert ours.eos_id == ours.bos_id == corpus.end and ours.stop_ids == (corpus.end,) and ours.doctor() == []


# ---- batches

def test_an_epoch_is_every_window_once_and_a_batch_depends_on_seed_and_step_only(corpus):
    windows = (len(corpus.train) - 1) // 16
    rows = [data.training_batch(corpus, step, 1, 16, seed=3) for step in range(2 * windows)]
    seen = [tuple(batch.tokens[0].tolist()) for batch in rows]
    expected = sorted(tuple(corpus.train[i * 16 : i * 16 + 16].tolist()) for i in range(windows))
    assert sorted(seen[:windows]) == expected == sorted(seen[windows:]) and seen[:windows] != seen[windows:]
    three = data.training_batch(corpus, 5, 3, 16, seed=3)
    assert torch.equal(three.tokens, torch.cat([batch.tokens for batch in rows[15:18]]))
    assert torch.equal(three.targets[:, :-1], three.tokens[:, 1:])
    assert not torch.equal(three.tokens, data.training_batch(corpus, 5, 3, 16, seed=4).tokens)


def test_positions_begin_again_with_each_document():
    stream = np.array([0, 5, 6, 0, 7, 8, 9, 0, 5, 5], np.uint16)
    batch = data.cut(stream, [0, 1, 4], 5, end=0)
    assert batch.tokens.tolist() == [[0, 5, 6, 0, 7], [5, 6, 0, 7, 8], [7, 8, 9, 0, 5]]
    assert batch.targets.tolist() == [[5, 6, 0, 7, 8], [6, 0, 7, 8, 9], [8, 9, 0, 5, 5]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert data.cut(stream, [0, 3], 3, end=0).positions is None                 # documents begin at the edges: nothing to isolate


def test_held_out_windows_cover_each_target_once(corpus):
    for context, batch in ((16, 3), (7, 64)):
        targets = torch.cat([b.targets.flatten() for b in data.held_out_batches(corpus, batch, context)])
        assert targets[targets >= 0].tolist() == corpus.held_out[1:].tolist()
    few = sum(len(b.tokens) for b in data.held_out_batches(corpus, 4, 16, most=5))
    assert 1 <= few <= 5
