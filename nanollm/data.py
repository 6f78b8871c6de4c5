"""From text to batches: documents, a tokenizer trained on them, one stream of tokens, windows cut from it.

    <|endoftext|> t t t t t <|endoftext|> t t t <|endoftext|> …          the stream: a mark before each document
                  └───────── window of T + 1 ─────────┘
    tokens          t t t t <|endoftext|> t t t                          what the model reads
    targets         t t t <|endoftext|> t t t <|endoftext|>              what it should say: the same, one later
    positions       0 1 2 3 0             1 2 3                          a 0 begins a document, which sees nothing before it

The mark opens a document as its first input and closes the one before as its last target, so a model learns to begin
and to end, and each token of the text is predicted once. Whole documents are held out, chosen by a hash of their names.

A batch is a pure function of (seed, step): nothing has to be saved to go on where a run stopped.
Shapes: B batch, T tokens of the context, N tokens in all.
"""

import functools
import gzip
import json
import math
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from nanollm.errors import NanollmError

END = "<|endoftext|>"           # before each document, and so after each but the last
HELD_OUT = 0.05                 # share of the text that training never sees
FEW = 20                        # fewer documents than this, and the end of each is held out instead of whole ones
WORDS = r"\w+ ?|[^\w\s]+ ?|\s+"   # where tokens may end. A word takes the space behind it, so a prompt may end in "def "
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3", "__pycache__"}


class DataError(NanollmError):
    """Text that cannot be read or trained on: a folder without any, a file that is not text, a broken line of jsonl."""


class Document(NamedTuple):
    name: str                   # unique; the split depends on it and on nothing else
    text: str


class Batch(NamedTuple):
    tokens: Tensor              # (B, T) int64
    targets: Tensor             # (B, T) int64, −100 where there is nothing to predict
    positions: Tensor | None    # (B, T) int64, None where no document begins inside a row: attention is then plainly causal

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if part is None else part.to(device) for part in self))


# ---- documents

def read(source: Path | None) -> list[Document]:
    """The documents of a file or a folder, in the order of their names. None: the source of Python's standard library.

    A .jsonl file has a document a line, in "text"; any other file is one. In a folder, files that are not text and
    hidden files are passed over. Raises DataError, which names the file, and the line of a jsonl.
    """
    if source is None:
        return standard_library()
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file():
        documents = read_file(source, source.name)
    else:
        inside = [path for path in sorted(source.rglob("*")) if path.is_file()]
        shown = [(path, path.relative_to(source)) for path in inside]
        shown = [(path, name) for path, name in shown if not any(part.startswith(".") for part in name.parts)]
        documents = [d for path, name in shown if is_text(path) for d in read_file(path, name.as_posix())]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError(f"{source}: no text in it")
    return documents


def standard_library() -> list[Document]:
    """The .py files of this Python's standard library, without its tests and its tables of data."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*.py"))]
    names = [name for name in names if not NOT_TEXT & set(name.parts[:-1]) and not name.name.startswith("_sysconfigdata")]
    if not names:
        raise DataError(f"{folder}: this Python comes without the source of its standard library; give text with --data")
    return [d for name in names for d in read_file(folder / name, name.as_posix()) if d.text.strip()]


def is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def read_file(path: Path, name: str) -> list[Document]:
    """The documents of one file. Bytes that are not UTF-8 become U+FFFD."""
    try:
        if not is_text(path):
            raise DataError(f"{path}: not a text file (it holds zero bytes)")
        text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix != ".jsonl":
        return [Document(name, text)]
    return [Document(f"{name}:{n}", json_text(line, f"{path}, line {n}")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def json_text(line: str, where: str) -> str:
    """The document in one line of jsonl. Raises DataError that begins with `where`, the file and the line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        found = f"the keys {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise DataError(f'{where}: expected an object with the document in "text", found {found}')
    return value["text"]


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out), the same on every machine. A text that occurs twice counts once, so none is on both sides."""
    unique = list({document.text: document for document in reversed(documents)}.values())[::-1]
    if len(unique) < FEW:
        cuts = [d.text.rfind("\n", 0, math.ceil(len(d.text) * (1 - HELD_OUT))) + 1 or len(d.text) for d in unique]
        ends = [Document(d.name, d.text[cut:]) for d, cut in zip(unique, cuts) if d.text[cut:].strip()]
        return [Document(d.name, d.text[:cut]) for d, cut in zip(unique, cuts)], ends
    share, held = HELD_OUT * sum(len(d.text) for d in unique), set()
    room = share
    for document in sorted(unique, key=lambda d: zlib.crc32(d.name.encode(errors="replace"))):
        if room < share / 4:                            # to fill the rest would mean to look for ever smaller ones
            break
        if len(document.text) <= room:
            room -= len(document.text)
            held.add(document.name)
    return [d for d in unique if d.name not in held], [d for d in unique if d.name in held]


# ---- tokens

def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019, §2.2): any text can be written, and what was written can be read back."""
    tokenizer = Tokenizer(models.BPE())
    words, as_bytes = pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=sys.stderr.isatty())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The files that nanollm.tokenizer.load and transformers.AutoTokenizer read. The mark is BOS and EOS both."""
    end = tokenizer.token_to_id(END)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "clean_up_tokenization_spaces": False}
    for name, value in (("tokenizer_config", config), ("generation_config", {"bos_token_id": end, "eos_token_id": end})):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def encode(tokenizer: Tokenizer, documents: Sequence[Document], label: str = "tokens") -> np.ndarray:
    """The stream drawn at the head of the file, with a mark at its very end as well: (N,) uint16, or uint32 if need be."""
    end = tokenizer.token_to_id(END)
    tokenizer.encode_special_tokens = True              # a text that spells the mark does not become one
    dtype, parts = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32, []
    for at in tqdm(range(0, len(documents), 64), desc=label, unit="batch", leave=False):
        for encoding in tokenizer.encode_batch([document.text for document in documents[at : at + 64]]):
            parts += [np.array([end], dtype), np.array(encoding.ids, dtype)]
    tokenizer.encode_special_tokens = False
    return np.concatenate([*parts, np.array([end], dtype)])


@dataclass(frozen=True)
class Corpus:
    """Text made ready: its two streams, and what a model is compared with."""
    tokenizer: Tokenizer
    train: np.ndarray           # (N,)
    held_out: np.ndarray        # (N',)
    facts: "Facts"

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token on the held-out stream, in a unit that does not depend on the tokenizer."""
        return loss * (len(self.held_out) - 1) / math.log(2) / self.facts.held_out_bytes

    @property
    def end(self) -> int:
        return self.tokenizer.token_to_id(END)


@dataclass(frozen=True)
class Facts:
    """What was counted while the text was at hand. Bytes are those of the text in UTF-8."""
    fingerprint: int            # of the documents, the size of the vocabulary and WORDS
    train_documents: int
    train_bytes: int
    held_out_documents: int
    held_out_bytes: int
    unigram_loss: float         # nats per held-out token, from the frequencies of the training tokens
    gzip_bits_per_byte: float   # of the held-out text compressed by itself


def prepare(documents: Sequence[Document], vocab: int, context: int, folder: Path) -> Corpus:
    """Split, train a tokenizer, encode; or take all that from `folder` if it was made from the same documents there.

    Raises DataError, with nothing written, where the text does not fill one context.
    """
    fingerprint = zlib.crc32(f"{vocab} {WORDS}".encode())
    for document in documents:
        fingerprint = zlib.crc32(f"{document.name}\0{document.text}\0".encode(errors="replace"), fingerprint)
    try:
        facts = Facts(**json.loads((folder / "facts.json").read_text()))
        if facts.fingerprint == fingerprint:
            streams = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out"))
            return Corpus(Tokenizer.from_file(str(folder / "tokenizer.json")), *streams, facts)
    except (OSError, ValueError, TypeError):
        pass                                            # nothing there, or not ours: make it
    kept, held = split(documents)
    if not held:
        raise DataError(f"{len(documents)} document(s) of {sum(len(d.text) for d in documents)} characters: too little text to hold out a part of it")
    tokenizer = train_tokenizer([document.text for document in kept], vocab)
    train, held_out = encode(tokenizer, kept, "tokens, training"), encode(tokenizer, held, "tokens, held out")
    if len(train) <= context:
        raise DataError(f"the text to train on has {len(train)} tokens, which do not fill one context of {context}; give more text, or a smaller --context")
    counts = np.bincount(train, minlength=tokenizer.get_vocab_size()) + 1.0         # + 1: no token is impossible
    text = "".join(document.text for document in held).encode(errors="replace")
    facts = Facts(
        fingerprint, len(kept), sum(len(d.text.encode(errors="replace")) for d in kept), len(held), len(text),
        unigram_loss=float(-np.log(counts / counts.sum())[held_out[1:]].mean()),
        gzip_bits_per_byte=8 * len(gzip.compress(text, 9)) / len(text),
    )
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.npy", train)
    np.save(folder / "held_out.npy", held_out)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "facts.json").write_text(json.dumps(asdict(facts), indent=2) + "\n")  # last: it vouches for the others
    return Corpus(tokenizer, train, held_out, facts)


# ---- batches

def training_batch(corpus: Corpus, step: int, batch: int, context: int, seed: int) -> Batch:
    """Batch number `step` of a stream that is shuffled anew each epoch: every window once, then every window again."""
    windows = (len(corpus.train) - 1) // context
    places = [divmod(row, windows) for row in range(step * batch, (step + 1) * batch)]
    starts = [shuffled(windows, seed, epoch)[index] * context for epoch, index in places]
    return cut(corpus.train, starts, context, corpus.end)


@functools.lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def held_out_batches(corpus: Corpus, batch: int, context: int, most: int | None = None) -> Iterator[Batch]:
    """All windows of the held-out stream, so that each token but the first is a target once; or `most`, evenly spread."""
    starts = range(0, len(corpus.held_out) - 1, context)
    starts = starts[:: 1 if most is None else math.ceil(len(starts) / most)]
    for at in range(0, len(starts), batch):
        yield cut(corpus.held_out, starts[at : at + batch], context, corpus.end)


def cut(stream: np.ndarray, starts: Sequence[int], context: int, end: int) -> Batch:
    """The windows of T + 1 tokens that begin at `starts`. One that leaves the stream is filled up with marks as documents."""
    rows = np.full((len(starts), context + 1), end, np.int64)
    targets = np.full((len(starts), context), -100, np.int64)
    for row, target, start in zip(rows, targets, starts):
        window = stream[start : start + context + 1]
        row[: len(window)] = window
        target[: len(window) - 1] = window[1:]
    tokens = torch.from_numpy(rows[:, :-1].copy())
    begins = tokens == end
    if not begins[:, 1:].any():
        return Batch(tokens, torch.from_numpy(targets), None)
    columns = torch.arange(context)
    last = torch.where(begins, columns, 0).cummax(1).values         # where the document of each token begins in its row
    return Batch(tokens, torch.from_numpy(targets), columns - last)
