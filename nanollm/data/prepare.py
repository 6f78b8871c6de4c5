"""From text to shards: a tokenizer, what it makes of the documents, and the folder that `stream.py` reads.

    notes/  a.jsonl …                        documents, in parts (documents.py)
         │  Index.of, plan                   read once: 5 % of the text is held out, by its contents (split.py)
         │  train a BPE, or take a model's   read again, where one is trained (bpe.py)
         ▼  encode                           read again: <|endoftext|> t t t <|endoftext|> t t … (encode.py)
    train-00000.bin …  held_out-00000.bin …  the two streams, in the format of `shards.py`
    tokenizer.json …                         what nanollm.text.tokenizer.load reads
    meta.json                                what was counted on the way; whole only when all the others are

All this is made in .draft inside the folder, and moved to its place when it is complete: `draft` makes, `settle` moves.
What was there stays as it was until then, and if the text or its tokenizer turns out to be unfit.

**Made once.** meta.json says from which texts (a hash of their contents), with which tokenizer and which marks. The
same again, from wherever, is left as it is; and not even read, where the files are the same by place, size and time.

Nothing here is on the path of a training step.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nanollm.text.tokenizer
from nanollm import cli
from nanollm.data import bpe
from nanollm.data.documents import Apart, Part, Texts, read
from nanollm.data.encode import Encoder, Marks, encoded, marks
from nanollm.data.shards import DRAFT, LIMIT, VERIFIED, InMemory, Writing, read_meta, write_file
from nanollm.data.split import DROPPED, WHOLE, Index, plan, sides
from nanollm.data.stream import open_folder
from nanollm.errors import DataError, NanollmError, counted
from nanollm.text.tokenizer import Tokenizer
from nanollm.text.tokenizer_files import FILES

# what a folder of ours holds, beside meta.json
OURS = (*FILES, "generation_config.json", "train-*.bin", "held_out-*.bin", "*.draft", VERIFIED)
FIELD_HELP = ('field or column of records that holds the documents (default: text; else the one of content, document, '
              'raw_content, body, article that there is)')
ZIPPED = 1 << 25                # bytes of held-out text that gzip is measured on, at most


@dataclass(frozen=True)
class Facts:
    """What was counted while the text was at hand. Bytes are those of the text in UTF-8."""
    train_documents: int        # one that gives its end counts on both sides
    train_bytes: int
    train_tokens: int
    held_out_documents: int
    held_out_bytes: int
    held_out_tokens: int
    unigram_loss: float         # nats per held-out token, from the frequencies of the training tokens
    gzip_bits_per_byte: float   # of the held-out text, or the first ZIPPED bytes of it, compressed by itself

    @property
    def held_out_targets(self) -> int:
        """Tokens that are predicted: each but the first.

        A loss in nats × these / log(2) / held_out_bytes is in bits per byte.
        """
        return self.held_out_tokens - 1


def facts(folder: Path) -> Facts | None:
    """Of a folder that `prepare` made; None for any other."""
    meta = read_meta(folder)
    try:
        return Facts(**meta["facts"]) if meta.get("format") == 1 and "facts" in meta else None
    except TypeError:
        expected = [*Facts.__annotations__]
        raise DataError(f"{folder / 'meta.json'}: found facts {meta['facts']!r:.80}, expected {expected}; "
                        "make it anew") from None


def notes(folder: Path) -> list[str]:
    """What was said of the text when the folder was made: files that were not read, encodings."""
    return [str(note) for note in read_meta(folder).get("notes", [])]


def digest(tokenizer: Tokenizer) -> str:
    """sha256, in hex, of the file that the tokenizer was read from: it tells which tokenizer made a shard."""
    return hashlib.sha256(tokenizer.files[0].read_bytes()).hexdigest()


def separators(tokenizer: Path | None) -> list[str]:
    """The texts of a tokenizer's EOS and BOS, which part documents in a text file; not those that its chat template
    writes, as <|im_end|>: they part turns."""
    if tokenizer is None:
        return []
    reader = nanollm.text.tokenizer.load(tokenizer)
    marks = [reader.named_tokens.get(name, "") for name in ("eos_token", "bos_token")]
    templates = "".join(reader.chat_templates.values())
    return [mark for mark in marks if mark and mark not in templates]


# ---- the folder

def prepare(documents: Iterable[Part], folder: Path, *, vocab: int | None, tokenizer: Path | None, context: int,
            shard_tokens: int = 100_000_000) -> None:
    """Make a data folder: split the documents, train a BPE of `vocab` tokens or take a model's `tokenizer`, encode.

    A folder made from the same documents and the same tokenizer is left as it is. Raises DataError, with nothing
    written, where the text does not fill one context, and where the folder holds something else.
    """
    settle(draft(documents, folder, vocab=vocab, tokenizer=tokenizer, context=context, shard_tokens=shard_tokens),
           folder)


def draft(documents: Iterable[Part], folder: Path, *, vocab: int | None, tokenizer: Path | None, context: int,
          shard_tokens: int = 100_000_000) -> Path:
    """As `prepare`, but what is new stays in a draft: the path of it, or `folder` where that was made before.

    documents    are iterated over two or three times: Texts, of which 5 % are held out; Apart; or a list
    """
    given = check(folder, vocab, tokenizer, context, shard_tokens)
    listing = documents.listing() if isinstance(documents, Texts | Apart) else None
    made_from = {"listing": listing, "texts": None, "marks": list(marks(given)) if given else None,
                 "tokenizer": digest(given) if given else f"BPE {vocab} {bpe.WORDS}"}
    made_from = json.loads(json.dumps(made_from))
    if listing is None or not is_made(folder, made_from, "listing"):
        index = Index.of(documents)
        made_from["texts"] = index.texts
        if not is_made(folder, made_from, "texts"):
            return build(documents, index, folder, given, vocab, made_from, context, shard_tokens)
    open_folder(folder, context)                        # raises where it does not fill one
    return folder


def build(documents: Iterable[Part], index: Index, folder: Path, given: Tokenizer | None, vocab: int | None,
          made_from: dict[str, Any], context: int, shard_tokens: int) -> Path:
    """The draft. What is in memory at a time is a batch of text."""
    keep = plan(index)
    size = int(index.sizes[keep != DROPPED].sum())
    with drafting(folder) as place:
        if given is None:
            assert vocab is not None, "check wants a vocab or a tokenizer"
            trained = bpe.train_tokenizer((part for side, part in sides(documents, keep) if side == 0), size, vocab)
            bpe.save_tokenizer(trained, place)
        else:
            try:
                given.copy_files(place)
            except OSError as error:
                raise DataError(f"{place}: cannot be written: {error.strerror}") from None
        used = nanollm.text.tokenizer.load(place)
        around, made_with = marks(used), digest(used)
        writing = [Writing(place, name, shard_tokens, used.vocab_size, around.before[0], made_with)
                   for name in ("train", "held_out")]
        sizes, zipped = [0, 0], Zipped()
        with Encoder(used, size) as encoder:
            for batch in encoded(encoder, sides(documents, keep), around, size):
                for side, to in enumerate(writing):
                    mine = [(chunk, ids) for chunk, ids in batch if chunk.side == side]
                    said = "".join(chunk.text for chunk, _ in mine).encode(errors="replace")
                    sizes[side] += len(said)
                    to.add(np.array([id for _, ids in mine for id in ids], np.int64))
                    if side == 1:
                        zipped.add(said)
        for to in writing:
            if to.counts.any():                         # nothing may be held out
                to.add(np.array(around.last, np.int64))
            to.close()
        counts = [to.counts for to in writing]
        if counts[0].sum() <= context:
            raise DataError(f"the text to train on has {counts[0].sum()} tokens, which do not fill one context of "
                            f"{context}; give more, or a smaller --context")
        kept = keep[keep != DROPPED]
        found = count((int((kept != 0).sum()), int((kept != WHOLE).sum())), sizes, counts, around, zipped)
        meta = {"format": 1, "made_from": made_from, "vocab": used.vocab_size, "tokenizer_sha256": made_with,
                "marks": around._asdict(), "notes": said_of(documents, index, keep), "facts": asdict(found)}
        write_file(place / "meta.json", json.dumps(meta, indent=2).encode() + b"\n")
    return place


def said_of(documents: Iterable[Part], index: Index, keep: np.ndarray) -> list[str]:
    """What a person should know of the text, in lines."""
    lines = documents.notes if isinstance(documents, Texts | Apart) else []
    if twice := int(((keep == DROPPED) & (index.sizes > 0)).sum()):
        lines = [*lines, f"{counted(twice, 'document')} the same as an earlier one: taken once"]
    if both := np.intersect1d(index.hashes[keep == WHOLE], index.hashes[keep == 0]).size:
        lines = [*lines, f"{counted(both, 'document')} trained on and held out both"]
    return lines


def check(folder: Path, vocab: int | None, tokenizer: Path | None, context: int,
          shard_tokens: int) -> Tokenizer | None:
    """The tokenizer that is given, if one is. Raises DataError for what `prepare` cannot do, before any work."""
    if (vocab is None) == (tokenizer is None):
        raise DataError(f"vocab {vocab}, tokenizer {tokenizer}: expected one of the two")
    if vocab is not None and vocab < 257:
        raise DataError(f"vocab {vocab}: expected 257 or more: the 256 bytes, and the mark between documents")
    if not 0 < context < shard_tokens < LIMIT:
        raise DataError(f"context {context}, tokens a shard {shard_tokens}: "
                        f"expected 0 < context < tokens a shard < {LIMIT}, which is llm.c's limit")
    if folder.exists() and (not folder.is_dir() or holds_more_than_a_draft(folder)
                            and read_meta(folder).get("format") is None):
        raise DataError(f"{folder}: not empty, and not made by nanollm.data; name another folder")
    return None if tokenizer is None else nanollm.text.tokenizer.load(tokenizer)


def holds_more_than_a_draft(folder: Path) -> bool:
    """Whether there is anything in the folder that an earlier process did not leave when it was killed."""
    return any(path.name != DRAFT for path in folder.iterdir())


def is_made(folder: Path, made_from: dict[str, Any], by: str) -> bool:
    """Whether the folder was made from that, by its "listing" or its "texts", and every byte of it is still there."""
    made = read_meta(folder).get("made_from")
    same = isinstance(made, dict) and all(made.get(key) == made_from[key] for key in (by, "tokenizer", "marks"))
    return same and is_whole(folder)


def is_whole(folder: Path) -> bool:
    """Whether the shards and the tokenizer are those that were written. False where one is gone, or damaged."""
    try:
        for source in filter(None, open_folder(folder, 1)):
            source.verify(read_meta(folder)["vocab"])
        return digest(nanollm.text.tokenizer.load(folder)) == source.digest
    except NanollmError:
        return False


def holds(folder: Path, documents: Iterable[Part]) -> bool:
    """Whether the folder was made from these documents, with whatever tokenizer. True for one that an earlier version
    made: it did not say from which."""
    made = read_meta(folder).get("made_from")
    if not isinstance(made, dict):
        return True
    listing = documents.listing() if isinstance(documents, Texts | Apart) else None
    return listing is not None and listing == made.get("listing") or Index.of(documents).texts == made.get("texts")


def in_memory(documents: Texts, tokenizer: Tokenizer) -> tuple[InMemory, int]:
    """The tokens of documents as in shards, marks included, and how many bytes their text has."""
    index, around = Index.of(documents), marks(tokenizer)
    keep, said, ids, size = np.where(index.sizes > 0, WHOLE, DROPPED), int(index.sizes.sum()), list[int](), 0
    with Encoder(tokenizer, said) as encoder:
        for batch in encoded(encoder, sides(documents, keep), around, said):
            ids += [id for _, some in batch for id in some]
            size += sum(len(chunk.text.encode(errors="replace")) for chunk, _ in batch)
    return InMemory(np.array([*ids, *around.last], np.int64), around.before[0]), size


@contextlib.contextmanager
def drafting(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, which an error in the block removes, and `folder` too if that is new."""
    place = folder / DRAFT
    discard(folder)
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        yield place
    except BaseException:
        discard(folder)
        raise


def discard(folder: Path) -> None:
    """Remove the draft in `folder`, and `folder` itself where nothing else is in it."""
    shutil.rmtree(folder / DRAFT, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def settle(place: Path, folder: Path) -> None:
    """Move a draft to its place. While that is under way, meta.json says that the folder is unfinished. The tokenizer's
    files are replaced one by one, so that there always is one. Raises DataError."""
    if place == folder:
        return
    new = {path.relative_to(place) for path in place.rglob("*") if path.is_file()}
    try:
        write_file(folder / "meta.json", b'{"format": 1}\n')
        for name in sorted(new - {Path("meta.json")}):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(place / name, folder / name)
        for pattern in OURS:
            for path in folder.glob(pattern):
                if path.is_file() and path.relative_to(folder) not in new:
                    path.unlink()
        os.replace(place / "meta.json", folder / "meta.json")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}; make room, and start again") from None
    discard(folder)


# ---- what is counted

class Zipped:
    """gzip -9 of a text that comes in parts, of its first ZIPPED bytes."""

    def __init__(self) -> None:
        self.gzip, self.read, self.size = zlib.compressobj(9, wbits=31), 0, 0

    def add(self, text: bytes) -> None:
        """The next part."""
        text = text[: ZIPPED - self.read]
        self.read += len(text)
        self.size += len(self.gzip.compress(text))

    def bits_per_byte(self) -> float:
        """Of what was read; no more can be added."""
        return 8 * (self.size + len(self.gzip.flush())) / self.read


def count(documents: tuple[int, int], sizes: Sequence[int], counts: Sequence[np.ndarray], around: Marks,
          zipped: Zipped) -> Facts:
    """Facts, from the numbers of both sides and how often each id (V,) stands in their streams."""
    said, predicted = counts[0] + 1.0, counts[1].copy()                         # + 1: no token is impossible
    if not predicted.any():
        return Facts(documents[0], sizes[0], int(counts[0].sum()), 0, 0, 0, 0.0, 0.0)
    predicted[around.before[0]] -= 1                                            # the first mark is no target
    return Facts(
        documents[0], sizes[0], int(counts[0].sum()), documents[1], sizes[1], int(counts[1].sum()),
        unigram_loss=float(-predicted @ np.log(said / said.sum()) / predicted.sum()),
        gzip_bits_per_byte=zipped.bits_per_byte(),
    )


# ---- the command

HELP = """Make a folder of token shards from text.

    python -m nanollm.data notes/ --out data/notes --vocab 8192             your files, a tokenizer trained on them
    python -m nanollm.data a.jsonl.gz b.parquet --out data/ab --tokenizer model/    that of a model, to train it on
    python -m nanollm.data posts.csv --text-field body --out data/posts --vocab 8192        a column of a table
    python -m nanollm.data hf:owner/name:config:split --out data/hub --vocab 8192   a data set of the hub, streamed
    python -m nanollm.data --out data/stdlib --vocab 4096                   the source of Python's standard library

INPUT is text, or a folder of such files:
    .jsonl .ndjson .json .csv .tsv .parquet     a document a record, in "text" (or --text-field)
    any other text file                         a document, or several, where <|endoftext|> stands between them
each also as .gz, .bz2, .xz or .zst. What a folder holds and is not read is named. About 5 % of the text is held out, to
measure on: whole documents, and the end of long ones. The shards are files of llm.c; train.py takes the folder as
--data. The same command again, on the same text, leaves it as it is. Memory does not grow with the text.
"""


def run() -> None:
    """The command line."""
    parser = cli.Parser(prog="python -m nanollm.data", description=HELP,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="*", type=Path, metavar="INPUT",
                        help="text, one or several (default: the source of Python's standard library)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--vocab", type=cli.whole(), metavar="N", help="train a byte-level BPE of so many tokens")
    add("--tokenizer", type=Path, metavar="FOLDER", help="take the tokenizer of this model folder")
    parser.add_argument("--text-field", metavar="NAME", help=FIELD_HELP)
    parser.add_argument("--context", type=cli.whole(), default=1024, metavar="T",
                        help="fewer tokens than one context of T are an error (default 1024)")
    parser.add_argument("--shard-tokens", type=cli.whole(), default=100_000_000, metavar="N",
                        help="tokens a file (default 100 million)")
    options = parser.parse_args()
    documents = read(options.input, options.text_field, separators(options.tokenizer))
    prepare(documents, options.out, vocab=options.vocab, tokenizer=options.tokenizer, context=options.context,
            shard_tokens=options.shard_tokens)
    found, meta = facts(options.out), read_meta(options.out)
    assert found is not None, "prepare has written them"
    for note in notes(options.out):
        print(note)
    for name, text, size, tokens in (
            ("to train on", found.train_documents, found.train_bytes, found.train_tokens),
            ("held out", found.held_out_documents, found.held_out_bytes, found.held_out_tokens)):
        print(f"{name}: {text} documents, {size / 1e6:.2f} MB, {tokens / 1e6:.2f} M tokens")
    print(f"{options.out}: {len([*options.out.glob('*.bin')])} shards, a vocabulary of {meta['vocab']}")
    part = "the first 32 MiB of " if found.held_out_bytes > ZIPPED else ""
    print(f"gzip -9 needs {found.gzip_bits_per_byte:.3f} bits per byte for {part}what is held out")


def main() -> None:
    cli.main(run)
