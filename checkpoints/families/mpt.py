"""MPT-7B and MPT-30B, with their chat, instruct and storywriter derivatives.

    x += out_proj(attention(norm_1(x)));  x += down_proj(gelu(up_proj(norm_2(x))))        no bias anywhere, the head tied

LayerNorms with a gain alone; ALiBi; `clip_qkv` cuts q, k and v off. `Wqkv` has all rows of q, then k, then v. What concerns attention is
a config of its own, `attn_config`.

The trainer behind MPT can do more: norms on q and k, biases, learned positions, rotation, one key/value head, other norms. No
published MPT uses that, and transformers passes it over in silence; here it is refused. `learned_pos_emb` is true in all of them and
means nothing: ALiBi turns the table off.
"""

from typing import Any

from checkpoints.families.gpt2 import read_heads
from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import IRRELEVANT, Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm

NAMES = override(
    {},
    rule("transformer.wte", "embed"),
    rule("transformer.blocks.{i}.norm_1", "layers.{i}.pre_mixer"),
    rule("transformer.blocks.{i}.attn.Wqkv", [f"layers.{{i}}.mixer.{part}" for part in "qkv"], Blocks),
    rule("transformer.blocks.{i}.attn.out_proj", "layers.{i}.mixer.o"),
    rule("transformer.blocks.{i}.norm_2", "layers.{i}.pre_ffn"),
    rule("transformer.blocks.{i}.ffn.up_proj", "layers.{i}.ffn.up"),
    rule("transformer.blocks.{i}.ffn.down_proj", "layers.{i}.ffn.down"),
    rule("transformer.norm_f", "norm"),
    rule("lm_head", "head"),
)
WIDER = 4                                                # the MLP, in widths of the model


def read_attention(r: Reader, dim: int) -> Attention:
    """What attn_config says; without one, or in an empty one, ALiBi and nothing else."""
    heads, head_dim = read_heads(r, dim, "n_heads")
    more: dict[str, Any] = {}
    inner = r.inside("attn_config")
    if inner is not None:
        inner.must("attn_type", "multihead_attention")
        inner.must("alibi", True)
        inner.must("alibi_bias_max", 8)
        for key in ("qk_ln", "prefix_lm", "attn_uses_sequence_id", "rope"):
            inner.must(key, False)
        more = {"clip": inner.number("clip_qkv", None), "scale": inner.number("softmax_scale", None)}
        inner.close(IRRELEVANT | {"attn_impl", "attn_pdrop", "is_encoder_decoder"})
    return Attention(heads, heads, head_dim, alibi=Alibi(), **more)


def read(r: Reader) -> ModelConfig:
    """One layer, repeated. Raises ConfigError for the variants that the head of the file names."""
    dim = r.size("d_model")
    r.must("expansion_ratio", WIDER)
    r.must("no_bias", True)
    r.must("norm_type", "low_precision_layernorm", "layernorm")     # the same formula; the first means bfloat16 in training
    r.must("logit_scale", None)
    norm = Norm("layer", eps=r.number("layer_norm_epsilon", 1e-5))
    layer = Layer(read_attention(r, dim), MLP(WIDER * dim, "gelu", gated=False), norm, pre_ffn=norm)
    return ModelConfig(
        vocab=r.size("vocab_size"), dim=dim, layers=(layer,) * r.count("n_layers"), final_norm=norm,
        tied=r.flag("tie_word_embeddings", True), context=r.size("max_seq_len", 2048),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Biases, or an MLP of another width, do not read back."""
    values = write_decoder(config, "mpt", "MptForCausalLM", Attention, MLP)
    attention = config.layers[0].mixer
    return values | {
        "d_model": values.pop("hidden_size"),
        "n_layers": values.pop("num_hidden_layers"),
        "n_heads": attention.heads,
        "layer_norm_epsilon": config.final_norm.eps,
        "max_seq_len": config.context,
        "attn_config": {"alibi": True, "clip_qkv": attention.clip, "softmax_scale": attention.scale},
    }


MPT = functions("mpt", read, write, (NAMES,), irrelevant=frozenset({
    "embedding_fraction", "emb_pdrop", "gradient_checkpointing", "init_config", "init_device", "learned_pos_emb", "tokenizer_name", "verbose"}))
FAMILIES = {"mpt": MPT}
