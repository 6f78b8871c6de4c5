"""The tokenizer files of a model folder, read into what `tokenizer.py` runs: one of tokenizers', or sentencepiece's.

    file in the folder, first match wins              run by
    tokenizer.json                                    tokenizers
    tokenizer.model   Llama-1/2, Mistral, Gemma       sentencepiece
    tokenizer.model   Llama-3, GLM-4: base64 ranks    tokenizers' BPE
    *.tiktoken        Qwen-1: base64 ranks            tokenizers' BPE
    vocab.json and merges.txt   GPT-2, Qwen2          tokenizers' BPE
    tekken.json       Mistral-Nemo: base64 ranks      tokenizers' BPE

The byte alphabet (GPT-2, `encoder.py`) gives each of the 256 bytes a visible character, so that byte strings can be stored
as text: " é" is the bytes 20 C3 A9, written "ĠÃ©".

Ranks come without merges, because they imply them (tiktoken, `_educational.py`): of all neighbours, those join first whose
union has the lowest rank. So each way of splitting a token into two tokens is a merge, at the rank of the union. With ranks
a 0, b 1, ab 2, aba 3 the merges are a+b, then ab+a; a+ba is none, because ba has no rank. Splits of one token tie, and
tokenizers must put one first; in 270 000 random trials no text was cut otherwise than by tiktoken.
"""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from nanollm.errors import TokenizerError

FILES = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.json", "merges.txt", "tekken.json", "added_tokens.json",
         "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# Where text is cut before merging; no merge crosses a cut.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace("{1,3}", "")                        # digits one at a time
VOCAB_CLASSES = {"": GPT2, "GPT2Tokenizer": GPT2, "CodeGenTokenizer": GPT2, "GPTNeoXTokenizer": GPT2, "Qwen2Tokenizer": QWEN}

# Special tokens that a format keeps in Python code rather than in a file. Those of ranks follow the last rank.
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                   "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
                   "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)))
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
TEKKEN_SPECIALS = ("<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
                   "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
                   "[/SYSTEM_PROMPT] [TOOL_CONTENT]").split()

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_CHAR = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_VISIBLE}))}
BYTE = {char: byte for byte, char in _CHAR.items()}


def need(condition: Any, path: Path, found: str, expected: str) -> None:
    if not condition:
        raise TokenizerError(f"{path}: found {found[:160]}, expected {expected}")


def what_is(data: bytes) -> str:
    """Names the usual accidents: most 'invalid JSON' is an error page, or a pointer that git-lfs did not follow."""
    kinds = {b"version https://git-lfs": "a git-lfs pointer", b"<": "an HTML page", b"PK\x03": "a zip archive"}
    named = [kind for mark, kind in kinds.items() if data.lstrip().startswith(mark)]
    return named[0] if named else f"{len(data)} bytes beginning {data[:24]!r}" if data else "an empty file"


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} where there is no such file."""
    data = path.read_bytes() if path.exists() else b"{}"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: found {what_is(data)}, expected JSON ({error!s:.80})") from None
    need(isinstance(value, dict), path, repr(value), "a JSON object")
    return value


def token_id(value: Any, path: Path) -> int:
    """An id from JSON, where keys are strings and values numbers. 2²⁴ is far above every vocabulary in use."""
    digits = str(value) if not isinstance(value, bool) else ""
    fits = digits.isascii() and digits.isdigit() and len(digits) < 9 and int(digits) < 1 << 24
    need(fits, path, repr(value), "a token id")
    return int(digits)


class Declared:
    """What the small JSON files of a folder say about its tokens. Every one of them may be absent."""

    def __init__(self, folder: Path) -> None:
        self.where = folder / "tokenizer_config.json"
        self.config = read_json(folder / "special_tokens_map.json") | read_json(self.where)
        self.kind = str(self.config.get("tokenizer_class") or "").removesuffix("Fast")
        self.begins = False                               # with BOS, where no switch says so: set by a reader below
        self.named = {name: self._text(self.config[name]) for name in NAMES if self.config.get(name) is not None}
        extra = self.config.get("additional_special_tokens") or []
        need(isinstance(extra, list), self.where, repr(extra), "additional_special_tokens to be a list")
        self.special = {*self.named.values(), *map(self._text, extra)}

        self.added: dict[int, AddedToken] = {}
        for text, id in read_json(folder / "added_tokens.json").items():
            self.added[token_id(id, folder / "added_tokens.json")] = AddedToken(text, special=text in self.special)
        listed = self.config.get("added_tokens_decoder") or {}
        need(isinstance(listed, dict), self.where, repr(listed), "added_tokens_decoder to map ids to tokens")
        for id, token in listed.items():
            need(isinstance(token, dict), self.where, repr(token), "a token's object in added_tokens_decoder")
            flags = {flag: token.get(flag) is True for flag in ("special", "lstrip", "rstrip", "normalized", "single_word")}
            self.added[token_id(id, self.where)] = AddedToken(self._text(token), **flags)

        model, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        self.rows = model.get("vocab_size") or 0          # of the embedding; often padded beyond the tokenizer
        need(isinstance(self.rows, int), folder / "config.json", repr(self.rows), "vocab_size to be a number")
        bos = model.get("bos_token_id", generation.get("bos_token_id"))
        self.bos_id = bos if bos is None else token_id(bos, folder / "config.json")
        self.stops = {}                                   # file name → the ids that it says end a generation
        for name, config in (("config.json", model), ("generation_config.json", generation)):
            ids = config.get("eos_token_id")
            if ids is not None:
                self.stops[name] = {token_id(id, folder / name) for id in (ids if isinstance(ids, list) else [ids])}

    def _text(self, token: Any) -> str:                   # "<s>" or {"content": "<s>", "special": true, …}
        text = token.get("content") if isinstance(token, dict) else token
        need(isinstance(text, str) and text, self.where, repr(token), "the text of a token")
        return text

    def flag(self, name: str) -> bool | None:
        """A switch of tokenizer_config.json; None where it is absent."""
        value = self.config.get(name)
        need(value in (None, True, False), self.where, f"{name} = {value!r}", "true or false")
        return value

    def around(self, ids: dict[str, int]) -> tuple[list[int], list[int]]:
        """The prefix and the suffix that `add_bos_token` and `add_eos_token` ask for."""
        bos, eos, add_bos = self.named.get("bos_token"), self.named.get("eos_token"), self.flag("add_bos_token")
        return ([ids[bos]] if bos in ids and (self.begins if add_bos is None else add_bos) else [],
                [ids[eos]] if eos in ids and self.flag("add_eos_token") else [])


# ---- the readers

Model = tokenizers.Tokenizer | tuple[SentencePieceProcessor, SentencePieceProcessor]


def _from_json(path: Path, declared: Declared) -> Model:
    return tokenizers.Tokenizer.from_file(str(path))


def _from_model(path: Path, declared: Declared) -> Model:
    """sentencepiece twice: as it is, and without the space that it puts before a text."""
    data = path.read_bytes()
    declared.begins = True                                # Llama-1/2/3 and Mistral, unless add_bos_token says otherwise
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\s", data):
        return _from_ranks(path, declared)
    need(data, path, "an empty file", "a sentencepiece model, or ranks in base64")     # sentencepiece accepts it
    # Protobuf merges a message that is given twice, and the last value wins: normalizer_spec { add_dummy_prefix: false }
    no_space = b"\x1a\x02\x18\x00"
    return SentencePieceProcessor(model_proto=data), SentencePieceProcessor(model_proto=data + no_space)


def _from_ranks(path: Path, declared: Declared) -> Model:
    data, ranks = path.read_bytes(), {}
    need(data, path, "an empty file", "ranks in base64")
    for number, line in enumerate(data.splitlines(), 1):
        token, _, rank = line.partition(b" ")
        need(rank.isdigit(), path, f"line {number}: {line!r}", "a token in base64, a space, its rank")
        ranks[base64.b64decode(token, validate=True)] = int(rank)
        need(len(ranks) == number, path, f"line {number}: {line!r}", "a token that no line above has")
    qwen = path.suffix == ".tiktoken"
    names, first = QWEN_SPECIALS if qwen else LLAMA3_SPECIALS, 1 + max(ranks.values())
    special = {token.content: id for id, token in declared.added.items()} or {t: first + i for i, t in enumerate(names)}
    if not declared.added:
        declared.special |= special.keys()
        own = {"eos_token": names[0]} if qwen else {"bos_token": names[0], "eos_token": names[1]}
        declared.named = own | declared.named
    return _byte_level(_rank_model(ranks, special, path), QWEN if qwen else LLAMA3)


def _from_vocab(path: Path, declared: Declared) -> Model:
    need(declared.kind in VOCAB_CLASSES, declared.where, f"tokenizer_class {declared.kind!r}", f"one of {[*VOCAB_CLASSES]}")
    need(path.with_name("merges.txt").exists(), path, "no merges.txt beside it", "both")
    model = models.BPE.from_file(str(path), str(path.with_name("merges.txt")))
    if model.token_to_id("<|endoftext|>") is not None:    # GPT-2's only special token, named in no file
        declared.named.setdefault("eos_token", "<|endoftext|>")
        declared.special.add("<|endoftext|>")
    return _byte_level(model, VOCAB_CLASSES[declared.kind], bool(declared.flag("add_prefix_space")))


def _from_tekken(path: Path, declared: Declared) -> Model:
    data = read_json(path)
    config = data["config"]
    shift = config["default_num_special_tokens"]          # special tokens come first, ranks follow
    special = {token["token_str"]: token["rank"] for token in data.get("special_tokens") or
               [{"token_str": text, "rank": rank} for rank, text in enumerate(TEKKEN_SPECIALS)]}
    special |= {f"<SPECIAL_{id}>": id for id in range(len(special), shift)}
    used = data["vocab"][:config["default_vocab_size"] - shift]         # the file lists more tokens than the models have
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] + shift for token in used}
    declared.begins = True
    declared.special |= special.keys()
    declared.named = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>") | declared.named
    return _byte_level(_rank_model(ranks, special, path), config["pattern"])


def _rank_model(ranks: dict[bytes, int], special: dict[str, int], path: Path) -> models.BPE:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    need(not missing, path, f"no rank for the bytes {missing}", "a rank for each of the 256 bytes")
    spelled = {token: "".join(map(_CHAR.__getitem__, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(spelled[left], spelled[right]) for left, right in splits if left in ranks and right in ranks]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    need(len({*vocab.values()}) == len(ranks) + len(special), path, "an id given twice", "each of them once")
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=True)      # tiktoken, too, looks up whole words first


def _byte_level(model: models.BPE, pattern: str, prefix_space: bool = False) -> tokenizers.Tokenizer:
    """Cut by `pattern`, spelled in the byte alphabet, merged by `model`."""
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    if pattern == QWEN:
        backend.normalizer = normalizers.NFC()
    if pattern == GPT2:                                   # ByteLevel has this pattern built in, and can put a space first
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
    "vocab.json": (_from_vocab, "a BPE vocabulary, with merges.txt beside it"),
    "tekken.json": (_from_tekken, "tekken's config and vocab"),
}


def read_model(folder: Path, declared: Declared, run: Callable[[Model, Path], Any]) -> Any:
    """`run(model, path)` for the first tokenizer file in the folder, every failure turned into one TokenizerError."""
    for pattern, (reader, expected) in READERS.items():
        for path in sorted(folder.glob(pattern)):
            try:
                return run(reader(path, declared), path)
            except TokenizerError:
                raise
            except Exception as error:                    # from three libraries, each with its own kinds
                reason = f"{type(error).__name__}: {error}"[:120]
                found = what_is(path.read_bytes())
                raise TokenizerError(f"{path}: found {found}, expected {expected} ({reason})") from error
    raise TokenizerError(f"{folder}: found no tokenizer, expected one of {', '.join(READERS)}")
