"""GLM-4 in the layout of transformers: GLM-4-9b-hf and GLM-Edge (model_type glm), GLM-4-0414 (glm4).

Llama's block with these differences:

    rope     the first half of each head turns (GLM-Edge: all of it), in neighbouring pairs (0,1) (2,3) …
    biases   on q, k and v, none on o; GLM-4-32B-0414 and GLM-Edge: none
    on disk  gate and up are one matrix, gate_up_proj rows  gate … up …
    glm4     the outputs of mixer and feed-forward are normalised too, before they are added: post_self_attn_layernorm,
             post_mlp_layernorm. As with Llama, post_attention_layernorm stands before the feed-forward

The same weights as first uploaded, model_type chatglm, are in chatglm.py.
"""

from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import flag, part, size
from checkpoints.names.ops import Blocks
from checkpoints.names.table import GATE_UP, override, rule, under
from nanollm.config import Norm

GLM_NAMES = override(LLAMA_NAMES, rule("model.layers.{i}.mlp.gate_up_proj", GATE_UP, Blocks))
GLM4_NAMES = override(GLM_NAMES, *under("model.layers.{i}", "layers.{i}", {
    "post_self_attn_layernorm": "post_mixer", "post_mlp_layernorm": "post_ffn",
}))

GLM = LLAMA_SHAPE.but(
    "glm", "GlmForCausalLM", names=(GLM_NAMES,), layer={"mixer.rope.layout": "interleaved"},
    missing={"rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072},
    keys={
        "num_key_value_heads": size("mixer.kv_heads", missing=2), "head_dim": size("mixer.head_dim", missing=128),
        "attention_bias": flag("mixer.qkv_bias", missing=True),
        "rope_parameters": RopeKeys(fraction=0.5),
    },
)
GLM4 = GLM.but("glm4", "Glm4ForCausalLM", names=(GLM4_NAMES,), layer={"post_mixer": part(Norm), "post_ffn": part(Norm)})
FAMILIES = {"glm": GLM, "glm4": GLM4}
