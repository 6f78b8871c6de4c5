"""StarCoder2: Llama's order of things with older parts. 3B, 7B, 15B; Lozhkov et al. 2024, arXiv 2402.19173.

    x += o(attention(norm(x)));  x += proj(gelu(fc(norm(x))))    LayerNorms and matrices with bias, the gelu's tanh form

Few key/value heads (2 or 4), RoPE in the half layout, a window of 4096 on every layer. 3B and 7B are tied, 15B is not.
StarCoder the first is a GPT-2 with one key/value head and another lineage.
"""

from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_table import activation, field, flag, number, only, part, size
from checkpoints.names.table import override, under
from nanollm.config import MLP

STARCODER2_NAMES = override(
    LLAMA_NAMES, *under("model.layers.{i}.mlp", "layers.{i}.ffn", {"c_fc": "up", "c_proj": "down"}))

STARCODER2 = LLAMA_SHAPE.but(
    "starcoder2", "Starcoder2ForCausalLM", names=(STARCODER2_NAMES,),
    norm=LAYER_NORM, layer={"ffn": part(MLP, gated=False)},
    missing={"num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 4096},
    keys={
        "hidden_act": activation("ffn.activation", missing="gelu_pytorch_tanh"),
        "norm_epsilon": number(*EPS, missing=1e-5),
        "use_bias": flag("mixer.qkv_bias", "mixer.out_bias", "ffn.bias", missing=True),  # the norms always have theirs
        "sliding_window": size("mixer.window", missing=None),
        # what the hub's configs also say
        "layer_norm_epsilon": only(field("final_norm.eps")), "norm_type": only("layer_norm"),
        "mlp_type": only("default"), "scale_attn_weights": only(True),
    },
    without=("rms_norm_eps",), irrelevant=frozenset({"activation_function", "embedding_dropout", "residual_dropout"}),
)
FAMILIES = {"starcoder2": STARCODER2}
