"""What text is read, and which of it is held out: containers and encodings against Python's own, no character lost or
silently replaced, and about 5 % of the text of every size on the other side. FINDINGS 4.1, 4.4, 4.7."""

import bz2
import csv
import gzip
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest

from nanollm.data import files, records, split
from nanollm.data import prepare as text
from nanollm.data.documents import END, Part, Texts, read
from nanollm.data.split import DROPPED, WHOLE, Index, plan, sides
from nanollm.errors import DataError

WORDS = "Fülle — naïve \U0001f600 text\n" * 3


def documents(*args, **options) -> list[tuple[str, str]]:
    """(name, text) of each document, its parts joined."""
    return joined(read(*args, **options))


def joined(parts) -> list[tuple[str, str]]:
    found, begun = [], ""
    for part in parts:
        begun += part.text
        if part.ends:
            found.append((part.name, begun))
            begun = ""
    return found


# ---- files and folders

def test_folder_reads_text_and_jsonl_in_order_and_says_what_it_passes_over(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes("\ufefftwo\r\nlines".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 7}\n\n{"text": "é"}\n')
    for name in ("picture.png", "b.png", "c.png", "d.png", "e.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "table.csv").write_text("x,y\n1,2\n")
    (tmp_path / "config.json").write_text('{"vocab": 7}')
    found = read(tmp_path)
    assert joined(found) == [("a.jsonl:1", "one"), ("a.jsonl:2", "é"), ("sub/b.txt", "two\nlines")]
    assert found.notes == [
        "1 file hidden: not read: .hidden", "5 files no text: not read: b.png, c.png, d.png, e.png, …",
        "2 files no document in the first record: not read: config.json, table.csv",
    ]
    assert joined(found) and len(found.notes) == 3                              # read again, nothing is said twice


def test_half_a_character_in_json_becomes_a_mark_of_its_absence(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d b\ud83d\ude00"}')
    assert documents(tmp_path / "a.jsonl") == [("a.jsonl:1", "a\ufffd b😀")]


@pytest.mark.slow
def test_standard_library_is_python_without_its_tests():
    names = [name for name, _ in documents(None)]
    assert len(names) > 200 and len(set(names)) == len(names)
    assert "argparse.py" in names and not any(name.startswith(("test/", "site-packages/")) for name in names)


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', ["x.jsonl, line 2", "not JSON"]),
    ("x.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', ["x.jsonl, line 3", '"text"', "body"]),
    ("x.jsonl", b"[1]\n", ["x.jsonl, line 1", "list"]),
    ("x.jsonl", b'{"body": "b", "article": "c"}\n', ["line 1", '"text"', "body, article", "--text-field"]),
    ("x.json", b'[{"text": "a"}, {"text": 7}]', ["x.json, item 2", '"text"']),
    ("x.json", b'[{"text": "a"}, {"text": "b"', ["x.json, item 2", "not JSON"]),
    ("x.json", b'[{"text": "a"}', ["x.json, item 2", "not JSON"]),
    ("x.csv", b'text,n\n"a,1\n', ["x.csv, line 2", "not a table"]),
    ("x.csv", b"text,n\na,1\nb\n", ["x.csv, line 3", "found 1 columns, expected 2"]),
    ("x.csv", b"a,b\n1,2\n", ["x.csv, line 2", "a, b", "--text-field"]),
    ("x.txt", b"abc\0def", ["x.txt", "not a text file"]),
    ("x.txt", "世界".encode("gbk") * 40, ["x.txt", "not a text file", "iconv"]),
    ("x.txt", b"\xff\xfea\0b", ["x.txt", "UTF-16", "damaged"]),
    ("x.txt", b" \n", ["x.txt", "no text"]),
    ("x.txt.gz", gzip.compress(b"text " * 999)[:-20], ["x.txt.gz", "cannot be unpacked"]),
    ("x.txt.gz", b"text", ["x.txt.gz", "cannot be unpacked"]),
    ("x.txt.xz", lzma.compress(b"text " * 999)[:-20], ["x.txt.xz", "cannot be unpacked"]),
], ids=range(17))
def test_a_bad_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        documents(tmp_path / name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_folder_without_text_and_a_path_without_anything_are_errors(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match="no text in it; 1 file no text: not read: x.bin"):
        documents(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        documents(tmp_path / "nothing")


def test_a_file_that_changes_between_two_readings_is_found(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    found = read(tmp_path)
    assert joined(found)
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(DataError, match="a.txt: changed while it was read"):
        joined(found)


# ---- encodings and containers (FINDINGS 4.4)

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_unicode_is_read_by_its_mark_whatever_the_blocks(tmp_path, monkeypatch, encoding, block):
    monkeypatch.setattr(files, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes(WORDS.replace("\n", "\r\n").encode(encoding))
    found = read(tmp_path / "a.txt")
    assert joined(found) == [("a.txt", WORDS)] and not found.notes


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_cp1252_is_read_as_such_and_said(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    words = "Le café où naît l’été, “déjà vu” — à 5 €.\n" * 20
    (tmp_path / "a.txt").write_bytes(words.encode("cp1252"))
    found = read(tmp_path / "a.txt")
    assert joined(found) == [("a.txt", words)]
    assert found.notes == ["1 file not UTF-8, read as cp1252 (Western European): a.txt"]


@pytest.mark.parametrize("encoding", ["gbk", "shift-jis", "koi8-r", "cp1251", "euc-kr"])
def test_other_encodings_are_no_text_that_is_read_and_never_gibberish(tmp_path, encoding):
    words = {"gbk": "你好世界，这是一个测试。", "shift-jis": "これはテストです。", "euc-kr": "안녕하세요 세계"}.get(
        encoding, "Привет, мир. Это проверка.")
    (tmp_path / "a.txt").write_bytes((words * 30).encode(encoding))
    (tmp_path / "b.txt").write_text("text")
    found = read(tmp_path)
    assert joined(found) == [("b.txt", "text")] and found.notes == ["1 file no text: not read: a.txt"]


def test_damaged_utf8_is_counted_and_said(tmp_path):
    content = ("Fülle und Größe " * 50).encode()
    (tmp_path / "a.txt").write_bytes(content[:100] + b"\xff\xfe" + content[100:])
    found = read(tmp_path / "a.txt")
    assert joined(found)[0][1].count("\ufffd") == 2
    assert found.notes == ["1 file not all UTF-8: U+FFFD for the rest: a.txt (2 places)"]


def write_zst(path: Path, content: bytes) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra data")
    half = len(content) // 2                                                    # two frames, as pzstd writes them
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:])))


PACK = {".gz": lambda path, content: path.write_bytes(gzip.compress(content)),
        ".bz2": lambda path, content: path.write_bytes(bz2.compress(content)),
        ".xz": lambda path, content: path.write_bytes(lzma.compress(content)), ".zst": write_zst}


@pytest.mark.parametrize("packed", ["", *PACK])
def test_containers_hold_what_they_were_given(tmp_path, packed):
    texts = [f"{i} {WORDS}" for i in range(50)]
    records = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name, content in (("a.txt", "".join(texts)), ("b.JSONL", records)):
        path = tmp_path / (name + packed.upper())
        PACK.get(packed, lambda path, content: path.write_bytes(content))(path, content.encode())
    found = documents(tmp_path)
    assert found[0][1] == "".join(texts) and [text for _, text in found[1:]] == texts


def test_a_zst_that_was_cut_off_is_damaged_and_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    write_zst(tmp_path / "a.txt.zst", b"text " * 9999)
    (tmp_path / "b.txt.zst").write_bytes((tmp_path / "a.txt.zst").read_bytes()[:-9])
    with pytest.raises(DataError, match="b.txt.zst: cannot be unpacked: it ends within a frame"):
        documents(tmp_path / "b.txt.zst")
    for module, source in (("zstandard", tmp_path / "a.txt.zst"), ("pyarrow", tmp_path / "c.parquet"),
                           ("datasets", Path("hf:owner/name"))):
        if "parquet" in source.name:
            source.write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(DataError, match=rf"{module}: pip install -e \".\[data\]\""):
            documents(source)


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]], dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict]) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra data")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


WRITERS = {"a.jsonl": write_lines, "a.NDJSON": write_lines, "a.json": write_json, "lines.json": write_lines,
           "a.csv": write_csv, "a.tsv": write_csv, "a.parquet": write_parquet}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("block", [5, 1 << 20])
def test_records_are_what_the_library_that_wrote_them_was_given(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(files, "BLOCK", block)
    rng = np.random.default_rng(0)
    some = ["a", '"', "\n", ",", "\t", "é", "\\", "{", "]", "😀", END]
    texts = ["".join(rng.choice(some, 1 + n % 40)) + "." + "x" * n for n in range(300)]
    rows = [{"id": n, "text": t, "content": "no"} for n, t in enumerate(texts)]
    WRITERS[name](tmp_path / name, rows)
    found = read(tmp_path / name)
    assert [text for _, text in joined(found)] == texts and not found.notes


@pytest.mark.parametrize("name", WRITERS)
def test_the_field_is_the_one_asked_for_or_the_only_known_one(tmp_path, name):
    WRITERS[name](tmp_path / name, [{"n": "7", "content": "one"}, {"n": "8", "content": "two"}])
    found = read(tmp_path / name)
    assert [text for _, text in joined(found)] == ["one", "two"]
    assert found.notes == [f'1 file with its documents in "content": {name}']
    asked = read(tmp_path / name, "n")
    assert [text for _, text in joined(asked)] == ["7", "8"] and not asked.notes
    with pytest.raises(DataError, match='in "body", found the keys n, content'):
        documents(tmp_path / name, "body")


def test_null_and_empty_texts_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "a"}\n')
    index = Index.of(read(tmp_path / "a.jsonl"))
    assert index.sizes.tolist() == [0, 0, 1]


def test_a_json_file_is_never_in_memory_as_a_whole():
    held = 0

    def blocks():
        nonlocal held
        yield "["
        for _ in range(200):
            held += 1
            yield "".join(json.dumps({"text": "x" * 99}) + ",\n" for _ in range(10))
        yield '{"text": "last"}]'

    found = records.json_values(Path("a.json"), blocks())
    for number in range(1, 2001):
        assert next(found).fields["text"] == "x" * 99 and held <= number // 10 + 3
    assert next(found).fields == {"text": "last"} and not [*found]


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra data")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", [{"text": f"text {i}"} for i in range(5)])
    write_lines(tmp_path / "set" / "validation.jsonl", [{"text": "other"}])
    assert [text for _, text in documents(Path(f"hf:{tmp_path / 'set'}"))] == [f"text {i}" for i in range(5)]
    assert [text for _, text in documents(Path(f"hf:{tmp_path / 'set'}::validation"))] == ["other"]
    with pytest.raises(DataError, match="hf:.*none: cannot be read"):
        documents(Path(f"hf:{tmp_path / 'set'}::none"))
    with pytest.raises(DataError, match="expected hf:owner/name"):
        documents(Path("hf:a:b:c:d"))


# ---- marks between documents (FINDINGS 4.4)

@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_marks_part_the_documents_of_a_text_file_and_are_letters_in_records(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    content = f"one{END}two\n{END}\nthree <s>x</s>{END}{END} <|end|> four<|im_end|>\n\nfive <|endof"
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": content}))
    found = Texts([tmp_path], marks=["<|im_end|>", "</s>", "<s>"])
    assert [text for _, text in joined(found)] == [
        "one", "two\n", "three <s>x</s>", "", " <|end|> four", "\nfive <|endof", content]
    assert found.notes == ["1 file parted where a mark stands: a.txt (6 documents)"]


def test_the_marks_of_a_tokenizer_are_its_eos_and_bos(tmp_path):
    text.prepare([Part("a", "word " * 500)], tmp_path / "bpe", vocab=260, tokenizer=None, context=8)
    assert text.separators(tmp_path / "bpe") == [END, END] and text.separators(None) == []
    (tmp_path / "bpe" / "chat_template.jinja").write_text("{% for m in messages %}" + END + "{% endfor %}")
    assert text.separators(tmp_path / "bpe") == []                              # of turns, not of documents


# ---- what is held out (FINDINGS 4.1, 4.7)

def share(texts: list[str]) -> tuple[float, np.ndarray, Index]:
    """What share of the characters is held out, the plan, and the index; no character is lost."""
    docs = [Part(str(n), text) for n, text in enumerate(texts)]
    keep = plan(index := Index.of(docs))
    both = [joined(part for which, part in sides(docs, keep) if which == side) for side in (0, 1)]
    back = {name: text for name, text in both[0]}
    for name, held in both[1]:
        back[name] = back.get(name, "") + held
    assert back == {part.name: part.text for part, kept in zip(docs, keep, strict=True) if kept != DROPPED}
    return sum(len(held) for _, held in both[1]) / sum(map(len, back.values())), keep, index


def lines(n: int, seed: object) -> str:
    rng = np.random.default_rng(abs(hash(str(seed))) % 2**32 if not isinstance(seed, int) else seed)
    return "".join(f"{seed} {rng.integers(10**9)} some words in a line\n" for _ in range(1 + n // 40))[:n] or "x"


SIZES = {
    "one book and 24 notes": [2_100_000, *[1_800] * 24],
    "one book and 12 notes": [2_100_000, *[1_800] * 12],
    "many equal": [3_000] * 400,
    "fifty equal": [3_000] * 50,
    "twenty-one equal": [3_000] * 21,
    "two files": [50_000, 40_000],
    "one file": [50_000],
    "nineteen small, one middling": [1_000] * 19 + [32_000],
    "all sizes": [int(1.5**n) + 50 for n in range(28)] * 3,
    "a long tail": [int(200_000 / n) for n in range(1, 500)],
    "jsonl of lines": [30 + n % 90 for n in range(3_000)],
}


@pytest.mark.parametrize("name", SIZES)
def test_about_five_per_cent_of_the_text_of_every_size_is_held_out(name):
    found, keep, index = share([lines(size, n) for n, size in enumerate(SIZES[name])])
    assert 0.03 <= found <= 0.071, found
    whole = keep == 0
    assert whole.mean() <= 0.05                                                 # of the variety of documents
    for low, high in ((0, 1e3), (1e3, 1e4), (1e4, 1e5), (1e5, 1e7)):
        some = (index.sizes >= low) & (index.sizes < high)
        if some.sum() >= 40:                                                    # no size is left out, none taken away
            assert 0 < (keep[some] != WHOLE).mean() and whole[some].mean() <= 0.1


def test_one_book_and_24_notes_train_on_both():
    """FINDINGS 4.1: all the notes were held out, and none trained."""
    _, keep, index = share([lines(size, n) for n, size in enumerate(SIZES["one book and 24 notes"])])
    assert 0.94 < keep[0] / index.sizes[0] < 0.96
    assert (keep[1:] == 0).sum() == 1 and (keep[1:] == WHOLE).sum() == 23


def test_names_and_the_order_of_the_documents_play_no_part():
    docs = [Part(f"{n}", lines(1_000 + 7 * n, n)) for n in range(120)]
    held = {part.text for side, part in sides(docs, plan(Index.of(docs))) if side == 1}
    other = [Part("x" + part.name, part.text) for part in docs[::-1]]
    assert held == {part.text for side, part in sides(other, plan(Index.of(other))) if side == 1} and len(held) == 6


def test_a_text_that_occurs_twice_is_on_one_side_and_once():
    docs = [Part(f"{n}", lines(1_000, n)) for n in range(60)] * 2
    kept = [[part.text for side, part in sides(docs, plan(Index.of(docs))) if side == which] for which in (0, 1)]
    assert len(kept[0]) == 57 and len(kept[1]) == 3 and len({*kept[0], *kept[1]}) == 60


@pytest.mark.parametrize("words, end", [
    ("word " * 1000, " "),                                                      # FINDINGS 4.7: a text of one line
    ("x" * 5000, "x"), ("世界" * 2500, "界"), ("line\n" * 1000, "\n"), ("line\n" + "word " * 999, " "),
])
def test_a_text_is_cut_behind_a_line_or_a_word_or_just_there(words, end):
    (_, kept), (_, held) = joined(part for _, part in sides([Part("a", words)], plan(Index.of([Part("a", words)]))))
    assert kept + held == words and kept.endswith(end) and 0.04 < len(held) / len(words) < 0.06


@pytest.mark.parametrize("size", [1, 13, 1000, 10**6])
def test_the_sides_do_not_depend_on_the_parts_that_a_text_comes_in(size):
    words = lines(40_000, 1) + "\n \n"
    parts = [Part("a", words[at: at + size], at + size >= len(words)) for at in range(0, len(words), size)]
    assert (cut := Index.of(parts)).sizes.tolist() == [len(words.rstrip())]
    whole = Index.of([Part("a", words)])
    assert cut.texts == whole.texts and (cut.hashes == whole.hashes).all()
    both = [joined(part for side, part in sides(found, plan(whole)) if side == which)
            for found in (parts, [Part("a", words)]) for which in (0, 1)]
    assert both[:2] == both[2:] and both[0][0][1] + both[1][0][1] == words


@pytest.mark.parametrize("texts", [["x"], [" ", ""], ["a", "b", "a"]])
def test_too_little_to_hold_out_a_part_of_is_an_error(texts):
    with pytest.raises(DataError, match="too little text"):
        plan(Index.of([Part(str(n), text) for n, text in enumerate(texts)]))
    assert split.GROUP == 20
