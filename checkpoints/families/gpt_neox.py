"""GPT-NeoX-20B, Pythia; Dolly 2, a Pythia trained on; RedPajama-INCITE, of the same shape; GPT-NeoX Japanese (ABEJA).

    parallel      x + attention(norm1(x)) + mlp(norm2(x))        use_parallel_residual true: GPT-NeoX, Pythia, Dolly
    sequential    x += attention(norm1(x));  x += mlp(norm2(x))  false: RedPajama-INCITE

LayerNorms with bias; biases on the MLP always, on attention by `attention_bias`; RoPE in the half layout on the first
quarter of each head (`rotary_pct`), base `rotary_emb_base`; MLP plain, exact GELU (Pythia) or its tanh form
("gelu_fast", GPT-NeoX-20B); the head is not tied and is called `embed_out`. The rows of `query_key_value` are q k v of
head 0, q k v of head 1 … (Groups, with as many key/value heads as heads). Old folders hold the causal mask, and the
number in place of −∞, as tensors.

gpt_neox_japanese is sequential, and has no bias but one: on what attention says in the last layer. Its MLP is
`intermediate_multiple_size` times as wide as the model; the head is tied.
"""

from typing import Any

from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_NORMS, LLAMA_SHAPE
from checkpoints.names.config_rows import Expand, Heads, RopeKeys
from checkpoints.names.config_table import Draft, Row, activation, flag, number, part
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, moved, override, rule, under
from nanollm.config import MLP

NAMES = override(
    {},
    *under("", "", {"gpt_neox.embed_in": "embed", "gpt_neox.final_layer_norm": "norm", "embed_out": "head"}),
    *under("gpt_neox.layers.{i}", "layers.{i}", LLAMA_NORMS),
    rule("gpt_neox.layers.{i}.attention.query_key_value", QKV, Groups),
    rule("gpt_neox.layers.{i}.attention.dense", "layers.{i}.mixer.o"),
    *under("gpt_neox.layers.{i}.mlp", "layers.{i}.ffn", {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}),
)
BUFFERS = frozenset(
    f"gpt_neox.layers.{{i}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq"))

GPT_NEOX = LLAMA_SHAPE.but(
    "gpt_neox", "GPTNeoXForCausalLM", names=(NAMES,), ignorable=BUFFERS,
    norm=LAYER_NORM, layer={"ffn": part(MLP, gated=False, bias=True)},
    keys={
        "num_attention_heads": Heads(),
        "hidden_act": activation("ffn.activation", missing="gelu"),
        "use_parallel_residual": flag("parallel", missing=True),
        "attention_bias": flag("mixer.qkv_bias", "mixer.out_bias", missing=True),
        "layer_norm_eps": number(*EPS, missing=1e-5),
        "rope_parameters": RopeKeys(fraction=0.25, theta_key="rotary_emb_base", fraction_key="rotary_pct"),
    },
    without=("num_key_value_heads", "head_dim", "rms_norm_eps"),
    irrelevant=frozenset({"attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob"}),
)


class LastHasBias(Row):
    """No key: a bias on o, in the last layer alone."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        draft.layers[-1].set(key, True)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {}


JAPANESE_NAMES = override(
    moved(NAMES, "gpt_neox.", "gpt_neox_japanese."),
    rule("gpt_neox_japanese.layers.{i}.attention.dense_bias", "layers.{i}.mixer.o.bias"),
    rule("embed_out", "head"),
)
GPT_NEOX_JAPANESE = GPT_NEOX.but(
    "gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", names=(JAPANESE_NAMES,),
    layer={"ffn.bias": False, "mixer.qkv_bias": False}, missing={"tie_word_embeddings": True},
    keys={
        "intermediate_multiple_size": Expand(4, "ffn.hidden"), "mixer.out_bias": LastHasBias(),
        "rope_parameters": RopeKeys(fraction=1.0, theta_key="rotary_emb_base", fraction_key="rotary_pct"),
    },
    without=("intermediate_size", "use_parallel_residual", "attention_bias"),
    ignorable=frozenset(name.replace("gpt_neox.", "gpt_neox_japanese.") for name in BUFFERS),
    irrelevant=frozenset({"hidden_dropout"}),
)
FAMILIES = {"gpt_neox": GPT_NEOX, "gpt_neox_japanese": GPT_NEOX_JAPANESE}
