"""ChatGLM2-6B, ChatGLM3-6B, their 32k and 128k variants, and GLM-4-9b as first uploaded: model_type chatglm.

Llama's block, its norms rounding after the gain, with these differences:

    rope     half of each head turns, in neighbouring pairs (0,1) (2,3) …
    biases   on q, k and v, by `add_qkv_bias`; nowhere else
    on disk  query_key_value rows  q q q … k v          dense_h_to_4h rows  gate … up …

`rope_ratio` stretches the context, and means one of two things that the key itself does not tell apart:

                                                   angle of pair j at position m
    ChatGLM2-6B-32k (16)                           (m / ratio) · 10000^(−2j/r)             positions are divided
    ChatGLM3-6B-32k (50) and -128k (500),          m · (10000 · ratio)^(−2j/r)             the base is multiplied
    GLM-4-9b-chat (500) and -1m (10000)

The name in `_name_or_path` or GLM-4's vocabulary mostly does. Where neither does, someone who knows adds a key of ours
to config.json: "rope_ratio_scales": "positions" or "base". The first ChatGLM-6B (positions in two dimensions, a prefix
that sees itself both ways) is another model, and its keys are refused.
"""

import re
from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import EPS
from checkpoints.names.config_rows import LayerCount
from checkpoints.names.config_table import ABSENT, Draft, Row, field, flag, number, only, part, size, unread
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import GATE_UP, QKV, override, rule, under
from nanollm.config import MLP, Attention, Layer, Linear, ModelConfig, Norm, Rope

THETA = 10_000.0
GLM4_VOCAB = 151552
RATIO_SCALES = "rope_ratio_scales"  # our key: what rope_ratio scales

NAMES = override(
    {},
    rule("transformer.embedding.word_embeddings", "embed"),
    *under("transformer", "", {"encoder.final_layernorm": "norm", "output_layer": "head"}),
    *under("transformer.encoder.layers.{i}", "layers.{i}", {
        "input_layernorm": "pre_mixer", "post_attention_layernorm": "pre_ffn",
        "self_attention.dense": "mixer.o", "mlp.dense_4h_to_h": "ffn.down",
    }),
    rule("transformer.encoder.layers.{i}.self_attention.query_key_value", QKV, Blocks),
    rule("transformer.encoder.layers.{i}.mlp.dense_h_to_4h", GATE_UP, Blocks),
)


class Ratio(Row):
    """`rope_ratio` in the meaning that our key gives it, or else the folder."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Scale the base or divide the positions, whichever the ratio means in this model."""
        ratio = r.number(key, 1.0)
        scales = r.must(RATIO_SCALES, what_ratio_scales(r, draft["vocab"]), "positions", "base")
        if scales is None and ratio != 1:
            raise r.error(key, f'"{RATIO_SCALES}" beside it, since the folder does not tell which model this is: '
                               '"positions" where positions are divided by it (ChatGLM2), "base" where the base is '
                               'multiplied by it (ChatGLM3, GLM-4)')
        divided = scales == "positions" and ratio != 1
        draft["mixer.rope.theta"] = THETA if divided else THETA * ratio
        draft["mixer.rope.scaling"] = Linear(ratio) if divided else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """A part of the head other than half, or another scaling, does not read back."""
        theta, divisor = draft["mixer.rope.theta"], draft["mixer.rope.scaling.factor"]
        if theta is ABSENT:
            return {}
        divided = divisor is not ABSENT
        return {key: divisor if divided else theta / THETA, RATIO_SCALES: "positions" if divided else "base"}


def what_ratio_scales(r: Reader, vocab: int) -> str | None:
    """"positions" or "base", as far as a published folder says it; else None."""
    name = r.get("_name_or_path", "")
    name = name.lower() if isinstance(name, str) else ""
    older, newer = re.search(r"chatglm-?2", name), re.search(r"chatglm-?3|glm-?4", name)
    if bool(older) != bool(newer):
        return "positions" if older else "base"
    return "base" if vocab == GLM4_VOCAB else None


NORM = part(Norm, cast_after_gain=True)
CHATGLM = Family(
    "chatglm", "ChatGLMModel",
    keys={
        "padded_vocab_size": size("vocab"), "hidden_size": size("dim"), "num_layers": LayerCount(),
        "num_attention_heads": size("mixer.heads"),
        "multi_query_attention": only(True, written=True, missing=False),
        "multi_query_group_num": size("mixer.kv_heads", missing=1), "kv_channels": size("mixer.head_dim", missing=128),
        "add_qkv_bias": flag("mixer.qkv_bias", missing=False), "ffn_hidden_size": size("ffn.hidden"),
        "layernorm_epsilon": number(*EPS, missing=1e-5),
        "seq_length": size("context", missing=2048), "rope_ratio": Ratio(), "original_rope": unread(True),
        "vocab_size": only(field("vocab"), written=True),  # GLM-4 says this and the next twice
        "num_hidden_layers": only(lambda draft: len(draft.layers), written=True),
        # other wirings of the same code, which no published model has
        **dict.fromkeys(("rmsnorm", "post_layer_norm"), only(True, written=True)),
        **dict.fromkeys(("add_bias_linear", "apply_residual_connection_post_layernorm"), only(False, written=True)),
        "tie_word_embeddings": only(False, True, written=True),  # the published code never ties; the head is stored
        "fp32_residual_connection": only(False), "pre_seq_len": only(None), "quantization_bit": only(0),
    },
    layer=part(Layer, mixer=part(Attention, rope=part(Rope, layout="interleaved", fraction=0.5)), ffn=part(MLP),
               pre_mixer=NORM, pre_ffn=NORM),
    model=part(ModelConfig, final_norm=NORM), names=(NAMES,),
    ignorable=frozenset({"transformer.rotary_pos_emb.inv_freq"}),
    # how scores are kept from overflowing in 16 bits, dropout, and what only a tuned prefix reads
    irrelevant=frozenset({"apply_query_key_layer_scaling", "classifier_dropout", "prefix_projection"}),
)
FAMILIES = {"chatglm": CHATGLM}
