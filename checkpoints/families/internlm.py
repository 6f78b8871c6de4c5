"""InternLM, InternLM2, InternLM2.5 and InternLM3: Llama with one switch for the biases, and dynamic RoPE.

    InternLM     `bias` on q, k, v and o (7B true, 20B false); Llama's names
    InternLM2    the same, with names of its own, and q, k, v fused by key/value head:
                 wqkv rows  q q k v  q q k v  (2 queries a group); w1 is the gate, w3 the up, w2 the down projection.
                 model_type internlm2; in the first uploads internlm
    InternLM3    `qkv_bias` for q, k and v, `bias` for o and the MLP; transformers refuses a model in which they differ,
                 as do we; head_dim 128

All three stretch RoPE by dynamic NTK past the context they were trained for (2048; 32768). InternLM-1 says it in a key
of its own, `rotary: {"base": 10000, "type": "dynamic"}`, and without that key its code does not stretch.
"""

from checkpoints.families.llama import EPS, LLAMA_NAMES, LLAMA_SHAPE, kv_heads
from checkpoints.names.config_rows import HeadDim, Heads, RopeKeys
from checkpoints.names.config_table import Draft, field, flag, number, only, size
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import DynamicNTK, Rope

INTERNLM2_NAMES = override(
    {},
    rule("model.tok_embeddings", "embed"),
    rule("model.layers.{i}.attention_norm", "layers.{i}.pre_mixer"),
    rule("model.layers.{i}.attention.wqkv", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Groups),
    rule("model.layers.{i}.attention.wo", "layers.{i}.mixer.o"),
    rule("model.layers.{i}.ffn_norm", "layers.{i}.pre_ffn"),
    rule("model.layers.{i}.feed_forward.w1", "layers.{i}.ffn.gate"),
    rule("model.layers.{i}.feed_forward.w3", "layers.{i}.ffn.up"),
    rule("model.layers.{i}.feed_forward.w2", "layers.{i}.ffn.down"),
    rule("model.norm", "norm"),
    rule("output", "head"),
)


class Rotary(RopeKeys):
    """`rotary`, and Llama's keys, which beside it must say the same or nothing."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        rotary = r.inside("rotary")
        if rotary is None:
            return super().rope(r, draft)
        base, kind = rotary.number("base", above=1), rotary.must("type", "dynamic", "origin")
        factor = rotary.number("scaling_factor", 1.0)
        rotary.close()
        for key, value in (("rope_theta", base), ("rope_scaling", None), ("rope_parameters", None)):
            r.must(key, value)
        return Rope(base, scaling=DynamicNTK(factor, draft["context"]) if kind == "dynamic" else None)


INTERNLM = LLAMA_SHAPE.but(
    "internlm", "InternLMForCausalLM", names=(LLAMA_NAMES, INTERNLM2_NAMES),
    keys={
        "num_attention_heads": Heads(alone=False),
        "head_dim": only(field("mixer.head_dim"), None, written=True),
        "bias": flag("mixer.qkv_bias", "mixer.out_bias", missing=True),
        "rope_parameters": Rotary(),
    },
    irrelevant=frozenset({"attn_implementation"}),  # which kernel; the same logits
)
INTERNLM2 = INTERNLM.but("internlm2", "InternLM2ForCausalLM", names=(INTERNLM2_NAMES,), ignorable=frozenset())
INTERNLM3 = LLAMA_SHAPE.but(
    "internlm3", "InternLM3ForCausalLM",
    keys={
        "num_key_value_heads": kv_heads(missing=2),
        "head_dim": HeadDim(missing=128),
        "rms_norm_eps": number(*EPS, missing=1e-5),
        "max_position_embeddings": size("context", missing=32768),
        "qkv_bias": flag("mixer.qkv_bias", "mixer.out_bias", "ffn.bias", missing=False, also=("attention_bias",)),
        "bias": only(field("mixer.qkv_bias"), written=True, missing=False, also=("mlp_bias",)),
    },
    irrelevant=INTERNLM.irrelevant,
)
FAMILIES = {"internlm": INTERNLM, "internlm2": INTERNLM2, "internlm3": INTERNLM3}
