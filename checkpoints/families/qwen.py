"""Qwen2 and Qwen3.

    Qwen1.5, Qwen2, Qwen2.5    model_type qwen2: bias on q, k and v and none on o, always, and no key says so
    Qwen3                      RMS norm on every query and key head; head_dim 128 whatever hidden_size is; no bias

Some layers may slide: those that `layer_types` names, or else, as before transformers 5, all from `max_window_layers`
on. Either counts only with `use_sliding_window`: published configs carry a `sliding_window` of 32768 or 131072 that
means nothing. The small ones are tied. Vocabularies are padded (151936, 152064) past the last real token.
"""

from typing import Any

from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Windows, whole
from checkpoints.names.config_table import only, part
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, under
from nanollm.config import Norm

QK_NORM = under("model.layers.{i}.self_attn", "layers.{i}.mixer", {"q_norm": "q_norm", "k_norm": "k_norm"})
QWEN3_NAMES = override(LLAMA_NAMES, *QK_NORM)


class LastLayersSlide(Windows):
    """Those from `max_window_layers` on. The key alone says it only where the full layers all come first."""

    def __init__(self, first: int = 28, **more: Any) -> None:
        super().__init__(**more)
        self.first = first

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        first = whole(r, "max_window_layers", self.first)
        return [i >= first for i in range(layers)]

    def pattern_keys(self, slides: list[bool]) -> dict[str, Any]:
        return {"max_window_layers": [*slides, True].index(True)}


QWEN2 = LLAMA_SHAPE.but(
    "qwen2", "Qwen2ForCausalLM", layer={"mixer.qkv_bias": True},
    missing={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    keys={
        "use_mrope": only(False),  # positions in three dimensions, for images
        "layer_types": LastLayersSlide(switch=True),
    },
)
QWEN3 = QWEN2.but(
    "qwen3", "Qwen3ForCausalLM", names=(QWEN3_NAMES,), layer={"mixer.qkv_bias": False, "mixer.qk_norm": part(Norm)},
    missing={"head_dim": 128}, keys={"attention_bias": ATTENTION_BIAS}, without=("use_mrope",),
)
FAMILIES = {"qwen2": QWEN2, "qwen3": QWEN3}
