"""InternLM, InternLM2, InternLM2.5 and InternLM3: Llama with one switch for the biases, and dynamic RoPE.

    InternLM     `bias` on q, k, v and o (7B true, 20B false); Llama's names
    InternLM2    the same, with names of its own, and q, k, v fused by key/value head: wqkv rows  q q k v  q q k v  (2
                 queries a group). model_type internlm2; in the first uploads internlm
    InternLM3    `qkv_bias` for q, k and v, `bias` for o and the MLP, equal, as in transformers; head_dim 128

All three stretch RoPE by dynamic NTK past the context they were trained for (2048; 32768). InternLM-1 says it in a key
of its own, `rotary: {"base": 10000, "type": "dynamic"}`, and without that key its code does not stretch.
"""

from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Heads, RopeKeys
from checkpoints.names.config_table import Draft, field, flag, only
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import DynamicNTK, Rope

INTERNLM2_NAMES = override(
    {},
    *under("", "", {"model.tok_embeddings": "embed", "model.norm": "norm", "output": "head"}),
    *under("model.layers.{i}", "layers.{i}", {"attention_norm": "pre_mixer", "ffn_norm": "pre_ffn"}),
    rule("model.layers.{i}.attention.wqkv", QKV, Groups), rule("model.layers.{i}.attention.wo", "layers.{i}.mixer.o"),
    *under("model.layers.{i}.feed_forward", "layers.{i}.ffn", {"w1": "gate", "w3": "up", "w2": "down"}),
)


class Rotary(RopeKeys):
    """`rotary`, and Llama's keys, which beside it must say the same or nothing."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """What `rotary` says; Llama's keys where there is none."""
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
)
INTERNLM2 = INTERNLM.but("internlm2", "InternLM2ForCausalLM", names=(INTERNLM2_NAMES,), ignorable=frozenset())
INTERNLM3 = LLAMA_SHAPE.but(
    "internlm3", "InternLM3ForCausalLM",
    missing={"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768},
    keys={
        "qkv_bias": flag("mixer.qkv_bias", "mixer.out_bias", "ffn.bias", missing=False, also=("attention_bias",)),
        "bias": only(field("mixer.qkv_bias"), written=True, missing=False, also=("mlp_bias",)),
    },
)
FAMILIES = {"internlm": INTERNLM, "internlm2": INTERNLM2, "internlm3": INTERNLM3}
