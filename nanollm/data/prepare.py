"""From text to shards: a tokenizer, what it makes of the documents, and the folder that `stream.py` reads.

    notes/  a.jsonl …                        documents: a file each, or a line of a .jsonl
         │  split                            5 % of the text is held out, chosen by a hash of the documents' names
         │  train a BPE, or take a model's
         ▼  encode                           <|endoftext|> t t t <|endoftext|> t t … <|endoftext|>
    train-00000.bin …  held_out-00000.bin …  the two streams, in the format of `shards.py`
    tokenizer.json …                         what nanollm.text.tokenizer.load reads
    meta.json                                what was counted on the way; whole only when all the others are

Nothing here is on the path of a training step.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import nanollm.text.tokenizer
from nanollm import cli
from nanollm.data.documents import Document, read, split
from nanollm.data.shards import LIMIT, id_dtype, read_meta, write_file, write_shard
from nanollm.data.stream import open_folder
from nanollm.errors import DataError, NanollmError
from nanollm.text.tokenizer_files import FILES

END = "<|endoftext|>"           # before each document, and so after each but the last
WORDS = r"\w+ ?|[^\w\s]+ ?|\s+"   # where tokens may end. A word takes the space behind it: a prompt may end in "def "
# what prepare writes before meta.json
OURS = (*FILES, "generation_config.json", "train-*.bin", "held_out-*.bin", "*.draft")

# A chat in plain words. ": " is a piece of its own wherever it stands (WORDS), so the ids of a prompt and of its
# answer, one after the other, are the ids of both together; and an answer ends in the mark, as a document does.
CHAT = r"""{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ message['content'] + '\n' }}
    {%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}
    {%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}
    {%- else %}{{ raise_exception('found the role ' + message['role'] + ', expected system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}
"""


# ---- tokens

def train_tokenizer(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (Radford et al. 2019, §2.2): any text can be written, and what was written can be read back."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet,
                                  show_progress=sys.stderr.isatty())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """The files that nanollm.text.tokenizer.load and transformers.AutoTokenizer read. The mark is BOS and EOS both."""
    end = tokenizer.token_to_id(END)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
              "clean_up_tokenization_spaces": False}
    generation = {"bos_token_id": end, "eos_token_id": end}
    for name, value in (("tokenizer_config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT)


def digest(tokenizer: nanollm.text.tokenizer.Tokenizer) -> str:
    """sha256, in hex, of the file that the tokenizer was read from: it tells which tokenizer made a shard."""
    return hashlib.sha256(tokenizer.files[0].read_bytes()).hexdigest()


def encode(ids: Callable[[list[str]], list[list[int]]], documents: Sequence[Document], end: int, dtype: np.dtype,
           label: str) -> Iterator[np.ndarray]:
    """The stream drawn at the head of stream.py, a document at a time, with a mark at its very end: (n,) of dtype."""
    with tqdm(total=len(documents), desc=label, unit="doc", leave=False) as bar:
        for at in range(0, len(documents), 64):
            for found in ids([document.text for document in documents[at : at + 64]]):
                yield np.array([end, *found], dtype)
                bar.update()
    yield np.array([end], dtype)


def pieces(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same stream in pieces of `size` tokens; the last may be shorter."""
    held, count = [], 0
    for part in parts:
        held.append(part)
        count += len(part)
        while count >= size:
            whole = np.concatenate(held)
            yield whole[:size]
            held, count = [whole[size:]], count - size
    if count:
        yield np.concatenate(held)


# ---- the folder

@dataclass(frozen=True)
class Facts:
    """What was counted while the text was at hand. Bytes are those of the text in UTF-8."""
    train_documents: int
    train_bytes: int
    train_tokens: int
    held_out_documents: int
    held_out_bytes: int
    held_out_tokens: int
    unigram_loss: float         # nats per held-out token, from the frequencies of the training tokens
    gzip_bits_per_byte: float   # of the held-out text compressed by itself

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


def prepare(documents: Sequence[Document], folder: Path, *, vocab: int | None, tokenizer: Path | None, context: int,
            shard_tokens: int = 100_000_000) -> None:
    """Make a data folder: split the documents, train a BPE of `vocab` tokens or take a model's `tokenizer`, encode.

    A folder made from the same documents and the same tokenizer is left as it is. Raises DataError, with nothing
    written, where the text does not fill one context, and where the folder holds something else.
    """
    given = check(folder, vocab, tokenizer, context, shard_tokens)
    fingerprint = zlib.crc32((f"{vocab} {WORDS}" if given is None else digest(given)).encode())
    for document in documents:
        fingerprint = zlib.crc32(f"{document.name}\0{document.text}\0".encode(errors="replace"), fingerprint)
    if is_made(folder, fingerprint):
        open_folder(folder, context)                    # raises where it does not fill one
        return
    parts = dict(zip(("train", "held_out"), split(documents), strict=True))
    if not parts["held_out"]:
        characters = sum(len(d.text) for d in documents)
        raise DataError(f"{len(documents)} document(s) of {characters} characters: "
                        "too little text to hold out a part of it")
    with tempfile.TemporaryDirectory() as draft:
        if given is None:
            assert vocab is not None, "check wants a vocab or a tokenizer"
            trained = train_tokenizer([document.text for document in parts["train"]], vocab)
            trained.encode_special_tokens = True        # a text that spells the mark does not become one
            save_tokenizer(trained, Path(draft))
        used = given or nanollm.text.tokenizer.load(draft)
        sources = [*used.files, used.folder / "generation_config.json"]
        files = {path.relative_to(used.folder): path.read_bytes() for path in sources if path.exists()}
        made_with, end = digest(used), used.bos_id if used.eos_id is None else used.eos_id
    if end is None:
        raise DataError(f"{tokenizer}: found no eos_token and no bos_token, expected one, to stand between documents")

    def ids(texts: list[str]) -> list[list[int]]:
        if given is None:
            return [encoding.ids for encoding in trained.encode_batch_fast(texts)]       # on all cores
        return [given.encode(text, bos=False) for text in texts]

    counts = {name: np.zeros(used.vocab_size, np.int64) for name in parts}
    dtype = id_dtype(used.vocab_size)
    streams = {name: pieces(encode(ids, part, end, dtype, f"tokens, {name}"), shard_tokens)
               for name, part in parts.items()}
    first = next(streams["train"])
    if len(first) <= context:
        raise DataError(f"the text to train on has {len(first)} tokens, which do not fill one context of {context}; "
                        "give more, or a smaller --context")
    streams["train"] = chain([first], streams["train"])
    with building(folder):
        for name, stream in streams.items():
            for number, piece in enumerate(stream):
                write_shard(folder / f"{name}-{number:05}.bin", piece, end=end, digest=made_with)
                counts[name] += np.bincount(piece, minlength=used.vocab_size)
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            write_file(folder / path, content)
        found = asdict(count(parts, counts, end))
        meta = {"format": 1, "fingerprint": fingerprint, "vocab": used.vocab_size, "tokenizer_sha256": made_with,
                "facts": found}
        write_file(folder / "meta.json", json.dumps(meta, indent=2).encode() + b"\n")


def check(folder: Path, vocab: int | None, tokenizer: Path | None, context: int,
          shard_tokens: int) -> nanollm.text.tokenizer.Tokenizer | None:
    """The tokenizer that is given, if one is. Raises DataError for what `prepare` cannot do, before any work."""
    if (vocab is None) == (tokenizer is None):
        raise DataError(f"vocab {vocab}, tokenizer {tokenizer}: expected one of the two")
    if vocab is not None and vocab < 257:
        raise DataError(f"vocab {vocab}: expected 257 or more: the 256 bytes, and the mark between documents")
    if not 0 < context < shard_tokens < LIMIT:
        raise DataError(f"context {context}, tokens a shard {shard_tokens}: "
                        f"expected 0 < context < tokens a shard < {LIMIT}, which is llm.c's limit")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and read_meta(folder).get("format") is None):
        raise DataError(f"{folder}: not empty, and not made by nanollm.data; name another folder")
    if tokenizer is not None and folder.resolve() == tokenizer.resolve():
        raise DataError(f"{folder}: both the tokenizer's folder and the one to make; name another folder")
    return None if tokenizer is None else nanollm.text.tokenizer.load(tokenizer)


def is_made(folder: Path, fingerprint: int) -> bool:
    """Whether the folder was made from that, and every byte of it is still there."""
    meta = read_meta(folder)
    if meta.get("fingerprint") != fingerprint:
        return False
    try:
        for source in filter(None, open_folder(folder, 1)):
            source.verify(meta["vocab"])
        return digest(nanollm.text.tokenizer.load(folder)) == source.digest
    except NanollmError:
        return False                                    # a shard or a file of the tokenizer is gone, or damaged


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """Until the block writes meta.json, the folder says that it is unfinished. An error removes all that is ours."""
    def clear() -> None:
        for path in chain.from_iterable(folder.glob(pattern) for pattern in OURS):
            path.unlink()

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
    write_file(folder / "meta.json", b'{"format": 1}\n')
    try:
        clear()
        yield
    except BaseException:
        clear()
        (folder / "meta.json").unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
        raise


def count(parts: dict[str, list[Document]], counts: dict[str, np.ndarray], end: int) -> Facts:
    """Facts from the documents of both parts and how often each id (V,) stands in their streams."""
    text = "".join(document.text for document in parts["held_out"]).encode()
    said, predicted = counts["train"] + 1.0, counts["held_out"].copy()          # + 1: no token is impossible
    predicted[end] -= 1                                                         # the first mark is no target
    return Facts(
        len(parts["train"]), sum(len(document.text.encode()) for document in parts["train"]),
        int(counts["train"].sum()),
        len(parts["held_out"]), len(text), int(counts["held_out"].sum()),
        unigram_loss=float(-predicted @ np.log(said / said.sum()) / predicted.sum()),
        gzip_bits_per_byte=8 * len(gzip.compress(text, 9)) / len(text),
    )


# ---- the command

HELP = """Make a folder of token shards from text.

    python -m nanollm.data notes/ --out data/notes --vocab 8192             your files, a tokenizer trained on them
    python -m nanollm.data a.jsonl b.jsonl --out data/ab --tokenizer model/ the tokenizer of a model, to train that on
    python -m nanollm.data --out data/stdlib --vocab 4096                   the source of Python's standard library

INPUT is a text file, a .jsonl with a document a line in "text", or a folder of them. A part of the text is held out, to
measure on. The shards are files of llm.c. The same command again, on the same text, leaves the folder as it is.
"""


def run() -> None:
    """The command line."""
    parser = cli.Parser(prog="python -m nanollm.data", description=HELP,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="*", type=Path, metavar="INPUT",
                        help="text (default: the source of Python's standard library)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--vocab", type=cli.whole(), metavar="N", help="train a byte-level BPE of so many tokens")
    add("--tokenizer", type=Path, metavar="FOLDER", help="take the tokenizer of this model folder")
    parser.add_argument("--context", type=cli.whole(), default=1024, metavar="T",
                        help="fewer tokens than one context of T are an error (default 1024)")
    parser.add_argument("--shard-tokens", type=cli.whole(), default=100_000_000, metavar="N",
                        help="tokens a file (default 100 million)")
    options = parser.parse_args()
    if len(options.input) > 1:                          # names are told apart, because the split depends on them
        documents = [Document(f"{source.as_posix()}/{name}", text)
                     for source in options.input for name, text in read(source)]
    else:
        documents = read(options.input[0] if options.input else None)
    prepare(documents, options.out, vocab=options.vocab, tokenizer=options.tokenizer, context=options.context,
            shard_tokens=options.shard_tokens)
    found, meta = facts(options.out), read_meta(options.out)
    assert found is not None, "prepare has written them"
    for name, text, size, tokens in (
            ("to train on", found.train_documents, found.train_bytes, found.train_tokens),
            ("held out", found.held_out_documents, found.held_out_bytes, found.held_out_tokens)):
        print(f"{name}: {text} documents, {size / 1e6:.2f} MB, {tokens / 1e6:.2f} M tokens")
    print(f"{options.out}: {len([*options.out.glob('*.bin')])} shards, a vocabulary of {meta['vocab']}")
    print(f"gzip -9 needs {found.gzip_bits_per_byte:.3f} bits per byte for what is held out")


def main() -> None:
    cli.main(run)
