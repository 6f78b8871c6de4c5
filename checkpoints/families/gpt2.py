"""GPT-2, and StarCoder-1 and SantaCoder, which are GPT-2 with one key/value head.

    x = E[token] + P[position]        P is a learned table: there is no position past its last row
    x += c_proj(attention(ln_1(x)))
    x += c_proj(gelu_tanh(c_fc(ln_2(x))))        LayerNorms and all matrices with biases, the head tied

                                  matrices    rows of c_attn (GPT-2: columns)           MLP width
    GPT-2, DistilGPT-2            (in, out)   q, then k, then v                         n_inner, or 4 D where it is null
    StarCoder-1, SantaCoder       (out, in)   q of all heads, the one k, the one v      likewise
      with multi_query false      (out, in)   q k v of each head                        likewise

GPT-2's first folders lack the `transformer.` before every name, and hold the causal mask as tensors (`attn.bias`). A
size may go by transformers' general name for it, hidden_size for n_embd.

`scale_attn_by_inverse_layer_idx` divides the scores of layer i by i + 1 (the GPT-2s of Stanford): here the `scale` of
each layer's Attention. `reorder_and_upcast_attn`, which goes with it, and `attention_softmax_in_fp32` compute the same
in float32: only the rounding of 16-bit runs differs, and fused attention keeps its scores in float32 as it is.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import EPS, LAYER_NORM
from checkpoints.names.config_rows import Heads, LayerCount, four_widths
from checkpoints.names.config_table import Draft, Row, activation, field, flag, number, only, part, size
from checkpoints.names.ops import Blocks, Groups, Op, Same, Transposed
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, Table, override, rule, stripped, under
from nanollm.config import MLP, Attention, Layer, ModelConfig


def names(matrix: Op, fused: Op) -> Table:
    """`matrix`: how a matrix is stored; `fused`: how those of q, k and v are."""
    matrices = {"attn.c_proj": "mixer.o", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}
    return override(
        {},
        *under("transformer", "", {"wte": "embed", "wpe": "positions", "ln_f": "norm"}), rule("lm_head", "head"),
        *under("transformer.h.{i}", "layers.{i}", {"ln_1": "pre_mixer", "ln_2": "pre_ffn"}),
        rule("transformer.h.{i}.attn.c_attn", QKV, fused),
        *under("transformer.h.{i}", "layers.{i}", matrices, matrix),
    )


GPT2_NAMES = names(Transposed(Same), Transposed(Blocks))
MASKS = frozenset(f"{prefix}h.{{i}}.attn.{mask}" for prefix in ("", "transformer.") for mask in ("bias", "masked_bias"))
IRRELEVANT = frozenset("""
    n_ctx n_special predict_special_tokens _num_labels reorder_and_upcast_attn inference_runner max_batch_size
    max_sequence_length pad_key_length pre_allocate_kv_cache validate_runner_input
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
""".split())


class ScoreScale(Row):
    """Whether scores are divided by √d; and those of layer i by i + 1 too, where there is a key for it, `by_depth`."""

    def __init__(self, by_depth: str | None = None) -> None:
        self.by_depth = by_depth

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        usual = draft["mixer.head_dim"] ** -0.5
        scale, falls = usual if r.flag(key, True) else 1.0, self.by_depth is not None and r.flag(self.by_depth, False)
        for i, layer in enumerate(draft.layers):
            own = scale / (i + 1) if falls else scale
            layer.set("mixer.scale", None if own == usual else own)  # None stands for the usual scale

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        scales = list(draft.each("mixer.scale"))
        return {key: scales[0] is None} | ({self.by_depth: len(set(scales)) > 1} if self.by_depth else {})


class MultiQuery(Row):
    """Whether all heads share one key/value head."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        if r.flag(key, True):
            draft["mixer.kv_heads"] = 1

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.kv_heads"] == 1}


GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    keys={
        "vocab_size": size("vocab"), "n_embd": size("dim", also=("hidden_size",)),
        "n_layer": LayerCount(also=("num_hidden_layers",)),
        "n_head": Heads(also=("num_attention_heads",)),
        "n_inner": size("ffn.hidden", missing=four_widths, null=four_widths),
        "n_positions": size("positions", "context", missing=1024, also=("max_position_embeddings",)),
        "activation_function": activation("ffn.activation", missing="gelu_new"),
        "layer_norm_epsilon": number(*EPS, missing=1e-5),
        "scale_attn_weights": ScoreScale(by_depth="scale_attn_by_inverse_layer_idx"),
        "tie_word_embeddings": flag("tied", missing=True),
        "add_cross_attention": only(False),
        "attention_head_type": only("multihead"),  # "multiquery": SantaCoder's first upload, with two tensors, q and kv
    },
    layer=part(Layer, mixer=part(Attention, qkv_bias=True, out_bias=True), ffn=part(MLP, gated=False, bias=True),
               pre_mixer=LAYER_NORM, pre_ffn=LAYER_NORM),
    model=part(ModelConfig, final_norm=LAYER_NORM),
    names=(GPT2_NAMES, stripped(GPT2_NAMES, "transformer.")), ignorable=MASKS, irrelevant=IRRELEVANT,
)
GPT_BIGCODE = GPT2.but(
    "gpt_bigcode", "GPTBigCodeForCausalLM", names=(names(Same, Groups),),
    keys={
        "activation_function": activation("ffn.activation", missing="gelu_pytorch_tanh"),
        "scale_attn_weights": ScoreScale(), "scale_attn_by_inverse_layer_idx": only(False),  # it has no such key
        "multi_query": MultiQuery(),
        "num_key_value_heads": only(field("mixer.kv_heads")),  # written by transformers, which goes by multi_query
    },
    without=("attention_head_type",),
)
FAMILIES = {"gpt2": GPT2, "gpt_bigcode": GPT_BIGCODE}
