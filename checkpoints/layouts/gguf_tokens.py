r"""The tokenizer inside a GGUF, as the files that a Hugging Face folder has.

    tokenizer.ggml.       in tokenizer.json
    model                 "gpt2": byte-level BPE.     "llama": sentencepiece, by scores
    tokens                the vocabulary; its place in the list is the id
    token_type            1 normal, 2 unknown, 3 control (special), 4 user-defined (matched first), 5 unused, 6 byte
    merges                "gpt2" only: "Ġ t", the likelier first
    scores                "llama" only: of all neighbours, those join first whose union has the highest score
    pre                   "gpt2" only: the name of a pre-tokenizer (gguf_pretokenizers.py)
    add_bos_token …       what is put around each text
    tokenizer.chat_template, and named ones           to tokenizer_config.json

sentencepiece merges by the score of the union, BPE by the place of a pair in a list: so the list is all pairs whose
union is a token, the highest score first. User-defined tokens are cut out of the text before, as both do.

Where tokenizer.ggml.pre is missing (before May 2024) llama.cpp takes a pattern that few models were trained with; it is
taken here too, and a warning says so.

Source: llama.cpp as llama-cpp-python 0.3.36 carries it: src/llama-vocab.cpp, conversion/base.py.
"""

import contextlib
import json
import reprlib
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints.layouts.gguf_pretokenizers import PRE, Step
from checkpoints.storage import gguf, writing
from nanollm.errors import TokenizerError
from nanollm.text import tokenizer
from nanollm.text.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
FOLDER = "nanollm-tokenizer-"                    # begins the name of each temporary folder
YOUNG = 60                                       # seconds that a folder may be there before it is locked
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_TOKEN = range(1, 7)

# What ends a turn or a text in one model or another, where it is a control token: llama.cpp stops at each of them.
ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] "
    "[EOS] <|end_of_text|> <end_of_utterance> <eos> <｜end▁of▁sentence｜>"
).split()
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
         "sep_token": "seperator", "mask_token": "mask"}         # the format spells it so


# ---- out of the file

def load(path: Path) -> Tokenizer | None:
    """The tokenizer of a GGUF, or None if there is none inside. Its files lie in a temporary folder while it lives:
    training copies them beside its models.

    Raises TokenizerError."""
    remove_left_over()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=FOLDER)))
        with contextlib.suppress(OSError):       # where folders cannot be locked, none is taken away either
            stack.enter_context(writing.locked(folder))
        if not write(path, folder):
            return None
        found = tokenizer.load(folder)
        kept = stack.pop_all()
    found.template_files = dict.fromkeys(found.chat_templates, path)     # for errors: not the folder that will be gone
    weakref.finalize(found, kept.close)
    return found


def remove_left_over() -> None:
    """Take away the temporary folders of processes that were killed: those that no process has locked."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError), writing.locked(left):
            if time.time() - left.stat().st_mtime > YOUNG:
                shutil.rmtree(left)


def write(path: Path, folder: Path) -> bool:
    """Write the tokenizer of a GGUF into a folder, as files that transformers loads. False if there is none inside.

    Raises TokenizerError for one that is damaged, or of a kind that is not read."""
    found = files(path)
    for name, value in found.items():
        indent = None if name == "tokenizer.json" else 2
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8")
    return bool(found)


def files(path: Path) -> dict[str, Any]:
    """File name → what is in it, of the tokenizer in a GGUF. {} if there is none. Raises TokenizerError."""
    metadata = gguf.read_header(path).metadata
    kind = metadata.get(f"{PREFIX}model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"{path}: {PREFIX}model is {reprlib.repr(kind)}; expected gpt2 or llama. "
                             "Put the model's own tokenizer files into a folder, and convert the weights beside them")
    v = Vocabulary(path, metadata)
    tokenizer_json = v.sentencepiece() if kind == "llama" else v.byte_level()
    return {"tokenizer.json": tokenizer_json, "tokenizer_config.json": v.config(),
            "generation_config.json": v.generation()}


def ids(metadata: dict[str, Any]) -> dict[str, int]:
    """bos_token_id, eos_token_id, pad_token_id, as a config.json says them."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    said = {key: metadata.get(f"{PREFIX}{name}_token_id") for key, name in keys.items()}
    return {key: id for key, id in said.items() if type(id) is int}


class Vocabulary:
    """The tokens of a GGUF, checked."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.tokens: list[str] = self.array("tokens", str)
        self.types: list[int] = self.array("token_type", int, len(self.tokens), NORMAL)
        # rows that pad the embedding are no tokens
        kept = [(token, id) for id, token in enumerate(self.tokens)
                if self.types[id] != UNUSED or token != f"[PAD{id}]"]
        self.vocab = dict(kept)
        if len(self.vocab) < len(kept):
            twice = next(token for token, id in kept if self.vocab[token] != id)
            raise self.error("tokens", f"{reprlib.repr(twice)} twice", "each text once")
        named = {name: metadata.get(f"{PREFIX}{short}_token_id") for name, short in NAMES.items()}
        self.named = {name: self.tokens[id] for name, id in named.items()
                      if type(id) is int and id < len(self.tokens)}

    def error(self, key: str, found: str, expected: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {PREFIX}{key} has {found}; expected {expected}")

    def array(self, key: str, kind: type, count: int | None = None, missing: Any = None) -> list[Any]:
        """The values of an array, `count` of them. Raises TokenizerError."""
        values = self.metadata.get(f"{PREFIX}{key}")
        if values is None and missing is not None and count is not None:
            return [missing] * count
        if not isinstance(values, (list, gguf.LazyArray)):
            raise self.error(key, reprlib.repr(values), "a list")
        found = gguf.read_list(self.path, values)
        if not all(isinstance(one, kind) for one in found[:1]):
            raise self.error(key, reprlib.repr(found[0]), f"a list of {kind.__name__}")
        if count is not None and len(found) < count:
            raise self.error(key, f"{len(found)} entries", f"{count}, one a token")
        return found

    def flag(self, key: str, missing: bool) -> bool:
        return bool(self.metadata.get(f"{PREFIX}{key}", missing))

    # ---- the two kinds

    def byte_level(self) -> dict[str, Any]:
        """tokenizer.json of a byte-level BPE. Raises TokenizerError for a pre-tokenizer that PRE does not have."""
        name = self.metadata.get(f"{PREFIX}pre")
        if name is None:
            warnings.warn(f"{self.path}: no {PREFIX}pre, so text is cut as llama.cpp does by default, which may not be "
                          "how the model was trained; a newer conversion of it says the pre-tokenizer", stacklevel=2)
        pre = PRE.get(name or "default")
        if pre is None:
            known = ", ".join(PRE)
            raise TokenizerError(f"{self.path}: {PREFIX}pre is {reprlib.repr(name)}; known are {known}. Put the "
                                 "model's own tokenizer.json into a folder, and convert the weights beside it")
        merges = [tuple(pair) if len(pair := merge.rsplit(" ", 1)) == 2 else self._no_pair(merge)
                  for merge in self.array("merges", str)]
        lost = next((pair for pair in merges if not {*pair, "".join(pair)} <= self.vocab.keys()), None)
        if lost:
            raise self.error("merges", f"{' '.join(lost)!r}, of which a part or the union is no token", "tokens")
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                 "ignore_merges": pre.ignore_merges, "vocab": self.vocab, "merges": merges}
        decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        return self._json(model, {"type": "NFC"} if pre.nfc else None,
                          {"type": "Sequence", "pretokenizers": list(pre.steps)}, decoder, pre.bos)

    def _no_pair(self, merge: str) -> tuple[str, str]:
        raise self.error("merges", repr(merge), "two tokens with a space between them")

    def sentencepiece(self) -> dict[str, Any]:
        """tokenizer.json of a sentencepiece BPE: a space is ▁, what has no token is spelled in bytes <0x41>."""
        scores = self.array("scores", (int, float), len(self.tokens))  # type: ignore[arg-type]
        prefix = self.flag("add_space_prefix", True)
        steps = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"}]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        model = {"type": "BPE", "dropout": None, "unk_token": self.named.get("unk_token"),
                 "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                 "byte_fallback": BYTE_TOKEN in self.types, "ignore_merges": False, "vocab": self.vocab,
                 "merges": list(self._merges(scores))}
        return self._json(model, {"type": "Sequence", "normalizers": [*steps, replace]}, None,
                          {"type": "Sequence", "decoders": decoders}, bos=True)

    def _merges(self, scores: list[float]) -> Iterator[tuple[str, str]]:
        """Pairs of tokens whose union is one, the likelier union first."""
        pieces = {token for token, id in self.vocab.items() if self.types[id] == NORMAL}
        for token in sorted(pieces, key=lambda token: (-scores[self.vocab[token]], self.vocab[token])):
            for at in range(1, len(token)):
                if token[:at] in pieces and token[at:] in pieces:
                    yield token[:at], token[at:]

    def _json(self, model: Step, normalizer: Step | None, pre_tokenizer: Step | None, decoder: Step, bos: bool) -> Step:
        """The whole tokenizer.json. bos: what a missing add_bos_token means."""
        strips = "phi-3" in str(self.metadata.get("general.name", "")).lower()      # its tokens take the space after
        keep = ("<unk>", "<s>", "<|endoftext|>")
        added = [
            {"id": id, "content": token, "single_word": False, "lstrip": False,
             "rstrip": strips and kind == CONTROL and token not in keep, "normalized": False,
             "special": kind != USER_DEFINED}
            for id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=False))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
        around: list[Step] = [{"Sequence": {"id": "A", "type_id": 0}}]
        used = {}
        for name, first, put in (("bos_token", True, self.flag("add_bos_token", bos)),
                                 ("eos_token", False, self.flag("add_eos_token", False))):
            if put and name in self.named:
                text = self.named[name]
                one = {"SpecialToken": {"id": text, "type_id": 0}}
                around = [one, *around] if first else [*around, one]
                used[text] = {"id": text, "ids": [self.vocab[text]], "tokens": [text]}
        pair = [*around, {"Sequence": {"id": "B", "type_id": 1}}]
        post = {"type": "TemplateProcessing", "single": around, "pair": pair, "special_tokens": used} if used else None
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
                "pre_tokenizer": pre_tokenizer, "post_processor": post, "decoder": decoder, "model": model}

    # ---- the small files

    def config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        own = "tokenizer.chat_template"
        named = {"default": self.metadata.get(own)} | {
            key.removeprefix(f"{own}."): text for key, text in self.metadata.items() if key.startswith(f"{own}.")}
        templates = {name: text for name, text in named.items() if isinstance(text, str)}
        said: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                                **self.named}
        if templates.keys() == {"default"}:
            said["chat_template"] = templates["default"]
        elif templates:
            said["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        return said

    def generation(self) -> dict[str, Any]:
        """generation_config.json: what ends a text, and what begins one."""
        said = ids(self.metadata)
        ends = {self.metadata.get(f"{PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")}
        harmony = {"<|return|>", "<|call|>"} <= self.vocab.keys()              # where <|end|> ends a message only
        ends |= {self.vocab[text] for text in ENDS if self.types[self.vocab.get(text, 0)] == CONTROL
                 and text in self.vocab and not (harmony and text == "<|end|>")}
        stops = sorted(id for id in ends if type(id) is int and id < len(self.tokens))
        return said | ({"eos_token_id": stops} if stops else {})
