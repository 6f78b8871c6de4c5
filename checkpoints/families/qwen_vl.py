"""Qwen2-VL and Qwen2.5-VL: a vision tower, which is left out, and a Qwen2, which is loaded, and saved as one.

Qwen3-VL, dense (2B, 4B, 8B, 32B): the same around a Qwen3, in a text_config. Bai et al. 2025, arXiv 2511.21631.

Their RoPE ("mrope") turns each third or so of the channels by another coordinate of a token: time, row or column in a
picture. For text all three are the position: plain RoPE (Wang et al. 2024, arXiv 2409.12191, §2.1). Qwen3-VL deals the
coordinates out in turn ("mrope_interleaved") and adds features of the tower's middle layers ("DeepStack"): both are for
pictures only.

The hub's configs are flat, with the keys of Qwen2 and a vision_config; newer ones have them in a text_config, some have
them in both places. A few missing keys mean something else than in Qwen2 and Qwen3. There are two sets of names:

    on the hub                        model.layers.…                   visual.…
    as the modules are called now     model.language_model.layers.…    model.visual.…
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import LLAMA_NAMES
from checkpoints.families.qwen import QWEN2, QWEN3, QWEN3_NAMES, LastLayersSlide
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.reader import IRRELEVANT, Reader
from checkpoints.names.table import moved
from nanollm.config import ModelConfig

TOWER = frozenset({"vision_config", "image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id",
                   "vision_end_token_id"})


class WithVision(Family):
    """The text model's keys, wherever they stand."""
    KINDS: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl")

    def read(self, r: Reader) -> ModelConfig:
        """The language model. A key that stands both inside text_config and outside must say the same."""
        text = r.inside("text_config")
        source = text or r
        source.must("model_type", *(kind + end for kind in self.KINDS for end in ("", "_text")))
        tied = r.flag("tie_word_embeddings", False) or source.flag("tie_word_embeddings", False)
        ropes = {key: plain(source.get(key, None)) for key in ("rope_scaling", "rope_parameters")}
        inner = source.of(source.values | {"tie_word_embeddings": tied} | ropes)
        config = super().read(inner)
        if text is None:
            r.seen |= inner.seen
            return config
        inner.close(TOWER)
        for key in sorted(text.values.keys() & r.values.keys() - IRRELEVANT - TOWER - {"tie_word_embeddings"}):
            r.must(key, text.values[key])  # said in both places, and the same
        return config


def plain(rope: Any) -> Any:
    """The object as Qwen2 has it: "mrope" is the default there, and how it divides the channels is for pictures."""
    if not isinstance(rope, dict):
        return rope
    return {key: "default" if value == "mrope" else value for key, value in rope.items()
            if key not in ("mrope_section", "mrope_interleaved")}


class Qwen3WithVision(WithVision):
    """Qwen3's."""
    KINDS = ("qwen3_vl",)


QWEN2_VL = WithVision(
    QWEN2.name, QWEN2.architecture, layer=QWEN2.layer, model=QWEN2.model, ignorable=QWEN2.ignorable,
    keys=QWEN2.but("", missing={"rms_norm_eps": 1e-5, "num_key_value_heads": 8}, keys={
        "rope_parameters": RopeKeys(theta=1e6),
        "layer_types": LastLayersSlide(first=80, switch=True),
    }).keys,
    names=(LLAMA_NAMES, moved(LLAMA_NAMES, "model.", "model.language_model.")), irrelevant=TOWER,
    left_out=("visual.", "model.visual."),
)
QWEN3_VL = Qwen3WithVision(
    QWEN3.name, QWEN3.architecture, layer=QWEN3.layer, model=QWEN3.model, ignorable=QWEN3.ignorable,
    keys=QWEN3.but("", missing={"max_position_embeddings": 128000}, without=("layer_types",), keys={
        "rope_parameters": RopeKeys(theta=500_000.0),
    }).keys,
    names=(QWEN3_NAMES, moved(QWEN3_NAMES, "model.", "model.language_model.")), irrelevant=TOWER,
    left_out=QWEN2_VL.left_out,
)
FAMILIES = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_VL, "qwen3_vl": QWEN3_VL}
