"""MiMo-V2-Flash, 309B-A15B (Xiaomi): five layers of six slide (128 before a token, and itself), with a sink a head.

    attention   values are narrower than queries and keys (128, 192), and times 0.707 (nanollm/layers/narrow_values.py);
                a third of each head turns, base 1e4 where layers slide, 5e6 where they see all
                layers that slide have twice as many key/value heads (8, 4), and alone have sinks
    experts     DeepSeek-V3's: sigmoids, a correction for the choice, 8 of 256, renormalised; none is shared. The first
                layer has an MLP

The hub's config has keys of its own for most of this (hybrid_layer_pattern, swa_…), which must say what is so here.
What predicts ahead (model.mtp.…) is left out. Weights are 8-bit, as V3's. arXiv 2601.02780.
"""

from typing import Any

from checkpoints.families.deepseek import CORRECTION, V3_EXPERTS, V3_ROUTING, Groups
from checkpoints.families.glm_moe import NamedDense
from checkpoints.families.laguna import within
from checkpoints.families.llama import EPS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.mellum import Ropes
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import FULL, SLIDING, Windows
from checkpoints.names.config_table import Draft, Row, field, flag, number, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import rule
from nanollm.config import Attention, NarrowValueAttention, Rope


class DenseList(NamedDense):
    """A list of kinds, or on the hub of 0 and 1; where it is missing only the first are dense."""

    def kinds(self, r: Reader, layers: int) -> list[str]:
        """The kind of each layer."""
        kinds = super().kinds(r, layers)
        r.must("moe_layer_freq", [int(kind == "experts") for kind in kinds])
        return kinds


class FiveOfSixSlide(Windows):
    """Where there is no `layer_types`: all but the first layer and every sixth. Those that slide have sinks."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        return [i > 0 and (i + 1) % 6 != 0 for i in range(layers)]

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The hub's `sliding_window_size` does not count the token itself."""
        before = r.size("sliding_window_size", None, or_null=True)
        inner = r if before is None else r.of(r.values | {"sliding_window": before + 1})
        super().read(inner, draft, key)
        r.seen |= inner.seen | {"sliding_window"}
        slides = [window is not None for window in draft.each("mixer.window")]
        for layer, each in zip(draft.layers, slides, strict=True):
            layer.set("mixer.sinks", each)
        r.must("hybrid_layer_pattern", [int(each) for each in slides])


class TwiceWhereItSlides(Row):
    """Key/value heads of the layers that see all; the others have twice as many."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """One number for all layers."""
        heads = r.size(key, 4)
        for layer in draft.layers:
            layer.set("mixer.kv_heads", 2 * heads if layer.get("mixer.window") else heads)
        r.must("swa_num_key_value_heads", 2 * heads)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Of the first layer; what the others have is noticed when it is read back."""
        heads, window = draft["mixer.kv_heads"], draft.layers[0].get("mixer.window")
        return {key: heads // 2 if window else heads}


class OwnRopes(Ropes):
    """Mellum's two, of other bases, which a third of each head turns by."""
    BASES = {SLIDING: ("swa_rope_theta", 1e4), FULL: ("rope_theta", 5e6)}
    fraction = 0.334


MIMO_V2_FLASH = LLAMA_SHAPE.but(
    "mimo_v2_flash", "MiMoV2FlashForCausalLM",
    names=with_experts(LLAMA_NAMES, CORRECTION, rule(
        "model.layers.{i}.self_attn.attention_sink_bias", "layers.{i}.mixer.sinks")),
    layer={"mixer": part(NarrowValueAttention, attention=part(Attention, rope=part(Rope)))},
    missing={"max_position_embeddings": 131072},
    keys=V3_ROUTING | {
        "mlp_layer_types": DenseList(missing=1, **V3_EXPERTS), "layer_types": within(FiveOfSixSlide(129)),
        "num_attention_heads": within(size("mixer.heads")), "num_key_value_heads": within(TwiceWhereItSlides()),
        "head_dim": within(size("mixer.head_dim", missing=192)), "v_head_dim": size("mixer.value", missing=128),
        "attention_value_scale": number("mixer.value_scale", missing=0.707, null=1.0),
        "attention_bias": within(flag("mixer.qkv_bias", missing=False)), "rope_parameters": within(OwnRopes()),
        "rms_norm_eps": number(*EPS, missing=1e-5, also=("layernorm_epsilon",)),
        "moe_intermediate_size": size("ffn.expert.hidden", missing=2048),
        "n_group": Groups(count=1, kept=1, best=2), "n_shared_experts": only(None),
        "routed_scaling_factor": number("ffn.scale", missing=1.0, null=1.0),
        # what the class always does, and the hub's configs also say
        "scoring_func": only("sigmoid"), "topk_method": only("noaux_tc"), "use_qk_norm": only(False),
        "mlp_bias": only(False),
        "add_full_attention_sink_bias": only(False), "add_swa_attention_sink_bias": only(True),
        "swa_num_attention_heads": only(field("mixer.attention.heads")),
        "swa_head_dim": only(field("mixer.attention.head_dim")), "swa_v_head_dim": only(field("mixer.value")),
    },
    without=("first_k_dense_replace",),
    irrelevant=frozenset({"attention_chunk_size", "hybrid_block_size", "num_nextn_predict_layers"}),
    ahead="model.mtp.",
)
FAMILIES = {"mimo_v2_flash": MIMO_V2_FLASH}
