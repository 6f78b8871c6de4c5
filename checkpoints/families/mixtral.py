"""Mixtral: Mistral's attention, and eight experts in place of the MLP. 8x7B, 8x22B.

On disk an expert's w1 is the gate, w3 the up and w2 the down projection, one tensor each; here they are stacked.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES, read_attention, read_decoder, read_mlp, write_llama_shape
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import Layer, ModelConfig, MoE, Norm

CONTEXT = 131072                                         # what a missing max_position_embeddings means

MIXTRAL_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.block_sparse_moe.gate", "layers.{i}.ffn.router"),
    rule("model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight", "layers.{i}.ffn.experts.gate", Stack),
    rule("model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight", "layers.{i}.ffn.experts.up", Stack),
    rule("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight", "layers.{i}.ffn.experts.down", Stack),
)


def read(r: Reader) -> ModelConfig:
    norm = Norm(eps=r.number("rms_norm_eps", 1e-5))
    attention = read_attention(r, theta=1e6, context=CONTEXT, kv_heads=8, window=r.size("sliding_window", None))
    moe = MoE(r.count("num_local_experts", 8), r.size("num_experts_per_tok", 2), read_mlp(r), renormalize=True)
    layer = Layer(attention, moe, pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, CONTEXT)


def write(config: ModelConfig) -> dict[str, Any]:
    """A shared expert, or weights that are not renormalised, do not read back."""
    values = write_llama_shape(config, "mixtral", "MixtralForCausalLM", MoE)
    layer = config.layers[0]
    return values | {
        "sliding_window": layer.mixer.window,
        "num_local_experts": layer.ffn.experts,
        "num_experts_per_tok": layer.ffn.top_k,
    }


MIXTRAL = Family("mixtral", read, write, (MIXTRAL_NAMES,), INV_FREQ)
