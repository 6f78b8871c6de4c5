"""Qwen, the first: Llama with biases on q, k and v, and two ways of reading past its context. 1.8B, 7B, 14B, 72B.

    use_dynamic_ntk    RoPE's θ grows in steps: α = 1, 3, 7, … for sequences up to seq_length, twice, four times as long
    use_logn_attn      the query of the n-th token is multiplied by log n / log seq_length, if that is more than 1

The 72B has neither, and theta 1e6. On disk w2 is the gate and w1 the up projection, each *half* as wide as the config
says. There are two layouts of config.json: that of August 2023 (n_embd, n_layer, n_head, ffn_hidden_size, n_positions)
and that of a month later (hidden_size, …, as transformers has them). They differ in what missing keys mean, too.

α follows from the length of the sequence. The published code takes the length of the prompt, and keeps α while it
generates, so its logits depend on where the prompt ended; here it is always the length of the sequence that is read
(nanollm/layers/scaling.py).
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import EPS
from checkpoints.names.config_rows import LayerCount, base, halved
from checkpoints.names.config_table import ABSENT, Draft, Keys, Row, field, flag, number, only, part, read_keys, size
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import MLP, Attention, Layer, LogLength, ModelConfig, Norm, Rope, SteppedNTK

QWEN1_NAMES = override(
    {},
    *under("", "", {"transformer.wte": "embed", "transformer.ln_f": "norm", "lm_head": "head"}),
    rule("transformer.h.{i}.attn.c_attn", QKV, Blocks), rule("transformer.h.{i}.attn.c_proj", "layers.{i}.mixer.o"),
    *under("transformer.h.{i}", "layers.{i}", {"ln_1": "pre_mixer", "ln_2": "pre_ffn"}),
    *under("transformer.h.{i}.mlp", "layers.{i}.ffn", {"w2": "gate", "w1": "up", "c_proj": "down"}),
)


class HeadWidth(Row):
    """Which is dim / heads, and said all the same."""

    def __init__(self, dim: str, heads: str) -> None:
        self.expected = f"{dim} / {heads}"

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        dim, heads, width = draft["dim"], draft["mixer.heads"], r.size(key, 128)
        if heads * width != dim:
            raise r.error(key, f"{self.expected}, which is {dim} / {heads}")
        draft["mixer.kv_heads"], draft["mixer.head_dim"] = heads, width

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.head_dim"]}


class Stretch(Row):
    """Both ways of reading past `seq_length`, which is needed for either. `missing`: what either switch then means."""

    def __init__(self, missing: bool) -> None:
        self.missing = missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        steps, logn = (r.flag(name, self.missing) for name in ("use_dynamic_ntk", "use_logn_attn"))
        original = r.size(key) if steps or logn else r.size(key, None)
        draft["mixer.rope.scaling"] = part(SteppedNTK, original=original) if steps else None
        draft["mixer.growth"] = part(LogLength, original=original) if logn else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """A stretch and log n with different contexts do not read back."""
        original, logn = draft["mixer.rope.scaling.original"], draft["mixer.growth.original"]
        steps = original is not ABSENT
        context = next((one for one in (original, logn) if one is not ABSENT), draft["context"])
        return {key: context, "use_dynamic_ntk": steps, "use_logn_attn": logn is not ABSENT}


def layout(dim: str, layers: str, heads: str, hidden: str, context: str, eps: float, stretched: bool) -> Keys:
    """A layout of config.json: what it calls the sizes, and what is meant by keys that are missing."""
    return {
        "vocab_size": size("vocab"), "padded_vocab_size": only(field("vocab")),
        dim: size("dim"), layers: LayerCount(), heads: size("mixer.heads"), "kv_channels": HeadWidth(dim, heads),
        hidden: halved("ffn.hidden", missing=22016),
        context: size("context", missing=8192),
        "layer_norm_epsilon": number(*EPS, missing=eps),
        "rotary_emb_base": base("mixer.rope.theta", missing=10_000.0),
        "rope_theta": only(field("mixer.rope.theta")),  # said twice in the 72B
        "seq_length": Stretch(missing=stretched),
        "ffn_inter_padding_size": only(lambda draft: 2 * draft["ffn.hidden"]),  # what a server pads it to
        "tie_word_embeddings": flag("tied", missing=False), "rotary_pct": only(1.0, written=True),
        "no_bias": only(True, written=True), "scale_attn_weights": only(True, written=True),
        "pos_emb": only("rotary"), "activation": only("swiglu"), "n_inner": only(None),
        "apply_residual_connection_post_layernorm": only(False), "use_cache_quantization": only(False),
    }


FIRST = layout("n_embd", "n_layer", "n_head", "ffn_hidden_size", "n_positions", eps=1e-5, stretched=False)


class TwoLayouts(Family):
    """`keys` are the second layout, in which it is written; n_embd is in the first alone."""

    def read(self, r: Reader) -> ModelConfig:
        return read_keys(FIRST if "n_embd" in r.values else self.keys, r, self.model, self.layer)


QWEN1 = TwoLayouts(
    "qwen", "QWenLMHeadModel",
    keys=layout("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", eps=1e-6, stretched=True),
    layer=part(Layer, mixer=part(Attention, rope=part(Rope), qkv_bias=True), ffn=part(MLP),
               pre_mixer=part(Norm), pre_ffn=part(Norm)),
    names=(QWEN1_NAMES,),
    ignorable=frozenset({"transformer.h.{i}.attn.rotary_emb.inv_freq", "transformer.rotary_emb.inv_freq"}),
    irrelevant=frozenset("emb_dropout_prob bf16 fp16 fp32 onnx_safe params_dtype softmax_in_fp32 tokenizer_type "
                         "use_cache_kernel use_flash_attn".split()),
)
FAMILIES = {"qwen": QWEN1}
