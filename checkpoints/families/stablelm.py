"""StableLM: Llama with LayerNorms, and a RoPE that turns the first quarter of each head.

    3B-4E1T             x += o(attention(norm(x)));  x += down(silu(gate(h)) · up(h)),  h = norm(x)     LayerNorms with bias
    StableLM-2 1.6B     a bias on q, k and v (use_qkv_bias)
    StableLM-2 12B      one norm, attention and feed-forward beside each other (use_parallel_residual); every head of q and k
                        has a LayerNorm with a gain of its own (qk_layernorm), a tensor a head on disk

Bellagente et al. 2024, arXiv 2402.17834. The first uploads, of model_type stablelm_epoch, are another layout and not read here.
"""

import dataclasses
from typing import Any

from checkpoints.families.legacy import functions, read_decoder, read_mlp, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope
from checkpoints.names.table import override, rule
from nanollm.config import Attention, Layer, ModelConfig, Norm

CONTEXT = 4096                                           # what a missing max_position_embeddings means

STABLELM_NAMES = override(
    LLAMA_NAMES,                                         # {e} counts heads here: the rows of a gain (H, d)
    rule("model.layers.{i}.self_attn.q_layernorm.norms.{e}.weight", "layers.{i}.mixer.q_norm.gain", Stack),
    rule("model.layers.{i}.self_attn.k_layernorm.norms.{e}.weight", "layers.{i}.mixer.k_norm.gain", Stack),
)


def read(r: Reader) -> ModelConfig:
    """The three switches of StableLM-2 are independent of each other."""
    norm = Norm("layer", eps=r.number("layer_norm_eps", 1e-5), bias=True)
    dim, heads = r.size("hidden_size"), r.size("num_attention_heads")
    if dim % heads:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim})")
    r.must("head_dim", None, dim // heads)
    attention = Attention(
        heads=heads,
        kv_heads=r.size("num_key_value_heads", 32),
        head_dim=dim // heads,
        rope=read_rope(r, 10_000.0, r.size("max_position_embeddings", CONTEXT), fraction=0.25),
        qk_norm=dataclasses.replace(norm, bias=False, scope="each") if r.flag("qk_layernorm", False) else None,
        qkv_bias=r.flag("use_qkv_bias", False),
    )
    parallel = r.flag("use_parallel_residual", False)
    layer = Layer(attention, read_mlp(r), pre_mixer=norm, pre_ffn=None if parallel else norm, parallel=parallel)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, CONTEXT)


def write(config: ModelConfig) -> dict[str, Any]:
    """The part of a head that turns is always said: 1 is not the default here."""
    values = write_llama_shape(config, "stablelm", "StableLmForCausalLM")
    layer = config.layers[0]
    return values | {
        "layer_norm_eps": values.pop("rms_norm_eps"),
        "partial_rotary_factor": layer.mixer.rope.fraction,
        "qk_layernorm": layer.mixer.qk_norm is not None,
        "use_qkv_bias": layer.mixer.qkv_bias,
        "use_parallel_residual": layer.parallel,
    }


STABLELM = functions("stablelm", read, write, (STABLELM_NAMES,), INV_FREQ)
FAMILIES = {"stablelm": STABLELM}
