"""Qwen2-VL and Qwen2.5-VL: a vision tower, which is left out, and a Qwen2, which is loaded, and saved as one.

Their RoPE ("mrope") turns each third or so of the channels by another coordinate of a token: time, row or column in a picture.
For text the three are the same number, the position, and that is plain RoPE (Wang et al. 2024, arXiv 2409.12191, §2.1).

The hub's configs are flat, with the keys of Qwen2 and a vision_config; newer ones have them in a text_config, some have them in
both places. What a missing key means differs from Qwen2 for four of them. Tensors have one of two sets of names:

    on the hub                        model.layers.…                   visual.…
    as the modules are called now     model.language_model.layers.…    model.visual.…
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.families.qwen import read_qwen2, write_qwen2
from checkpoints.names.reader import IRRELEVANT, Reader
from checkpoints.names.table import moved
from nanollm.config import ModelConfig

DEFAULTS = dict(rms_norm_eps=1e-5, rope_theta=1e6, num_key_value_heads=8, max_window_layers=80)      # where they are not Qwen2's
TOWER = frozenset("vision_config image_token_id video_token_id vision_token_id vision_start_token_id vision_end_token_id".split())


def read(r: Reader) -> ModelConfig:
    """Qwen2's reader on the keys of the language model, wherever they stand."""
    text = r.inside("text_config")
    source = text or r
    source.must("model_type", *(kind + end for kind in ("qwen2_vl", "qwen2_5_vl") for end in ("", "_text")))
    tied = r.flag("tie_word_embeddings", False) or source.flag("tie_word_embeddings", False)
    values = DEFAULTS | source.values | {"tie_word_embeddings": tied}
    inner = Reader(values | {key: plain(source.get(key, None)) for key in ("rope_scaling", "rope_parameters")},
                   r.where, r.ignore, r.most, source.prefix)
    config = read_qwen2(inner)
    if text is None:
        r.seen |= inner.seen
        return config
    inner.close(IRRELEVANT | TOWER)
    for key in sorted(text.values.keys() & r.values.keys() - IRRELEVANT - TOWER - {"tie_word_embeddings"}):
        r.must(key, text.values[key])                    # said in both places, and the same
    return config


def plain(rope: Any) -> Any:
    """The object as Qwen2 would have it: "mrope" is the default, and how the channels are shared out is for pictures."""
    if not isinstance(rope, dict):
        return rope
    return {key: "default" if value == "mrope" else value for key, value in rope.items() if key != "mrope_section"}


QWEN2_VL = Family(
    "qwen2", read, write_qwen2,
    tables=(LLAMA_NAMES, moved(LLAMA_NAMES, "model.", "model.language_model.")),
    ignorable=INV_FREQ,
    irrelevant=TOWER,
    left_out=("visual.", "model.visual."),
)
