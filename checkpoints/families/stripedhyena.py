"""StripedHyena: Hyena layers (nanollm/layers/hyena.py) with attention of Llama's shape between them.

    StripedHyena-7B    Hessian and Nous; every other layer attends; key/value heads = heads / proj_groups (4); no biases
                       in attention; RoPE theta 500000
    Evo-1              reads DNA; layers 8, 16 and 24 attend; biases; gelu; tied; `-131k`: RoPE angles divided by 16

`use_flash_rmsnorm` says which norm it is: true, as published and where it is missing, is FlashAttention's RMSNorm;
false is the one that the repository has itself, with ε outside the root. Both have their gain under the name `scale`.

Each layer is in one of `attn_layer_idxs` and `hyena_layer_idxs`; the published list of Hyena layers goes one beyond the
last layer, which nothing builds. As in the published code the projections are rounded to the weights' dtype and the
filters computed in float32. Tensor names begin with `backbone.` on the hub; those of the first repository do not.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import EPS
from checkpoints.names.config_rows import Kinds, LayerCount, base
from checkpoints.names.config_table import ABSENT, Draft, Key, Row, choice, field, flag, number, only, part, size
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, override, rule, stripped, under
from nanollm.config import MLP, Attention, Hyena, Layer, Linear, Norm, Rope

BLOCK = {
    "pre_norm.scale": "pre_mixer.gain", "post_norm.scale": "pre_ffn.gain",
    "projections": "mixer.in_proj", "out_filter_dense": "mixer.out_proj",
    "filter.short_filter_weight": "mixer.conv1d.weight", "filter.short_filter_bias": "mixer.conv1d.bias",
    "filter.poles": "mixer.poles", "filter.residues": "mixer.residues", "filter.D": "mixer.D",
    "inner_mha_cls.out_proj": "mixer.o", "mlp.l1": "ffn.gate", "mlp.l2": "ffn.up", "mlp.l3": "ffn.down",
}
NAMES = override(
    {},
    *under("backbone", "", {"embedding_layer": "embed", "norm.scale": "norm.gain", "unembed": "head"}),
    *under("backbone.blocks.{i}", "layers.{i}", BLOCK),
    rule("backbone.blocks.{i}.inner_mha_cls.Wqkv", QKV, Blocks),
)


def read_kinds(r: Reader, layers: int) -> list[str]:
    """What each layer is."""
    named = {}
    for key in ("attn_layer_idxs", "hyena_layer_idxs"):
        named[key] = r.get(key)
        if not isinstance(named[key], list) or not all(type(i) is int and i >= 0 for i in named[key]):
            raise r.error(key, "a list of whole numbers")
    attends, filters = (set(indices) & set(range(layers)) for indices in named.values())
    if attends & filters or len(attends | filters) < layers:
        raise r.error("hyena_layer_idxs", f"those of the {layers} layers that attn_layer_idxs does not name")
    return ["attention" if i in attends else "hyena" for i in range(layers)]


def write_kinds(kinds: list[str]) -> dict[str, Any]:
    return {key: [i for i, kind in enumerate(kinds) if kind == wanted]
            for key, wanted in (("attn_layer_idxs", "attention"), ("hyena_layer_idxs", "hyena"))}


class HeadsOfBoth(Row):
    """Heads of attention, `proj_groups` of which share a key; and of Hyena: as many, or one if nothing is split."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        dim, heads, groups = draft["dim"], r.size(key), r.size("proj_groups", 4)
        if dim % heads or heads % groups:
            raise r.error(key, f"a divisor of hidden_size ({dim}) and a multiple of proj_groups ({groups})")
        split = r.flag("column_split_hyena", True)
        draft["mixer.kv_heads"], draft["mixer.head_dim"] = heads // groups, dim // heads
        for layer in draft.layers:
            layer.set("mixer.heads", heads if split or layer.get("mixer").kind is Attention else 1)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Where no layer attends, in a shape that fits."""
        heads = {layer.get("mixer").kind: layer.get("mixer.heads") for layer in reversed(draft.layers)}  # of the first
        attention, hyena = (heads.get(kind, draft["mixer.heads"]) for kind in (Attention, Hyena))
        kv_heads = attention if draft["mixer.kv_heads"] is ABSENT else draft["mixer.kv_heads"]
        return {key: attention, "proj_groups": attention // kv_heads, "column_split_hyena": hyena == attention}


class Divided(Row):
    """Whether positions are divided, and by what."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        divided, factor = r.flag(key, False), r.number("rotary_emb_scaling_factor", 1.0)
        draft["mixer.rope.scaling"] = Linear(factor) if divided else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        factor = draft["mixer.rope.scaling.factor"]
        return {key: factor is not ABSENT, "rotary_emb_scaling_factor": 1.0 if factor is ABSENT else factor}


MIXERS = {"hyena": part(Hyena), "attention": part(Attention, rope=part(Rope))}
NORMS = {True: part(Norm, cast_after_gain=True), False: part(Norm, kind="rms_outer")}
STRIPEDHYENA = Family(
    "stripedhyena", "StripedHyenaModelForCausalLM",
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim", "mixer.inner"), "num_layers": LayerCount(),
        "attn_layer_idxs": Kinds("mixer", MIXERS, read_kinds, write_kinds),
        "num_attention_heads": HeadsOfBoth(),
        "qkv_proj_bias": flag("mixer.qkv_bias", missing=False),
        "mha_out_proj_bias": flag("mixer.out_bias", missing=False),
        "rotary_emb_base": base("mixer.rope.theta", missing=500_000.0),
        "use_interpolated_rotary_pos_emb": Divided(),
        "state_size": size("mixer.state", missing=2), "short_filter_length": size("mixer.conv", missing=3),
        "num_filters": only(field("dim"), written=True), "hyena_filter_groups": only(1, written=True),
        "short_filter_bias": only(True, written=True),
        "inner_mlp_size": size("ffn.hidden", missing=14336),
        "mlp_activation": choice({"silu": "silu", "gelu": "gelu"}, "ffn.activation", missing="silu"),
        "use_flash_rmsnorm": Key(Reader.flag, "final_norm", "pre_mixer", "pre_ffn", missing=True,
                                 to=NORMS.__getitem__, of=lambda norm: norm.get("kind") == "rms"),
        "eps": number(*EPS, missing=1e-5),
        "final_norm": only(True, written=True),
        "tie_embeddings": flag("tied", missing=False), "max_seqlen": size("context", missing=32768),
        "smeared_gqa": only(False),
    },
    layer=part(Layer, ffn=part(MLP)), names=(NAMES, stripped(NAMES, "backbone.")),
    ignorable=frozenset(f"{start}blocks.{{i}}.inner_mha_cls.rotary_emb.inv_freq" for start in ("backbone.", "")),
    irrelevant=frozenset(  # which code runs it, in what precision, on how many processes; and tie_embeddings counts
        "attn_block_dtype column_split depthwise_dtype hyena_block_dtype inference_mode log_intermediate_values "
        "low_mem_mode make_vocab_size_divisible_by max_batch_size mlp_dtype mlp_init_method mlp_output_init_method "
        "model_name model_parallel_size pipe_parallel_size prefill_style split_k0 tie_word_embeddings tokenizer_type "
        "use_flash_attention_2 use_flash_attn use_flash_depthwise use_flashfft use_laughing_hyena vocab_file".split()),
)
FAMILIES = {"stripedhyena": STRIPEDHYENA}
