"""generation_config.json: how the model's makers draw its answers; and texts that a user bans, as tokens.

    {"do_sample": true, "temperature": 0.6, "top_p": 0.9}        Llama-3.1-8B-Instruct

`do_sample` absent or false is greedy, as in transformers; penalties, bans and the least length hold then too. What the
file does not say is not filled in; transformers would draw among 50 tokens (top_k) where it names no other number.
"""

from pathlib import Path
from typing import Any, NamedTuple

from nanollm.errors import counted
from nanollm.inference.sample import LARGE
from nanollm.inference.terminal import note
from nanollm.text.tokenizer import Tokenizer
from nanollm.text.tokenizer_declared import read_json

NAME = "generation_config.json"


class Number(NamedTuple):
    """A number of the file."""
    field: str                     # of Sampling (sample.py)
    low: float                     # an int: a whole number
    high: float
    nothing: float | None          # the value that changes nothing


DRAWN = {                          # where do_sample is true
    "temperature": Number("temperature", 1e-6, 100.0, None), "top_k": Number("top_k", 1, LARGE, 0),
    "top_p": Number("top_p", 1e-9, 1.0, 1), "min_p": Number("min_p", 0.0, 1.0, 0)}
ALWAYS = {
    "repetition_penalty": Number("repetition_penalty", 0.01, 100.0, 1),
    "no_repeat_ngram_size": Number("no_repeat_ngram", 1, LARGE, 0),
    "min_new_tokens": Number("min_new_tokens", 1, LARGE, 0)}
# values that change nothing; another would change the text, and is not followed here
NEUTRAL = {"min_length": 0, "num_beams": 1, "typical_p": 1, "top_h": 0, "epsilon_cutoff": 0, "eta_cutoff": 0,
           "penalty_alpha": 0, "guidance_scale": 1, "begin_suppress_tokens": 0, "sequence_bias": 0,
           "forced_bos_token_id": 0, "forced_eos_token_id": 0, "stop_strings": 0, "exponential_decay_length_penalty": 0}


class Settings(NamedTuple):
    """What the file says."""
    values: dict[str, Any]         # fields of Sampling, those that change something
    passed_over: list[str]         # "num_beams 4", …


def read_settings(folder: Path) -> Settings:
    """Of a model's folder; empty where the file is missing. Raises TokenizerError where it is not JSON."""
    said = read_json(folder / NAME)
    passed = [f"{name} {said[name]}" for name, neutral in NEUTRAL.items() if (said.get(name) or neutral) != neutral]
    drawn = said.get("do_sample") is True and said.get("temperature") != 0
    values: dict[str, Any] = {"temperature": 1.0} if drawn else {}
    for name, (field, low, high, nothing) in (DRAWN | ALWAYS if drawn else ALWAYS).items():
        value = said.get(name)
        if value is None or value == nothing:
            continue
        kinds = int if isinstance(low, int) else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high:
            values[field] = value
        else:
            passed.append(f"{name} {value}")
    banned, wrong = _bans(said)
    return Settings(values | ({"banned": banned} if banned else {}), passed + wrong)


def _bans(said: dict[str, Any]) -> tuple[list[tuple[int, ...]], list[str]]:
    """The words that the file rules out, as the ids of their tokens, and what of it is no list of them."""
    banned: list[tuple[int, ...]] = []
    wrong, end = [], said.get("eos_token_id")
    ends = [[id] for id in (end if isinstance(end, list) else [end])]
    for name in ("bad_words_ids", "suppress_tokens"):                          # [[5, 7], [9]] and [5, 7]
        words = value = said.get(name) or []
        if name == "suppress_tokens" and isinstance(value, list):
            words = [[token] for token in value]
        if isinstance(words, list) and all(map(_is_word, words)):
            # as in transformers, a stop token is no bad word
            banned += [tuple(word) for word in words if name == "suppress_tokens" or word not in ends]
        else:
            wrong.append(f"{name} {value}")
    return banned, wrong


def _is_word(word: Any) -> bool:
    return isinstance(word, list) and word != [] and all(type(token) is int and token >= 0 for token in word)


def choose(given: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Fields of Sampling: as they were given, else as the file in `folder` says; what either bans is banned. What the
    file decides is said on standard error. folder None: no file is asked; so for one without, a GGUF."""
    said = Settings({}, [])
    if folder is not None and folder.is_dir() and given.get("temperature") != 0:
        said = read_settings(folder)
    banned = said.values.get("banned", [])
    taken = [f"{name} {value}" for name, value in said.values.items() if name not in given and name != "banned"]
    if banned:
        taken.append(f"banned: {counted(len(banned), 'word')} of tokens")
    if taken:
        note(f"[{NAME}: {', '.join(taken)}; --temperature 0 takes the likeliest token]")
    if said.passed_over:
        note(f"warning: {NAME} says {', '.join(said.passed_over)}, which is not followed here")
    return said.values | given | {"banned": [*banned, *given.get("banned", [])]}


def spellings(tokenizer: Tokenizer, text: str) -> list[tuple[int, ...]]:
    """The tokens of a text inside another: right after what comes before it, and after a space.

    To ban them (`Sampling.banned`) keeps a model from the text as it would write it. It can still spell it with other,
    shorter tokens, and a longer token may have it inside.
    """
    found = (tuple(tokenizer.encode(each, bos=False, continues=True)) for each in (text, " " + text))
    return sorted({tokens for tokens in found if tokens})
