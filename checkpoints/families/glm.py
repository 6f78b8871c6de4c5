"""GLM-4 in the layout of transformers: GLM-4-9b-hf and GLM-Edge (model_type glm), GLM-4-0414 (glm4).

Llama's block with these differences:

    rope     the first half of each head turns (GLM-Edge: all of it), in neighbouring pairs (0,1) (2,3) …
    biases   on q, k and v, none on o; GLM-4-32B-0414 and GLM-Edge: none
    on disk  gate and up are one matrix, gate_up_proj rows  gate … up …
    glm4     the mixer's and the feed-forward's outputs are normalised too, before they are added: post_self_attn_layernorm,
             post_mlp_layernorm. As with Llama, post_attention_layernorm stands before the feed-forward

The same weights as first uploaded, model_type chatglm, are in chatglm.py.
"""

from typing import Any

from checkpoints.families.legacy import functions, read_decoder, read_mlp, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope
from checkpoints.names.table import override, rule
from nanollm.config import Attention, Layer, ModelConfig, Norm

CONTEXT = 131072                                         # what a missing max_position_embeddings means

GLM_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.mlp.gate_up_proj", ["layers.{i}.ffn.gate", "layers.{i}.ffn.up"], Blocks),
)
GLM4_NAMES = override(
    GLM_NAMES,
    rule("model.layers.{i}.post_self_attn_layernorm", "layers.{i}.post_mixer"),
    rule("model.layers.{i}.post_mlp_layernorm", "layers.{i}.post_ffn"),
)


def read_shape(r: Reader, sandwich: bool) -> ModelConfig:
    """`sandwich`: norms after the mixer and the feed-forward too."""
    norm = Norm(eps=r.number("rms_norm_eps", 1.5625e-7))
    after = norm if sandwich else None
    rope = read_rope(r, 10_000.0, r.size("max_position_embeddings", CONTEXT), fraction=0.5, layout="interleaved")
    attention = Attention(
        heads=r.size("num_attention_heads"),
        kv_heads=r.size("num_key_value_heads", 2),
        head_dim=r.size("head_dim", 128),
        rope=rope,
        qkv_bias=r.flag("attention_bias", True),
    )
    layer = Layer(attention, read_mlp(r), pre_mixer=norm, post_mixer=after, pre_ffn=norm, post_ffn=after)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, CONTEXT)


def write_shape(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The part of a head that turns is written though it be all of it: a missing key means half."""
    values = write_llama_shape(config, model_type, architecture)
    attention = config.layers[0].mixer
    part = {"partial_rotary_factor": attention.rope.fraction}
    return values | part | {"rope_parameters": values["rope_parameters"] | part, "attention_bias": attention.qkv_bias}


def read_glm(r: Reader) -> ModelConfig:
    return read_shape(r, sandwich=False)


def read_glm4(r: Reader) -> ModelConfig:
    return read_shape(r, sandwich=True)


def write_glm(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config, "glm", "GlmForCausalLM")


def write_glm4(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config, "glm4", "Glm4ForCausalLM")


GLM = functions("glm", read_glm, write_glm, (GLM_NAMES,), INV_FREQ)
GLM4 = functions("glm4", read_glm4, write_glm4, (GLM4_NAMES,), INV_FREQ)
FAMILIES = {"glm": GLM, "glm4": GLM4}
