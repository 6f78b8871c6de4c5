"""A tokenizer as the keys of a GGUF: gguf_tokens.py, the other way.

    byte-level BPE      tokens, types, merges, and the name of the pre-tokenizer that cuts as this one does
    sentencepiece       tokens, types, scores. A tokenizer.json with ▁ and bytes <0x41> has merges in place of scores:
                        a merged token's score is then minus the place of its merge, which gives the same order

Rows of the embedding without a token become [PAD7] …, unused; tokens without a row are left out, with a warning. What
a GGUF cannot say is refused, but for flags of added tokens, of which a warning is given.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken

from checkpoints.layouts.gguf_pretokenizers import PRE, Step
from checkpoints.layouts.gguf_tokens import BYTE_TOKEN, CONTROL, NAMES, NORMAL, PREFIX, UNKNOWN, UNUSED, USER_DEFINED
from nanollm.errors import TokenizerError
from nanollm.text.tokenizer import SentencePiece, Tokenizer, Tokenizers
from nanollm.text.tokenizer_ranks import GPT2

Keys = dict[str, Any]


def keys_of(tokenizer: Tokenizer, rows: int) -> Keys:
    """The keys, for an embedding with so many rows. Raises TokenizerError."""
    backend = tokenizer.backend
    where = str(tokenizer.files[0])
    keys: Keys
    tokens: dict[int, tuple[str, int, float]]    # id → text, type, score
    if isinstance(backend, SentencePiece):
        keys, tokens = {f"{PREFIX}model": "llama", f"{PREFIX}pre": "default"}, dict(from_sentencepiece(backend))
    else:
        keys, tokens = from_tokenizer_json(backend, where)
    if beyond := [text for id, (text, _, _) in sorted(tokens.items()) if id >= rows]:
        warnings.warn(f"{where}: left out of the GGUF, as the model has {rows} rows and none for them: "
                      f"{', '.join(map(repr, beyond[:5]))}{' …' if len(beyond) > 5 else ''}", stacklevel=2)
    for id in range(rows):
        tokens.setdefault(id, (f"[PAD{id}]", UNUSED, -10_000.0))
    texts, types, scores = (list(each) for each in zip(*(tokens[id] for id in range(rows)), strict=True))
    keys |= {f"{PREFIX}tokens": texts, f"{PREFIX}token_type": types}
    if keys[f"{PREFIX}model"] == "llama":
        keys |= {f"{PREFIX}scores": scores, f"{PREFIX}add_space_prefix": bool(backend.strips)}
    return keys | bos_and_eos(tokenizer, where) | special_ids_and_templates(tokenizer)


def warn_of_flags(added: Mapping[int, AddedToken], where: str) -> None:
    """A GGUF cannot say that a token takes the spaces beside it, or stands for a whole word only."""
    flagged = [token.content for _, token in sorted(added.items()) if token.lstrip or token.rstrip or token.single_word]
    if flagged:
        warnings.warn(f"{where}: a GGUF cannot say lstrip, rstrip and single_word of {', '.join(flagged[:5])}"
                      f"{' …' if len(flagged) > 5 else ''}: texts with spaces beside them get other ids there",
                      stacklevel=2)


def special_ids_and_templates(tokenizer: Tokenizer) -> Keys:
    """Ids of the named tokens (BOS, EOS …), and the chat templates."""
    ids = {short: tokenizer.special_tokens.get(tokenizer.named_tokens.get(name, "")) for name, short in NAMES.items()}
    keys: Keys = {f"{PREFIX}{short}_token_id": id for short, id in ids.items() if id is not None}
    others = [id for id in tokenizer.stop_ids if id != tokenizer.eos_id]
    if tokenizer.eos_id is None and others:
        keys[f"{PREFIX}eos_token_id"] = others.pop(0)
    if others:
        keys[f"{PREFIX}eot_token_id"] = others[-1]
    templates = tokenizer.chat_templates
    if more := [name for name in templates if name != "default"]:
        keys["tokenizer.chat_templates"] = more
        keys |= {f"tokenizer.chat_template.{name}": templates[name] for name in more}
    return keys | ({"tokenizer.chat_template": templates["default"]} if "default" in templates else {})


def bos_and_eos(tokenizer: Tokenizer, where: str) -> Keys:
    """Whether BOS and EOS are put around a text. Raises TokenizerError where something else is."""
    before, after = list(tokenizer.prefix), list(tokenizer.backend.suffix)
    for ids, one, name in ((before, tokenizer.bos_id, "BOS"), (after, tokenizer.eos_id, "EOS")):
        if ids not in ([], [one]):
            raise TokenizerError(f"{where}: puts the tokens {ids} around a text; a GGUF can only say {name} ({one})")
    return {f"{PREFIX}add_bos_token": bool(before), f"{PREFIX}add_eos_token": bool(after)}


def from_sentencepiece(backend: SentencePiece) -> Iterator[tuple[int, tuple[str, int, float]]]:
    """id → text, type, score: of a sentencepiece model, and of the tokens that were added to it."""
    model = backend.model
    for id in range(backend.pieces):
        types = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED),
                 (model.is_byte, BYTE_TOKEN))
        kind = next((kind for known, kind in types if known(id)), NORMAL)
        yield id, (model.id_to_piece(id), kind, model.get_score(id))
    for id, text in backend.added.items():
        if id >= backend.pieces or model.id_to_piece(id) != text:
            yield id, (text, CONTROL if text in backend.special else USER_DEFINED, -1000.0)


def from_tokenizer_json(backend: Tokenizers, where: str) -> tuple[Keys, dict[int, tuple[str, int, float]]]:
    """Keys, and id → text, type, score, of a tokenizer of the tokenizers library. Raises TokenizerError."""
    warn_of_flags(backend.backend.get_added_tokens_decoder(), where)
    spec = json.loads(backend.backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or not (backend.byte_level or backend.byte_fallback):
        raise TokenizerError(f"{where}: a {model['type']} tokenizer has no GGUF; expected a byte-level BPE, or one of "
                             "sentencepiece's with <0x41> for bytes")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    place = {merge.replace(" ", "", 1): float(-at) for at, merge in reversed([*enumerate(merges)])}
    tokens = {}
    for text, id in model["vocab"].items():
        byte = not backend.byte_level and len(text) == 6 and text.startswith("<0x")
        kind = BYTE_TOKEN if byte else UNKNOWN if text == model["unk_token"] else NORMAL
        tokens[id] = text, kind, place.get(text, float(-len(merges)))
    for id, text in backend.added.items():
        kind = CONTROL if text in backend.special else USER_DEFINED
        tokens[id] = text, UNKNOWN if text == model["unk_token"] else kind, -1000.0
    if not backend.byte_level:
        return {f"{PREFIX}model": "llama", f"{PREFIX}pre": "default"}, tokens
    return {f"{PREFIX}model": "gpt2", f"{PREFIX}pre": pre_of(spec, where), f"{PREFIX}merges": merges}, tokens


def pre_of(spec: Step, where: str) -> str:
    """The name of llama.cpp's pre-tokenizer that cuts as this one does. Raises TokenizerError if it has none."""
    found = spec["pre_tokenizer"] or {}
    steps = reduced(found.get("pretokenizers", [found]))
    nfc = "NFC" in json.dumps(spec["normalizer"])
    alike = [name for name, pre in PRE.items() if reduced(list(pre.steps)) == steps]
    if not alike:
        raise TokenizerError(f"{where}: llama.cpp has no pre-tokenizer that cuts text as this one does: {steps}")
    ignores = bool(spec["model"].get("ignore_merges"))
    return min(alike, key=lambda name: (PRE[name].ignore_merges != ignores, PRE[name].nfc != nfc))


def reduced(steps: list[Step]) -> list[tuple[Any, ...]]:
    """The steps of a pre-tokenizer, reduced to what splits: two that split alike are equal."""
    found: list[tuple[Any, ...]] = []
    for step in steps:
        match step.get("type"):
            case "Split":                        # to keep what matches, or to cut around it, is the same here
                found.append(("Split", *step["pattern"].values()))
            case "ByteLevel":
                if step.get("use_regex", True):
                    found.append(("Split", GPT2))
                if step.get("add_prefix_space"):
                    found.append(("add_prefix_space",))
            case "Digits":
                found.append(("Digits", step.get("individual_digits", False)))
            case kind:
                found.append((kind, json.dumps(step, sort_keys=True)))
    return found
