"""BLOOM and BLOOMZ, 560M to 176B.

    x = norm(E[token])                                           a LayerNorm right after the embedding: embed_norm
    x += dense(attention(norm1(x)));  x += mlp(norm2(x))         LayerNorms and all matrices with biases, the head tied

ALiBi in place of a rotation; 176B has 112 heads, which is no power of two. The MLP is 4 D wide and plain, its GELU the
tanh form with √(2/π) cut to eight digits. `query_key_value` has q k v of one head after the other. On the hub the names
lack `transformer.`. The width is `n_embed` or hidden_size, the number of heads `num_attention_heads` or n_head, by the
age of the folder. `seq_length`, where there is one, is the length it was trained at. `slow_but_exact` sums as the
training did, in slices of `pretraining_tp`: it changes the rounding only.
"""

from checkpoints.families.family import Family
from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_NORMS
from checkpoints.names.config_rows import Heads, LayerCount, four_widths
from checkpoints.names.config_table import Follows, flag, number, only, part, size
from checkpoints.names.ops import Groups
from checkpoints.names.table import QKV, override, rule, stripped, under
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig

NAMES = override(
    {},
    *under("transformer", "", {"word_embeddings": "embed", "word_embeddings_layernorm": "embed_norm", "ln_f": "norm"}),
    rule("lm_head", "head"),
    *under("transformer.h.{i}", "layers.{i}", LLAMA_NORMS),
    rule("transformer.h.{i}.self_attention.query_key_value", QKV, Groups),
    rule("transformer.h.{i}.self_attention.dense", "layers.{i}.mixer.o"),
    *under("transformer.h.{i}.mlp", "layers.{i}.ffn", {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}),
)
BLOOM = Family(
    "bloom", "BloomForCausalLM",
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim", also=("n_embed",)),
        "n_layer": LayerCount(also=("num_hidden_layers",)),
        "n_head": Heads(also=("num_attention_heads",)),
        "ffn.hidden": Follows(four_widths),
        "layer_norm_epsilon": number(*EPS, "embed_norm.eps", missing=1e-5),
        "tie_word_embeddings": flag("tied", missing=True),
        "seq_length": size("context", missing=None),
        "apply_residual_connection_post_layernorm": only(False),  # no published BLOOM adds to the norm's output
        "n_inner": only(None),
    },
    layer=part(
        Layer, mixer=part(Attention, alibi=part(Alibi), qkv_bias=True, out_bias=True),
        ffn=part(MLP, activation="gelu_tanh", gated=False, bias=True), pre_mixer=LAYER_NORM, pre_ffn=LAYER_NORM,
    ),
    model=part(ModelConfig, embed_norm=LAYER_NORM, final_norm=LAYER_NORM),
    names=(NAMES, stripped(NAMES, "transformer.")),
    irrelevant=frozenset({"masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv",
                          "slow_but_exact", "unk_token_id"}),
)
FAMILIES = {"bloom": BLOOM}
