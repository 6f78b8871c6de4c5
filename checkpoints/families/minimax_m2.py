"""MiniMax-M2, M2.1, M2.5, M2.7: Llama's attention with a norm over all heads of q and of k, and many small experts.

    attention   q and k are normalised as whole vectors, before they are rotated; half of each head turns
                (`rotary_dim` 64 of 128). All layers see everything (`attn_type_list` is all 1)
    experts     256, 8 a token; sigmoids, a correction for the choice, the chosen weights renormalised; none is shared

Tensors have Mixtral's names; the correction is block_sparse_moe.e_score_correction_bias. Published in 8 bits, without
the layers that predict ahead, which the config counts all the same. https://github.com/MiniMax-AI/MiniMax-M2
"""

from typing import Any

from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.families.mixtral import MIXTRAL_NAMES
from checkpoints.families.qwen import QK_NORM
from checkpoints.names.config_rows import HeadDim, RopeKeys
from checkpoints.names.config_table import Draft, count, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, MoE, Norm, Rope

MINIMAX_NAMES = override(MIXTRAL_NAMES, *QK_NORM, rule(
    "model.layers.{i}.block_sparse_moe.e_score_correction_bias", "layers.{i}.ffn.router.correction"))


class RotaryDim(RopeKeys):
    """RoPE whose part of a head that turns is a number of channels, `rotary_dim`, or else a fraction."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """What config.json says. transformers reads the fraction where both stand there."""
        width = draft["mixer.head_dim"]
        turned = r.size("rotary_dim", width, most=width)
        said = r.of({"partial_rotary_factor": turned / width} | r.values)
        rope = super().rope(said, draft)
        r.seen |= said.seen
        return rope

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """RoPE's keys, and the number of channels."""
        values = super().write(draft, key)
        if "mixer.rope.fraction" not in draft:
            return values
        return values | {"rotary_dim": int(draft["mixer.head_dim"] * draft["mixer.rope.fraction"])}


MINIMAX_M2 = LLAMA_SHAPE.but(
    "minimax_m2", "MiniMaxM2ForCausalLM", names=(MINIMAX_NAMES,),
    layer={
        "mixer.qk_norm": part(Norm, scope="all"),
        "ffn": part(MoE, expert=part(MLP), renormalize=True, score="sigmoid", correction=True),
    },
    missing={"num_key_value_heads": 8, "max_position_embeddings": 196608, "intermediate_size": 1536},
    keys={
        "head_dim": HeadDim(missing=128), "rope_parameters": RotaryDim(theta=5e6, fraction=1.0),
        "num_local_experts": count("ffn.experts", missing=256, also=("num_experts",)),
        "num_experts_per_tok": size("ffn.top_k", missing=8),
        # what the published code always does, and the configs also say
        "attn_type_list": only(lambda draft: [1] * len(draft.layers)), "qk_norm_type": only("per_layer"),
        "use_qk_norm": only(True), "use_routing_bias": only(True), "scoring_func": only("sigmoid"),
        "shared_intermediate_size": only(0),
    },
    irrelevant=frozenset({"use_mtp", "num_mtp_modules", "mtp_transformer_layers"}),
)
FAMILIES = {"minimax_m2": MINIMAX_M2}
