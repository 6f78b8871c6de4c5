"""adapter_config.json of peft: what an adapter is, both ways.

    peft's key                         here (nanollm/training/lora.py)
    r, lora_alpha, lora_dropout        rank, alpha, dropout
    use_rslora, use_dora               rslora, dora
    rank_pattern, alpha_pattern        ranks, alphas: regular expressions there, names here
    target_modules, target_parameters  targets; when an adapter is read its tensors say which
    init_lora_weights                  "pissa" takes A and B out of the weights before an adapter is loaded

A key that could change the numbers and is none of these is refused by name, unless its value is neutral.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.names.reader import Reader, brief
from checkpoints.storage import files
from nanollm.errors import CheckpointError

CONFIG = "adapter_config.json"
# How it was made, who made it, which modules were asked for: the tensors say what there is.
IRRELEVANT = frozenset("""
    auto_mapping base_model_name_or_path bias eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config megatron_core modules_to_save
    peft_type peft_version qalora_group_size revision runtime_config target_modules target_parameters task_type
""".split())
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")      # beginnings that leave the weights as they are
TOOLS = re.compile(r"_.*|unsloth_\w+")


@dataclass(frozen=True)
class Described:
    """What an adapter_config.json says."""
    where: str
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    pissa: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base: str | None                                                    # the model that it was made for

    def rank_of(self, module: str) -> int:
        """r of a module of transformers."""
        return _of(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """α of a module of transformers."""
        return _of(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """s of a module of transformers."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (rank ** 0.5 if self.rslora else rank)


def _of(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def read(folder: Path) -> Described:
    """Raises ConfigError or CheckpointError, with the key, for what is no LoRA or not understood."""
    if not folder.is_dir() or not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder}: no adapter; expected a folder with {CONFIG} and adapter_model.safetensors, "
                              "as peft writes it")
    r = Reader(files.read_json(folder / CONFIG), str(folder / CONFIG))
    if r.get("peft_type") != "LORA":
        raise r.error("peft_type", "'LORA'; adapters of other kinds are not read")
    init = r.get("init_lora_weights", True)
    if init != "pissa" and init not in KEEPS_BASE:
        raise r.error("init_lora_weights", "true, false, 'gaussian', 'eva', 'orthogonal' or 'pissa': others change the "
                      "weights of the base; save it with path_initial_model_for_weight_conversion, which makes it a "
                      "plain LoRA")
    base = r.get("base_model_name_or_path", None)
    found = Described(
        r.where, r.size("r", 8), r.number("lora_alpha", 8), r.number("lora_dropout", 0.0, above=-1.0),
        r.flag("use_rslora", False), r.flag("use_dora", False), init == "pissa", _patterns(r, "rank_pattern", int),
        _patterns(r, "alpha_pattern", float), base if isinstance(base, str) else None)
    for key, value in r.values.items():
        neutral = value in (None, False) or value in ({}, [], "", "none")
        if key not in r.seen and key not in IRRELEVANT and not neutral and not TOOLS.fullmatch(key):
            raise CheckpointError(f"{r.where}: {key} is {brief(value)}, which is not understood and may change the "
                                  "numbers; expected null or false")
    return found


def _patterns(r: Reader, key: str, kind: type) -> dict[str, Any]:
    found = r.get(key, None) or {}
    try:
        assert isinstance(found, dict)
        for pattern, value in found.items():
            re.compile(pattern)
            assert not re.search(r"\)\s*[*+{]", pattern), "a group repeated: it may match for ever"
            assert type(value) in (int, kind) and value > 0
    except (AssertionError, re.error):
        raise r.error(key, "regular expressions, no group of them repeated, and a number above 0 for each") from None
    return found


def write(described: Described, modules: list[str], parameters: list[str], saved: list[str], *,
          transposed: bool) -> dict[str, Any]:
    """The adapter_config.json of these modules of transformers, parameters of modules, and modules saved whole."""
    def whole_number(value: float) -> float:     # 2.0 → 2
        return int(value) if value == int(value) else value

    return {
        "alpha_pattern": {name: whole_number(alpha) for name, alpha in described.alpha_pattern.items()},
        "base_model_name_or_path": described.base, "bias": "none",
        "fan_in_fan_out": transposed, "inference_mode": True, "init_lora_weights": True,
        "lora_alpha": whole_number(described.alpha), "lora_dropout": described.dropout,
        "modules_to_save": saved or None, "peft_type": "LORA",
        "r": described.rank, "rank_pattern": dict(described.rank_pattern), "target_modules": modules,
        "target_parameters": parameters or None, "task_type": "CAUSAL_LM",
        "use_dora": described.dora, "use_rslora": described.rslora,
    }
