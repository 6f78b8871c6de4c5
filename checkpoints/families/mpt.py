"""MPT-7B and MPT-30B, with their chat, instruct and storywriter derivatives.

    x += out_proj(attention(norm_1(x)));  x += down_proj(gelu(up_proj(norm_2(x))))       no bias anywhere, the head tied

LayerNorms with a gain alone; ALiBi; `clip_qkv` cuts q, k and v off. `Wqkv` has all rows of q, then k, then v. What
concerns attention is a config of its own, `attn_config`.

The trainer behind MPT can do more: norms on q and k, biases, learned positions, rotation, one key/value head, other
norms. No published MPT uses that, and transformers passes it over in silence; here it is refused. `learned_pos_emb` is
true in all of them and means nothing: ALiBi turns the table off.
"""

from checkpoints.families.family import Family
from checkpoints.families.llama import EPS
from checkpoints.names.config_rows import Heads, Inside, LayerCount, four_widths
from checkpoints.names.config_table import Follows, flag, number, only, part, size
from checkpoints.names.ops import Blocks
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm

NAMES = override(
    {},
    *under("", "", {"transformer.wte": "embed", "transformer.norm_f": "norm", "lm_head": "head"}),
    *under("transformer.blocks.{i}", "layers.{i}", {"norm_1": "pre_mixer", "norm_2": "pre_ffn"}),
    rule("transformer.blocks.{i}.attn.Wqkv", QKV, Blocks),
    rule("transformer.blocks.{i}.attn.out_proj", "layers.{i}.mixer.o"),
    *under("transformer.blocks.{i}.ffn", "layers.{i}.ffn", {"up_proj": "up", "down_proj": "down"}),
)

NORM = part(Norm, kind="layer")
ATTENTION = {
    "alibi": only(True, written=True), "alibi_bias_max": only(8), "attn_type": only("multihead_attention"),
    **dict.fromkeys(("qk_ln", "prefix_lm", "attn_uses_sequence_id", "rope"), only(False)),
    "clip_qkv": number("mixer.clip", missing=None), "softmax_scale": number("mixer.scale", missing=None),
}
MPT = Family(
    "mpt", "MptForCausalLM",
    keys={
        "vocab_size": size("vocab"), "d_model": size("dim"), "n_layers": LayerCount(), "n_heads": Heads(),
        "expansion_ratio": only(4), "ffn.hidden": Follows(four_widths),
        "attn_config": Inside(ATTENTION, irrelevant=frozenset({"attn_impl", "is_encoder_decoder"})),
        "layer_norm_epsilon": number(*EPS, missing=1e-5),
        "tie_word_embeddings": flag("tied", missing=True), "max_seq_len": size("context", missing=2048),
        "norm_type": only("low_precision_layernorm", "layernorm"),  # one formula; the first: in bfloat16 when training
        "no_bias": only(True), "logit_scale": only(None),
    },
    layer=part(Layer, mixer=part(Attention, alibi=part(Alibi)), ffn=part(MLP, activation="gelu", gated=False),
               pre_mixer=NORM, pre_ffn=NORM),
    model=part(ModelConfig, final_norm=NORM), names=(NAMES,),
    irrelevant=frozenset({"embedding_fraction", "emb_pdrop", "init_config", "init_device", "learned_pos_emb",
                          "tokenizer_name", "verbose"}),
)
FAMILIES = {"mpt": MPT}
