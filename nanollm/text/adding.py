"""Special tokens added to a tokenizer, as a folder that nanollm and transformers read.

    tokens that it has not     get the ids after its last one, in the order in which they are given
    tokens that it has         keep their id, and become special

Where a folder lists its added tokens depends on its age. What it has already is added to:

    tokenizer.json             "added_tokens": [{"id": …, "content": …, "special": true, …}]
    tokenizer_config.json      "added_tokens_decoder": {"32000": {"content": …}}        beside, or without, the first
    added_tokens.json          {"<|im_start|>": 32000}                                  without the two others
    tokenizer_config.json      "additional_special_tokens": ["<|im_start|>"]            in every case: who is special
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanollm.errors import TokenizerError
from nanollm.text.tokenizer import Tokenizer, load

FOLDER = "vocabulary"                   # of a run: the tokenizer with what --add-tokens names
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def folder_of(options: argparse.Namespace) -> Path | None:
    """Where a run's tokenizer is: in the run folder with --add-tokens, else as --tokenizer or --init says."""
    if options.add_tokens:
        return Path(options.out) / FOLDER
    return options.tokenizer or options.init


def with_tokens(source: Path, tokens: Sequence[str], target: Path) -> Tokenizer:
    """Copy the tokenizer of `source` to `target`, in the place of what is there, and add the tokens.

    Raises TokenizerError where the new folder, read again, does not have each of them under its id.
    """
    old = load(source)
    ids = number(old, tokens)
    draft = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        old.copy_files(draft)
        write(draft, ids)
        new = load(draft)
        for text, id in ids.items():
            found = new.special_tokens.get(text), new.encode(text, bos=False, special=True)
            if found != (id, [id]):
                raise TokenizerError(f"{source}: {text!r} cannot be added: it would be read as {found[1]}, "
                                     f"expected [{id}]")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load(target)


def number(old: Tokenizer, tokens: Sequence[str]) -> dict[str, int]:
    """The id of each token: its own where it has one, else the next."""
    ids: dict[str, int] = {}
    for text in tokens:
        if not text or text in ids:
            raise TokenizerError(f"--add-tokens {text!r}: {'given twice' if text else 'empty'}, expected a new text")
        known = known_id(old, text)
        ids[text] = old.vocab_size + sum(id >= old.vocab_size for id in ids.values()) if known is None else known
    return ids


def known_id(old: Tokenizer, text: str) -> int | None:
    """The id of a text that is one token; None for any other."""
    ids = old.encode(text, bos=False, special=True, continues=True)
    return ids[0] if len(ids) == 1 and old.decode(ids, skip_special=False, continues=True) == text else None


def write(folder: Path, ids: dict[str, int]) -> None:
    """Put the tokens into the files of a folder."""
    config = read(folder / "tokenizer_config.json")
    fast = folder / "tokenizer.json"
    if fast.exists():
        data = read(fast)
        kept = [one for one in data.get("added_tokens") or [] if one["content"] not in ids]
        added = [{"id": id, "content": text, **FLAGS} for text, id in ids.items()]
        put(fast, data | {"added_tokens": sorted(kept + added, key=lambda one: one["id"])})
    older = read(folder / "added_tokens.json")
    if older and not fast.exists() and "added_tokens_decoder" not in config:
        put(folder / "added_tokens.json", older | ids)
    elif "added_tokens_decoder" in config or not fast.exists():
        listed = {str(id): {"content": text, **FLAGS} for text, id in ids.items()}
        config["added_tokens_decoder"] = (config.get("added_tokens_decoder") or {}) | listed
    extra = config.get("additional_special_tokens") or []
    known = {one["content"] if isinstance(one, dict) else one for one in extra}
    put(folder / "tokenizer_config.json",
        config | {"additional_special_tokens": [*extra, *(text for text in ids if text not in known)]})


def read(path: Path) -> dict[str, Any]:
    """The object in a file, which `load` has read before; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def put(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
