"""StripedHyena: Hyena layers (nanollm/layers/hyena.py) with attention of Llama's shape between them. 7B Hessian and Nous; Evo-1, which reads DNA.

    StripedHyena-7B    every other layer attends; key/value heads = heads / proj_groups (4); no biases in attention; RoPE theta 500000
    Evo-1              layers 8, 16 and 24 attend; biases; gelu; head and embedding tied; `-131k`: RoPE angles divided by 16

Which norm it is says `use_flash_rmsnorm`: true, as published and where it is missing, is FlashAttention's RMSNorm; false is the one that
the repository has itself, with ε outside the root. Both have their gain under the name `scale`.

`attn_layer_idxs` and `hyena_layer_idxs` must share the layers out; the published list of Hyena layers goes one beyond the last, which
nothing builds. The projections are rounded to the weights' dtype and the filters reckoned in float32, as the published code does.
Tensor names begin with `backbone.` on the hub; those of the first repository do not.
"""

from typing import Any

from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule, stripped
from nanollm.config import MLP, Attention, Hyena, Layer, Linear, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

NAMES = override(
    {},
    rule("backbone.embedding_layer", "embed"),
    rule("backbone.blocks.{i}.pre_norm.scale", "layers.{i}.pre_mixer.gain"),
    rule("backbone.blocks.{i}.projections", "layers.{i}.mixer.in_proj"),
    rule("backbone.blocks.{i}.filter.short_filter_weight", "layers.{i}.mixer.conv1d.weight"),
    rule("backbone.blocks.{i}.filter.short_filter_bias", "layers.{i}.mixer.conv1d.bias"),
    rule("backbone.blocks.{i}.filter.poles", "layers.{i}.mixer.poles"),
    rule("backbone.blocks.{i}.filter.residues", "layers.{i}.mixer.residues"),
    rule("backbone.blocks.{i}.filter.D", "layers.{i}.mixer.D"),
    rule("backbone.blocks.{i}.out_filter_dense", "layers.{i}.mixer.out_proj"),
    rule("backbone.blocks.{i}.inner_mha_cls.Wqkv", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Blocks),
    rule("backbone.blocks.{i}.inner_mha_cls.out_proj", "layers.{i}.mixer.o"),
    rule("backbone.blocks.{i}.post_norm.scale", "layers.{i}.pre_ffn.gain"),
    rule("backbone.blocks.{i}.mlp.l1", "layers.{i}.ffn.gate"),
    rule("backbone.blocks.{i}.mlp.l2", "layers.{i}.ffn.up"),
    rule("backbone.blocks.{i}.mlp.l3", "layers.{i}.ffn.down"),
    rule("backbone.norm.scale", "norm.gain"),
    rule("backbone.unembed", "head"),
)


def read_kinds(r: Reader) -> list[bool]:
    """For each layer, whether it attends."""
    count, named = r.count("num_layers"), {}
    for key in ("attn_layer_idxs", "hyena_layer_idxs"):
        named[key] = r.get(key)
        if not isinstance(named[key], list) or not all(type(i) is int and i >= 0 for i in named[key]):
            raise r.error(key, "a list of whole numbers")
    attends, filters = (set(indices) & set(range(count)) for indices in named.values())
    if attends & filters or len(attends | filters) < count:
        raise r.error("hyena_layer_idxs", f"those of the {count} layers that attn_layer_idxs does not name")
    return [i in attends for i in range(count)]


def read(r: Reader) -> ModelConfig:
    """Missing keys mean what they mean on the hub, which is not always what they mean in the first repository."""
    dim, heads, groups = r.size("hidden_size"), r.size("num_attention_heads"), r.size("proj_groups", 4)
    if dim % heads or heads % groups:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim}) and a multiple of proj_groups ({groups})")
    for key, only in (("hyena_filter_groups", 1), ("num_filters", dim), ("short_filter_bias", True), ("final_norm", True), ("smeared_gqa", False)):
        r.must(key, only)
    factor, divided = r.number("rotary_emb_scaling_factor", 1.0), r.flag("use_interpolated_rotary_pos_emb", False)
    attention = Attention(
        heads, heads // groups, dim // heads, Rope(r.number("rotary_emb_base", 500_000.0, above=1), scaling=Linear(factor) if divided else None),
        qkv_bias=r.flag("qkv_proj_bias", False), out_bias=r.flag("mha_out_proj_bias", False),
    )
    hyena = Hyena(dim, heads if r.flag("column_split_hyena", True) else 1, r.size("state_size", 2), r.size("short_filter_length", 3))
    eps = r.number("eps", 1e-5)
    norm = Norm(eps=eps, cast_after_gain=True) if r.flag("use_flash_rmsnorm", True) else Norm("rms_outer", eps=eps)
    mlp = MLP(r.size("inner_mlp_size", 14336), r.must("mlp_activation", "silu", "gelu"))
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=dim,
        layers=tuple(Layer(attention if attends else hyena, mlp, pre_mixer=norm, pre_ffn=norm) for attends in read_kinds(r)),
        final_norm=norm,
        tied=r.flag("tie_embeddings", False),
        context=r.size("max_seqlen", 32768),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Attention is written as the first layer that attends has it; without one, in a shape that fits."""
    base = write_decoder(config, "stripedhyena", "StripedHyenaModelForCausalLM", object, MLP)
    attends = [isinstance(layer.mixer, Attention) for layer in config.layers]
    hyena, attention = (next((layer.mixer for layer in config.layers if isinstance(layer.mixer, kind)), None) for kind in (Hyena, Attention))
    if hyena is None or (attention is not None and attention.rope is None):
        raise ConfigError("StripedHyena wants a layer with Hyena, and RoPE where it attends")
    heads = attention.heads if attention else hyena.heads
    attention = attention or Attention(heads, heads, config.dim // heads, Rope())
    scaling, mlp = attention.rope.scaling, config.layers[0].ffn
    for key in ("num_hidden_layers", "tie_word_embeddings"):
        del base[key]
    return base | {
        "num_layers": len(attends),
        "attn_layer_idxs": [i for i, yes in enumerate(attends) if yes],
        "hyena_layer_idxs": [i for i, yes in enumerate(attends) if not yes],
        "tie_embeddings": config.tied,
        "num_attention_heads": heads,
        "proj_groups": heads // attention.kv_heads,
        "qkv_proj_bias": attention.qkv_bias,
        "mha_out_proj_bias": attention.out_bias,
        "rotary_emb_base": attention.rope.theta,
        "use_interpolated_rotary_pos_emb": isinstance(scaling, Linear),
        "rotary_emb_scaling_factor": scaling.factor if isinstance(scaling, Linear) else 1.0,
        "num_filters": config.dim,
        "hyena_filter_groups": 1,
        "column_split_hyena": hyena.heads == heads,
        "state_size": hyena.state,
        "short_filter_length": hyena.conv,
        "short_filter_bias": True,
        "inner_mlp_size": mlp.hidden,
        "mlp_activation": mlp.activation,
        "eps": config.final_norm.eps,
        "use_flash_rmsnorm": config.final_norm.kind == "rms",
        "final_norm": True,
        "max_seqlen": config.context,
    }


STRIPEDHYENA = functions(
    "stripedhyena", read, write, (NAMES, stripped(NAMES, "backbone.")),
    frozenset({"backbone.blocks.{i}.inner_mha_cls.rotary_emb.inv_freq", "blocks.{i}.inner_mha_cls.rotary_emb.inv_freq"}),
    irrelevant=frozenset(                                # which code runs it, in what precision, on how many processes; and tie_embeddings counts
        "attn_block_dtype column_split depthwise_dtype hyena_block_dtype inference_mode log_intermediate_values low_mem_mode make_vocab_size_divisible_by "
        "max_batch_size mlp_dtype mlp_init_method mlp_output_init_method model_name model_parallel_size pipe_parallel_size prefill_style split_k0 "
        "tie_word_embeddings tokenizer_type use_flash_attention_2 use_flash_attn use_flash_depthwise use_flashfft use_laughing_hyena vocab_file".split()),
)
FAMILIES = {"stripedhyena": STRIPEDHYENA}
