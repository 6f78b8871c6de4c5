"""StarCoder2: Llama's order of things with older parts. 3B, 7B, 15B; Lozhkov et al. 2024, arXiv 2402.19173.

    x += o(attention(norm(x)));  x += proj(gelu(fc(norm(x))))        LayerNorms with bias, a bias on every matrix, the gelu's tanh form

Few key/value heads (2 or 4), RoPE in the half layout, a window of 4096 on every layer. 3B and 7B are tied, 15B is not.
StarCoder the first is a GPT-2 with one key/value head and another lineage.
"""

from typing import Any

from checkpoints.families.legacy import functions, read_attention, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Layer, ModelConfig, Norm

CONTEXT = 4096                                           # what a missing max_position_embeddings means

STARCODER2_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.mlp.c_fc", "layers.{i}.ffn.up"),
    rule("model.layers.{i}.mlp.c_proj", "layers.{i}.ffn.down"),
)


def read(r: Reader) -> ModelConfig:
    """One switch for the bias of all matrices; the norms always have theirs."""
    norm = Norm("layer", eps=r.number("norm_epsilon", 1e-5), bias=True)
    bias = r.flag("use_bias", True)
    for key, value in (("layer_norm_epsilon", norm.eps), ("norm_type", "layer_norm"), ("mlp_type", "default"), ("scale_attn_weights", True)):
        r.must(key, value)                               # what the hub's configs also say
    attention = read_attention(r, context=CONTEXT, kv_heads=2, window=r.size("sliding_window", None), qkv_bias=bias, out_bias=bias)
    mlp = MLP(r.size("intermediate_size"), r.activation("hidden_act", "gelu_pytorch_tanh"), gated=False, bias=bias)
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=r.size("hidden_size"),
        layers=(Layer(attention, mlp, pre_mixer=norm, pre_ffn=norm),) * r.count("num_hidden_layers"),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", True),
        context=r.size("max_position_embeddings", CONTEXT),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    values = write_llama_shape(config, "starcoder2", "Starcoder2ForCausalLM")
    layer = config.layers[0]
    return values | {"norm_epsilon": values.pop("rms_norm_eps"), "use_bias": layer.ffn.bias, "sliding_window": layer.mixer.window}


STARCODER2 = functions(
    "starcoder2", read, write, (STARCODER2_NAMES,), INV_FREQ,
    irrelevant=frozenset("activation_function embedding_dropout residual_dropout attention_softmax_in_fp32 "
                         "scale_attention_softmax_in_fp32".split()),
)
FAMILIES = {"starcoder2": STARCODER2}
