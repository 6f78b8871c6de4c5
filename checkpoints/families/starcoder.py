"""StarCoder2: Llama's order of things with older parts. 3B, 7B, 15B; Lozhkov et al. 2024, arXiv 2402.19173.

    x += o(attention(norm(x)));  x += proj(gelu(fc(norm(x))))        LayerNorms with bias, a bias on every matrix, the gelu's tanh form

Few key/value heads (2 or 4), RoPE in the half layout, a window of 4096 on every layer. 3B and 7B are tied, 15B is not.
StarCoder the first is a GPT-2 with one key/value head and another lineage.
"""

from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_NAMES, LLAMA_SHAPE, kv_heads
from checkpoints.names.config_table import activation, field, flag, number, only, part, size
from checkpoints.names.table import override, rule
from nanollm.config import MLP

STARCODER2_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.mlp.c_fc", "layers.{i}.ffn.up"),
    rule("model.layers.{i}.mlp.c_proj", "layers.{i}.ffn.down"),
)

STARCODER2 = LLAMA_SHAPE.but(
    "starcoder2", "Starcoder2ForCausalLM", names=(STARCODER2_NAMES,),
    norm=LAYER_NORM, layer={"ffn": part(MLP, gated=False)},
    keys={
        "num_key_value_heads": kv_heads(missing=2),
        "hidden_act": activation("ffn.activation", missing="gelu_pytorch_tanh"),
        "norm_epsilon": number(*EPS, missing=1e-5),
        "use_bias": flag("mixer.qkv_bias", "mixer.out_bias", "ffn.bias", missing=True),  # of all matrices; the norms always have theirs
        "sliding_window": size("mixer.window", missing=None),
        "tie_word_embeddings": flag("tied", missing=True),
        "max_position_embeddings": size("context", missing=4096),
        "layer_norm_epsilon": only(field("final_norm.eps")),  # from here on what the hub's configs also say
        "norm_type": only("layer_norm"),
        "mlp_type": only("default"),
        "scale_attn_weights": only(True),
    },
    without=("rms_norm_eps",),
    irrelevant=frozenset("activation_function embedding_dropout residual_dropout attention_softmax_in_fp32 "
                         "scale_attention_softmax_in_fp32".split()),
)
FAMILIES = {"starcoder2": STARCODER2}
