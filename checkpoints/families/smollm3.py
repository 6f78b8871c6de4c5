"""SmolLM3-3B: Llama in which every fourth layer does not rotate (NoPE, Yang et al. 2025, arXiv 2501.18795).

    layer                           0  1  2  3  4  5  6  7 …
    no_rope_layers                  1  1  1  0  1  1  1  0        1: RoPE, 0: none, though the key's name says otherwise

Where the list is missing, `no_rope_layer_interval` (4) says it. With `use_sliding_window`, which no published config
has, the layers that `layer_types` names slide, or else those without RoPE. Theta 2e6 (5e6 as published), tied.
"""

from typing import Any

from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys, Windows
from checkpoints.names.config_table import Draft, Row, flag
from checkpoints.names.reader import Reader


def rotated(r: Reader, layers: int) -> list[bool]:
    """Which layers have RoPE."""
    every, listed = r.size("no_rope_layer_interval", 4), r.get("no_rope_layers", None)
    if listed is None:
        return [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers or not all(type(one) is int for one in listed):
        raise r.error("no_rope_layers", f"{layers} times 0 or 1")
    return [one != 0 for one in listed]


class RopeOrNone(Row):
    """Which layers rotate: a 1 for those that do, a 0 for the others."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        for layer, turns in zip(draft.layers, rotated(r, len(draft.layers)), strict=True):
            if not turns:
                layer.set("mixer.rope", None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: [int(rope is not None) for rope in draft.each("mixer.rope")]}


class OthersSlide(Windows):
    """Where there is no `layer_types`, the layers without RoPE."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        return [not turns for turns in rotated(r, layers)]


SMOLLM3 = LLAMA_SHAPE.but(
    "smollm3", "SmolLM3ForCausalLM",
    missing={"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768},
    keys={
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
        "no_rope_layers": RopeOrNone(), "layer_types": OthersSlide(None, switch=True),
        "rope_parameters": RopeKeys(theta=2_000_000.0),
    },
)
FAMILIES = {"smollm3": SMOLLM3}
