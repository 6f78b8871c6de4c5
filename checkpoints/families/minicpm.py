"""MiniCPM and MiniCPM4 (minicpm): Llama with three factors (muP). MiniCPM3-4B (minicpm3): those, and latent attention.

    x  = scale_emb · E[token]                                          12
    x += s · o(attention(norm(x)));  x += s · mlp(norm(x))             s = scale_depth / √layers, 1.4 / √40
    logits = W norm(x) / (D / dim_model_base)                          2304 / 256 in 2B

Hu et al. 2024, arXiv 2404.06395, §4. q and k are rotated in float32, in the published code; transformers, which has
MiniCPM3 alone, rounds each product, as Llama. `mup_denominator` concerns heads for speculative decoding. MiniCPM3 takes
its attention from DeepSeek-V2 (families/deepseek.py) with RoPE in the half layout.

Refused: the mixture of experts (MiniCPM-MoE-8x2B, `num_experts`), InfLLM's sparse attention (`sparse_config`).
"""

import math
from typing import Any

from checkpoints.families.deepseek import LATENT_NAMES, TemperedRope, width
from checkpoints.families.llama import ATTENTION_BIAS, HEADS_SHARE_DIM, LLAMA_SHAPE
from checkpoints.names.config_rows import even_share, roundest
from checkpoints.names.config_table import Draft, Row, field, number, only, part, size
from checkpoints.names.reader import Reader
from nanollm.config import LatentAttention, Rope
from nanollm.errors import ConfigError


class ByDepth(Row):
    """What branches are multiplied by, times the root of the number of layers. A null means no factor."""

    def __init__(self, missing: float) -> None:
        self.missing = missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        given = None if r.get(key, self.missing) is None else r.number(key, self.missing)
        draft["residual_scale"] = 1.0 if given is None else given / math.sqrt(len(draft.layers))

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The roundest number that is read as the same factor."""
        scale, root = draft["residual_scale"], math.sqrt(len(draft.layers))
        return {key: exactly(lambda value: value / root, scale, scale * root)}


class ByWidth(Row):
    """What logits are multiplied by, times the width of the model. A null means no factor."""

    def __init__(self, missing: int) -> None:
        self.missing = missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        given = None if r.get(key, self.missing) is None else r.number(key, self.missing)
        draft["head_scale"] = 1.0 if given is None else given / draft["dim"]

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        dim = draft["dim"]
        return {key: exactly(lambda value: value / dim, draft["head_scale"], draft["head_scale"] * dim)}


def exactly(function: Any, wanted: float, near: float) -> float:
    """`roundest`, a whole number as such."""
    found = roundest(function, wanted, near)
    if found is None:
        raise ConfigError(f"no number near {near:g} is read as exactly {wanted:g}")
    return int(found) if found.is_integer() else found


MINICPM = LLAMA_SHAPE.but(
    "minicpm", "MiniCPMForCausalLM", layer={"mixer.rope.rounds": "result"}, missing={"tie_word_embeddings": True},
    keys=HEADS_SHARE_DIM | {
        "attention_bias": ATTENTION_BIAS, "mlp_bias": only(False),
        "scale_emb": number("embed_scale", missing=1.0),
        "scale_depth": ByDepth(missing=1.0), "dim_model_base": ByWidth(missing=1),
        "num_experts": only(0), "num_experts_per_tok": only(0),
    },
    irrelevant=frozenset({"mup_denominator"}),
)
MINICPM3 = MINICPM.but(
    "minicpm3", "MiniCPM3ForCausalLM",
    names=(LATENT_NAMES,),
    layer={"mixer": part(LatentAttention, rope=part(Rope, rounds="result"))},
    missing={"rms_norm_eps": 1e-5, "max_position_embeddings": 32768},
    keys={
        "num_key_value_heads": only(field("mixer.heads"), None, written=True),  # says nothing: no head shares keys
        "num_attention_heads": size("mixer.heads"),
        "qk_nope_head_dim": size("mixer.nope", missing=64), "qk_rope_head_dim": size("mixer.rope_dim", missing=32),
        "qk_head_dim": only(width), "head_dim": only(field("mixer.rope_dim"), None),  # as transformers writes them
        "v_head_dim": size("mixer.value", missing=even_share, null=even_share),
        "kv_lora_rank": size("mixer.kv_rank", missing=256), "q_lora_rank": size("mixer.q_rank", missing=768, null=None),
        "rope_parameters": TemperedRope(), "attention_bias": only(False),
        "scale_emb": number("embed_scale", missing=12.0),
        "scale_depth": ByDepth(missing=1.4), "dim_model_base": ByWidth(missing=256),
    },
    without=("head_dim", "rope_parameters", "num_key_value_heads", "num_experts", "num_experts_per_tok"),
)
FAMILIES = {"minicpm": MINICPM, "minicpm3": MINICPM3}
