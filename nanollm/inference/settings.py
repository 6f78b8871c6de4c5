"""generation_config.json: how the model's makers draw its answers.

    {"do_sample": true, "temperature": 0.6, "top_p": 0.9}        Llama-3.1-8B-Instruct

`do_sample` absent or false is greedy, as in transformers; a repetition penalty holds then too. What the file does not
say is not filled in; transformers would draw among 50 tokens (top_k) where it names no other number.
"""

from pathlib import Path
from typing import Any, NamedTuple

from nanollm.inference.terminal import note
from nanollm.text.tokenizer_declared import read_json

NAMES = ("temperature", "top_k", "top_p", "min_p")
NAME = "generation_config.json"
PENALTY = "repetition_penalty"
READ = {"temperature": (1e-6, 100.0), "top_k": (1, 1 << 31), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0),
        PENALTY: (1e-6, 100.0)}
# values that change nothing; another would change the text, and is not followed here
NEUTRAL = {"no_repeat_ngram_size": 0, "min_new_tokens": 0, "min_length": 0, "num_beams": 1,
           "typical_p": 1, "top_h": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "penalty_alpha": 0, "guidance_scale": 1,
           "bad_words_ids": 0, "suppress_tokens": 0, "begin_suppress_tokens": 0, "sequence_bias": 0,
           "forced_bos_token_id": 0, "forced_eos_token_id": 0, "stop_strings": 0, "exponential_decay_length_penalty": 0}


class Settings(NamedTuple):
    """What the file says."""
    values: dict[str, Any]         # fields of Sampling (sample.py), those that change something
    passed_over: list[str]         # "no_repeat_ngram_size 3", …


def read_settings(folder: Path) -> Settings:
    """Of a model's folder; empty where the file is missing. Raises TokenizerError where it is not JSON."""
    said = read_json(folder / NAME)
    passed = [f"{name} {said[name]}" for name, neutral in NEUTRAL.items() if (said.get(name) or neutral) != neutral]
    drawn = said.get("do_sample") is True and said.get("temperature") != 0
    values: dict[str, Any] = {"temperature": 1.0} if drawn else {}
    nothing = ((PENALTY, 1), ("top_k", 0), ("top_p", 1), ("min_p", 0))                        # change nothing
    for name, (low, high) in READ.items() if drawn else [(PENALTY, READ[PENALTY])]:
        value = said.get(name)
        if value is None or (name, value) in nothing:
            continue
        kinds = int if name == "top_k" else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high:
            values[name] = value
        else:
            passed.append(f"{name} {value}")
    return Settings(values, passed)


def choose(given: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """All of NAMES: as they were given, else as the file in `folder` says, else greedy. What the file decides is said
    on standard error. folder None: no file is asked; so for one without, a GGUF."""
    said = Settings({}, [])
    if folder is not None and folder.is_dir() and given.get("temperature") != 0:
        said = read_settings(folder)
    if taken := [f"{name} {value}" for name, value in said.values.items() if name not in given]:
        note(f"[{NAME}: {', '.join(taken)}; --temperature 0 takes the likeliest token]")
    if said.passed_over:
        note(f"warning: {NAME} says {', '.join(said.passed_over)}, which is not followed here")
    return dict.fromkeys(NAMES) | {"temperature": 0.0} | said.values | given
