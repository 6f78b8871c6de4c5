"""Qwen3.5: Qwen3-Next's layers, dense or with experts; published with a vision tower, which is left out.

    qwen3_5_text, qwen3_5_moe_text    the language model alone
    qwen3_5, qwen3_5_moe              a folder with a vision tower: its "text_config" is one of those, and the tensors
                                      stand under model.language_model. What is loaded is a text model, and saved as one

    4B, 9B, 27B                       an MLP in each layer
    35B-A3B, 122B-A10B, 397B-A17B     experts in each, one of them for all tokens; the chosen weights renormalised

Of Gated DeltaNet the projections are stored one by one, q, k and v in one as here. Experts lie in a tensor each or, as
on the hub, all of a layer in one.

RoPE turns each channel by another coordinate of a token, in turn: time, row and column in a picture ("mrope",
interleaved). For text all three are the position: plain RoPE, of a quarter of each head.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import LLAMA_NAMES
from checkpoints.families.qwen3_next import EXPERTS, MIXER_NAMES, MOE_KEYS, SHAPE, SHARED, with_experts
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import Draft, Fixed, count, only, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import moved, override, under
from nanollm.config import ModelConfig, Rope

PARTS = under("model.layers.{i}.linear_attn", "layers.{i}.mixer", {
    "in_proj_qkv": "qkv", "in_proj_z": "z", "in_proj_b": "beta", "in_proj_a": "alpha",
})
OF_PICTURES = ("mrope_section", "mrope_interleaved")  # how the channels are shared out among three coordinates


class TextRope(RopeKeys):
    """RoPE of text: what is said of pictures in its object is passed over."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        values = dict(r.values)
        for key in ("rope_scaling", "rope_parameters"):
            if inner := r.inside(key):
                values[key] = {name: value for name, value in inner.values.items() if name not in OF_PICTURES}
        plain = r.of(values)
        rope = super().rope(plain, draft)
        r.seen |= plain.seen
        return rope


class WithVision(Family):
    """A config.json whose "text_config" is the language model's."""

    def read(self, r: Reader) -> ModelConfig:
        """The language model. Raises ConfigError where there is no text_config."""
        text = r.inside("text_config")
        if text is None:
            raise r.error("text_config", "an object, the config of the language model")
        text.must("model_type", self.name)
        outside = {"tie_word_embeddings": r.get("tie_word_embeddings", False)}
        inner = text.of(outside | text.values)
        config = super().read(inner)
        inner.close(UNREAD)
        r.must("tie_word_embeddings", config.tied)
        return config


def with_vision(text: Family) -> WithVision:
    """The folder around a language model."""
    names: Any = tuple(moved(table, "model.", "model.language_model.") for table in text.names)
    return WithVision(
        text.name, text.architecture, keys=text.keys, layer=text.layer, model=text.model, names=names,
        irrelevant=frozenset({"vision_config"}), left_out=("model.visual.",), ahead=text.ahead,
    )


# of the layers that are left out; in which type the published kernel keeps the state
UNREAD = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"})
QWEN3_5 = SHAPE.but(
    "qwen3_5_text", "Qwen3_5ForCausalLM", names=(override(LLAMA_NAMES, *MIXER_NAMES, *PARTS),), irrelevant=UNREAD,
    missing={"num_key_value_heads": 4, "intermediate_size": 12288},
    keys={
        "rope_parameters": TextRope(fraction=0.25, path="mixer.attention.rope"),
        "attn_output_gate": only(True), "mlp_only_layers": only([], None),
    },
)
QWEN3_5_MOE = QWEN3_5.but(
    "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", names=with_experts(LLAMA_NAMES, *MIXER_NAMES, *PARTS, *SHARED),
    layer={"ffn": EXPERTS}, missing={"num_key_value_heads": 2},
    keys=MOE_KEYS | {
        "intermediate_size": Fixed(()),
        "num_experts": count("ffn.experts", missing=256), "num_experts_per_tok": size("ffn.top_k", missing=8),
    },
)
FAMILIES = {
    "qwen3_5_text": QWEN3_5, "qwen3_5_moe_text": QWEN3_5_MOE,
    "qwen3_5": with_vision(QWEN3_5), "qwen3_5_moe": with_vision(QWEN3_5_MOE),
}
