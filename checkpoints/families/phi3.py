"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: Llama with fused matrices, and LongRoPE where the context is long.

    on disk   qkv_proj rows  q q q … k v        gate_up_proj rows  gate … up …          no biases

    Phi-3-mini-4k, -medium-4k    a window of 2047 tokens in every layer
    Phi-3-128k, Phi-3.5-mini     LongRoPE: one list of divisors up to `original_max_position_embeddings`, which stands beside the
                                 object and not in it, another list beyond. The first upload calls it "su"
    Phi-4                        theta 250000, no window, no stretch
    Phi-4-mini                   LongRoPE on the first three quarters of each head (`partial_rotary_factor`); tied

A window of 262144 with a context of 131072 says nothing, and is kept as it is. Phi-3-small and Phi-3.5-MoE are other models.
"""

from typing import Any

from checkpoints.families.legacy import functions, read_decoder, read_mlp, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope
from checkpoints.names.table import override, rule
from nanollm.config import Attention, Layer, LongRope, ModelConfig, Norm

CONTEXT = 4096                                           # what a missing max_position_embeddings means, and the original one too

PHI3_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.self_attn.qkv_proj", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Blocks),
    rule("model.layers.{i}.mlp.gate_up_proj", ["layers.{i}.ffn.gate", "layers.{i}.ffn.up"], Blocks),
)


def check_lists(r: Reader, head_dim: int) -> None:
    """LongRoPE or nothing, and its lists as long as there are pairs of channels that turn."""
    inner = r.inside("rope_scaling") or r.inside("rope_parameters")
    if inner is None:
        return
    key = "rope_type" if "rope_type" in inner.values else "type"
    if inner.get(key, "default") not in ("default", "longrope", "su"):
        raise inner.error(key, "default, longrope or su")
    pairs = int(head_dim * inner.number("partial_rotary_factor", r.number("partial_rotary_factor", 1.0))) // 2
    for key in ("short_factor", "long_factor"):
        divisors = inner.get(key, None)
        if isinstance(divisors, list) and len(divisors) != pairs:
            raise inner.error(key, f"a list of {pairs} numbers, one for each pair of channels that turns, not of {len(divisors)}")


def read(r: Reader) -> ModelConfig:
    """Llama's keys, with other rope. That matrices are fused is the table's to say."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-5))
    dim, heads = r.size("hidden_size"), r.size("num_attention_heads")
    head_dim = r.size("head_dim", None) or dim // heads
    kv_heads = r.size("num_key_value_heads", None) or heads
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        r.must(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini: 1, and nothing published reads them
        r.must(key, 1)
    check_lists(r, head_dim)
    original = r.size("original_max_position_embeddings", CONTEXT)
    rope = read_rope(r, 10_000.0, r.size("max_position_embeddings", CONTEXT), fraction=1.0, original=original)
    attention = Attention(heads, kv_heads, head_dim, rope, r.size("sliding_window", None))
    layer = Layer(attention, read_mlp(r), pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, CONTEXT)


def write(config: ModelConfig) -> dict[str, Any]:
    """A bias anywhere, or a scaling other than LongRoPE, does not read back."""
    values = write_llama_shape(config, "phi3", "Phi3ForCausalLM")
    attention = config.layers[0].mixer
    long = isinstance(attention.rope.scaling, LongRope)
    return values | {
        "sliding_window": attention.window,
        "original_max_position_embeddings": attention.rope.scaling.original if long else config.context,
    }


PHI3 = functions("phi3", read, write, (PHI3_NAMES,), INV_FREQ)
FAMILIES = {"phi3": PHI3}
