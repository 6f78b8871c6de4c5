"""Falcon: 7B, 40B, 180B, Falcon2-11B and the RefinedWeb models rw-1b and rw-7b.

                   norms of a layer                     wiring        key/value heads     position    biases
    7B             one, input_layernorm                 parallel      1                   RoPE        of norms only
    40B, 180B      two, ln_attn and ln_mlp              parallel      8                   RoPE        of norms only
    11B            one, input_layernorm                 parallel      8                   RoPE        of norms only
    rw-1b, rw-7b   input_, post_attention_layernorm     sequential    as many as heads    ALiBi       everywhere

Everything else is alike: LayerNorms with bias, exact GELU in a plain MLP, the head tied, and rows of `query_key_value`
by key/value head: the queries that read it, its key, its value. `new_decoder_architecture` is 40B's, 180B's and 11B's;
without it, `multi_query` and `parallel_attn` say the rest. ALiBi is made in bfloat16 and scaled with the scores.

The first uploads have model_type RefinedWeb (40B) or RefinedWebModel (the others), and n_head, n_layer, n_head_kv for
today's num_attention_heads, num_hidden_layers, num_kv_heads. Only the new architecture has n_head_kv there.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_NORMS
from checkpoints.names.config_rows import Heads, LayerCount, RopeKeys, four_widths
from checkpoints.names.config_table import Draft, Row, activation, flag, number, one_name, only, part, size
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Rope

ONE_NORM_NAMES = override(
    {},
    *under("", "", {"transformer.word_embeddings": "embed", "transformer.ln_f": "norm", "lm_head": "head"}),
    *under("transformer.h.{i}", "layers.{i}", LLAMA_NORMS),
    rule("transformer.h.{i}.self_attention.query_key_value", QKV, Groups),
    rule("transformer.h.{i}.self_attention.dense", "layers.{i}.mixer.o"),
    *under("transformer.h.{i}.mlp", "layers.{i}.ffn", {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}),
)
TWO_NORMS_NAMES = override(
    ONE_NORM_NAMES, *under("transformer.h.{i}", "layers.{i}", {"ln_attn": "pre_mixer", "ln_mlp": "pre_ffn"}))
INV_FREQ = frozenset(f"transformer.h.{{i}}.self_attention.{rotary}.inv_freq"
                     for rotary in ("rotary", "maybe_rotary", "rotary_emb"))


class Wiring(Row):
    """The four rows of the table above, and what lies between them where transformers can run it.

    What is parallel is written as the new architecture, but 7B with its one norm and one key/value head as the old."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The number of key/value heads, the wiring of a layer, and whether it has one norm or two."""
        heads, stated = draft["mixer.heads"], r.size(one_name(r, "num_kv_heads", "n_head_kv"), None)
        parallel, multi_query = r.flag("parallel_attn", True), r.flag("multi_query", True)
        if r.flag(key, "n_head_kv" in r.values):
            r.must("parallel_attn", True)  # the other wiring exists without it only
            kv_heads, two = stated or heads, r.must("num_ln_in_parallel_attn", 2, 1, None) != 1
        else:
            if not multi_query and stated not in (None, heads):
                raise r.error("num_kv_heads", f"num_attention_heads ({heads}) where multi_query is false")
            r.must("num_ln_in_parallel_attn", None, 1)
            kv_heads, two = 1 if multi_query else heads, not parallel
        draft["mixer.kv_heads"], draft["parallel"] = kv_heads, parallel
        draft["pre_ffn"] = LAYER_NORM if two else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The keys of the new architecture where the model needs it, else those of the old."""
        kv_heads, parallel, two = draft["mixer.kv_heads"], draft["parallel"], draft["pre_ffn"] is not None
        new = parallel and (two or kv_heads > 1)
        counts = {"num_kv_heads": kv_heads, "num_ln_in_parallel_attn": 2 if two else 1}
        return {key: new, "parallel_attn": parallel, "multi_query": kv_heads == 1,
                **(counts if new else dict.fromkeys(counts))}


class RopeOrAlibi(RopeKeys):
    """RoPE's keys stand there beside ALiBi too, and mean nothing then."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """RoPE, or ALiBi in its place where `alibi` is true."""
        super().read(r, draft, key)
        if r.flag(key, False):
            draft["mixer.rope"], draft["mixer.alibi"] = None, part(Alibi, coarse=True)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """RoPE's keys, and `alibi`."""
        return super().write(draft, key) | {key: draft["mixer.alibi"] is not None}


FALCON = Family(
    "falcon", "FalconForCausalLM",
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim"), "num_hidden_layers": LayerCount(also=("n_layer",)),
        "num_attention_heads": Heads(also=("n_head",)),
        "new_decoder_architecture": Wiring(),
        "max_position_embeddings": size("context", missing=2048),
        "alibi": RopeOrAlibi(),
        "bias": flag("mixer.qkv_bias", "mixer.out_bias", "ffn.bias", missing=False),
        "ffn_hidden_size": size("ffn.hidden", missing=four_widths, null=four_widths),
        "activation": activation("ffn.activation", missing="gelu"),
        "layer_norm_epsilon": number(*EPS, missing=1e-5),
        "tie_word_embeddings": flag("tied", missing=True),
        "apply_residual_connection_post_layernorm": only(False),
    },
    layer=part(Layer, mixer=part(Attention, rope=part(Rope)), ffn=part(MLP, gated=False), pre_mixer=LAYER_NORM),
    model=part(ModelConfig, final_norm=LAYER_NORM), names=(ONE_NORM_NAMES, TWO_NORMS_NAMES),
    names_of=lambda config: (
        TWO_NORMS_NAMES if config.layers[0].parallel and config.layers[0].pre_ffn else ONE_NORM_NAMES,),
    ignorable=INV_FREQ,
    irrelevant=frozenset({"ff_factor", "rotary"}),  # ffn_hidden_size and alibi say it
)
FAMILIES = dict.fromkeys(("falcon", "RefinedWeb", "RefinedWebModel"), FALCON)
