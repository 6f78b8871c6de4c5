"""The tokenizer files of a model folder, read into what text/tokenizer.py runs: of tokenizers, or of sentencepiece.

    file in the folder, first match wins              run by
    tokenizer.json                                    tokenizers
    tokenizer.model   Llama-1/2, Mistral, Gemma       sentencepiece
    tokenizer.model   Llama 3 and 4, GLM-4: ranks     tokenizers' BPE
    *.tiktoken        Qwen-1, gpt-oss …: ranks        tokenizers' BPE
    tiktoken.model    Kimi K2: ranks                  tokenizers' BPE
    vocab.json and merges.txt   GPT-2, Qwen2          tokenizers' BPE
    vocab.json        XGen: GPT-2's, read as ranks    tokenizers' BPE
    tekken.json       Mistral-Nemo: ranks             tokenizers' BPE

The byte alphabet (GPT-2, `encoder.py`) gives each of the 256 bytes a visible character, so that byte strings can be
stored as text: " é" is the bytes 20 C3 A9, written "ĠÃ©".

A file of ranks has in each line a token in base64 and its rank, which is its id. Whose it is, and so the pattern and
the special tokens, its number of ranks tells (tokenizer_ranks.py).

Ranks come without merges, because they imply them (tiktoken, `_educational.py`): of all neighbours, those join first
whose union has the lowest rank. So each way of splitting a token into two tokens is a merge, at the rank of the union.
With ranks a 0, b 1, ab 2, aba 3 the merges are a+b, then ab+a; a+ba is none, because ba has no rank. Splits of one
token tie, and tokenizers must put one first; in 270 000 random trials no text was cut otherwise than by tiktoken.
"""

import base64
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from nanollm.errors import TokenizerError
from nanollm.text.tokenizer_declared import NAMED_TEMPLATES, Declared, need, read_json, token_id, what_is
from nanollm.text.tokenizer_ranks import GPT2, QWEN, TEKKEN_SPECIALS, XGEN_SPECIALS, published

FILES = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "tiktoken.model", "vocab.json", "merges.txt",
         "tekken.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "chat_template.json", f"{NAMED_TEMPLATES}/*.jinja")

VOCAB_CLASSES = {"": GPT2, "GPT2Tokenizer": GPT2, "CodeGenTokenizer": GPT2, "GPTNeoXTokenizer": GPT2,
                 "Qwen2Tokenizer": QWEN}
XGEN = "XgenTokenizer"                                    # GPT-2's vocabulary, and what its Python code adds
XGEN_RUNS = (*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1)))     # ranks after GPT-2's

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_CHAR = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_VISIBLE}))}
BYTE = {char: byte for byte, char in _CHAR.items()}


# ---- the readers

Model = tokenizers.Tokenizer | tuple[SentencePieceProcessor, SentencePieceProcessor]
Backend = TypeVar("Backend")


def _from_json(path: Path, declared: Declared) -> Model:
    return tokenizers.Tokenizer.from_file(str(path))


def _from_model(path: Path, declared: Declared) -> Model:
    """sentencepiece twice: as it is, and without the space that it puts before a text."""
    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\s", data):
        return _from_ranks(path, declared)
    declared.begins = True                                # Llama-1/2 and Mistral, unless add_bos_token says otherwise
    need(data, path, "an empty file", "a sentencepiece model, or ranks in base64")     # sentencepiece accepts it
    # Protobuf merges a message that is given twice; the last value wins: normalizer_spec { add_dummy_prefix: false }
    no_space = b"\x1a\x02\x18\x00"
    model = SentencePieceProcessor(model_proto=data)
    first, names = model.get_piece_size(), declared.in_code.follow
    follow = {first + i: AddedToken(text, special=True) for i, text in enumerate(names)}
    declared.added = follow | declared.added              # what the folder lists wins
    return model, SentencePieceProcessor(model_proto=data + no_space)


def _from_ranks(path: Path, declared: Declared) -> Model:
    data, ranks = path.read_bytes(), {}
    need(data, path, "an empty file", "ranks in base64")
    for number, line in enumerate(data.splitlines(), 1):      # 200 000 of them: a message is made only where one is due
        token, _, rank = line.partition(b" ")
        if not rank.isdigit():
            need(False, path, f"line {number}: {line!r}", "a token in base64, a space, its rank")
        ranks[base64.b64decode(token, validate=True)] = int(rank)
        if len(ranks) < number:
            need(False, path, f"line {number}: {line!r}", "a token that no line above has")
    known = published(len(ranks), path)
    need(declared.added or not known.listed, declared.where, "no added_tokens_decoder",
         f"one, for the special tokens of {declared.kind or known.name}")
    listed = {token.content: id for id, token in declared.added.items()}
    taken = {*listed.values()}                            # where the folder says otherwise, it is right
    own = {text: id for text, id in known.special.items() if id not in taken and text not in listed}
    declared.special |= own.keys()
    declared.begins, declared.ends = known.bos is not None, known.ends
    names = {"bos_token": known.bos, "eos_token": known.eos}
    declared.named = {name: text for name, text in names.items() if text in own | listed} | declared.named
    return _byte_level(_rank_model(ranks, own | listed, path), known.pattern)


def _from_vocab(path: Path, declared: Declared) -> Model:
    kinds = [*VOCAB_CLASSES, XGEN]
    need(declared.kind in kinds, declared.where, f"tokenizer_class {declared.kind!r}", f"one of {kinds}")
    if declared.kind == XGEN:
        return _from_xgen(path, declared)
    need(path.with_name("merges.txt").exists(), path, "no merges.txt beside it", "both")
    model = models.BPE.from_file(str(path), str(path.with_name("merges.txt")))
    if model.token_to_id("<|endoftext|>") is not None:    # GPT-2's only special token, named in no file
        declared.named.setdefault("eos_token", "<|endoftext|>")
        declared.special.add("<|endoftext|>")
    return _byte_level(model, VOCAB_CLASSES[declared.kind], bool(declared.flag("add_prefix_space")))


def _from_xgen(path: Path, declared: Declared) -> Model:
    """GPT-2's ids are ranks already. Runs of spaces and tabs get new ones, also where they had some."""
    end = "<|endoftext|>"
    known = {text: token_id(id, path) for text, id in read_json(path).items()}
    ranks = {bytes(BYTE[char] for char in text): id for text, id in known.items() if text != end}
    first = 1 + max(known.values())
    ranks |= {run.encode(): first + i for i, run in enumerate(XGEN_RUNS)}
    special = {end: known[end]} | {text: first + len(XGEN_RUNS) + i for i, text in enumerate(XGEN_SPECIALS)}
    declared.special |= special.keys()
    declared.named.setdefault("eos_token", end)
    return _byte_level(_rank_model(ranks, special, path), GPT2)


def _from_tekken(path: Path, declared: Declared) -> Model:
    data = read_json(path)
    config = data["config"]
    shift = token_id(config["default_num_special_tokens"], path)         # special tokens come first, ranks follow
    need(shift < 100_000, path, f"default_num_special_tokens = {shift}", "a thousand, or some")
    special = {token["token_str"]: token["rank"] for token in data.get("special_tokens") or
               [{"token_str": text, "rank": rank} for rank, text in enumerate(TEKKEN_SPECIALS)]}
    special |= {f"<SPECIAL_{id}>": id for id in range(len(special), shift)}
    used = data["vocab"][:config["default_vocab_size"] - shift]         # the file lists more tokens than models have
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] + shift for token in used}
    declared.begins = True
    declared.special |= special.keys()
    declared.named = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>") | declared.named
    return _byte_level(_rank_model(ranks, special, path), config["pattern"])


def _rank_model(ranks: dict[bytes, int], special: dict[str, int], path: Path) -> models.BPE:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    need(not missing, path, f"no rank for the bytes {missing}", "a rank for each of the 256 bytes")
    spelled = {token: token.decode("latin-1").translate(_CHAR) for token in ranks}
    merges = [(left, right) for token in sorted(ranks, key=ranks.__getitem__) for i in range(1, len(token))
              if (left := spelled.get(token[:i])) and (right := spelled.get(token[i:]))]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    need(len({*vocab.values()}) == len(ranks) + len(special), path, "an id given twice", "each of them once")
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=True)      # tiktoken, too, looks up whole words first


def _byte_level(model: models.BPE, pattern: str, prefix_space: bool = False) -> tokenizers.Tokenizer:
    """Cut by `pattern`, spelled in the byte alphabet, merged by `model`."""
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    if pattern == QWEN:
        backend.normalizer = normalizers.NFC()
    if pattern == GPT2:                                   # ByteLevel has this pattern, and can put a space first
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    return backend


READERS: dict[str, tuple[Callable[[Path, Declared], Model], str]] = {
    "tokenizer.json": (_from_json, "a file of the tokenizers library"),
    "tokenizer.model": (_from_model, "a sentencepiece model, or ranks in base64"),
    "*.tiktoken": (_from_ranks, "ranks in base64"),
    "tiktoken.model": (_from_ranks, "ranks in base64"),
    "vocab.json": (_from_vocab, "a BPE vocabulary, with merges.txt beside it"),
    "tekken.json": (_from_tekken, "tekken's config and vocab"),
}


@contextlib.contextmanager
def one_error(path: Path, expected: str) -> Iterator[None]:
    """What fails inside the block, in three libraries that have their own kinds of errors, as a TokenizerError.

    A pattern that takes too long ends in a panic in Rust, which is no Exception to Python.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {error}"[:120]
        raise TokenizerError(f"{path}: found {what_is(path.read_bytes())}, expected {expected} ({reason})") from error


def read_model(folder: Path, declared: Declared, run: Callable[[Model, Path], Backend]) -> Backend:
    """`run(model, path)` for the first tokenizer file in the folder, every failure turned into one TokenizerError."""
    for pattern, (reader, expected) in READERS.items():
        for path in sorted(folder.glob(pattern)):
            with one_error(path, expected):
                return run(reader(path, declared), path)
    advice = ""
    if declared.kind == XGEN:
        advice = (f". {XGEN} has no file of its own: "
                  "put the vocab.json of GPT-2 into the folder, on which its code builds")
    raise TokenizerError(f"{folder}: found no tokenizer, expected one of {', '.join(READERS)}{advice}")
