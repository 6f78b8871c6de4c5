"""Phi-1, Phi-1.5 and Phi-2.

    h = norm(x);  x += dense(attention(h)) + fc2(gelu_tanh(fc1(h)))      one LayerNorm a layer, which both branches read

Biases on everything, the head included; RoPE in the half layout on the first part of each head: a half (Phi-1 and 1.5:
32 of 64 channels), two fifths in Phi-2 (32 of 80). `qk_layernorm` puts a LayerNorm on each query and key head; no
published Phi has it. Phi-3 is a Llama, of another model_type.

The uploads of the autumn of 2023 (model_type "phi-msft") are another layout of the same: GPT-2's keys, names after
flash-attention's modules, and q, k and v in one tensor. Those before them ("mixformer-sequential") are refused.
"""

from dataclasses import replace

from checkpoints.families.gptj import RotaryDim
from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_SHAPE
from checkpoints.names.config_rows import Heads, LayerCount, RopeKeys, four_widths
from checkpoints.names.config_table import Switch, activation, field, flag, number, part, size
from checkpoints.names.ops import Blocks
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import MLP

NAMES = override(
    {},
    *under("", "", {"model.embed_tokens": "embed", "model.final_layernorm": "norm", "lm_head": "head"}),
    rule("model.layers.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    *under("model.layers.{i}.self_attn", "layers.{i}.mixer", {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "dense": "o", "q_layernorm": "q_norm", "k_layernorm": "k_norm",
    }),
    *under("model.layers.{i}.mlp", "layers.{i}.ffn", {"fc1": "up", "fc2": "down"}),
)
MSFT_NAMES = override(
    {},
    *under("", "", {"transformer.embd.wte": "embed", "lm_head.ln": "norm", "lm_head.linear": "head"}),
    *under("transformer.h.{i}", "layers.{i}", {"ln": "pre_mixer", "mixer.out_proj": "mixer.o"}),
    rule("transformer.h.{i}.mixer.Wqkv", QKV, Blocks),
    *under("transformer.h.{i}.mlp", "layers.{i}.ffn", {"fc1": "up", "fc2": "down"}),
)

PHI = LLAMA_SHAPE.but(
    "phi", "PhiForCausalLM", names=(NAMES,), norm=LAYER_NORM, model={"head_bias": True},
    layer={"mixer.qkv_bias": True, "mixer.out_bias": True, "ffn": part(MLP, gated=False, bias=True),
           "parallel": True, "pre_ffn": None},
    keys={
        "num_attention_heads": Heads(alone=False),
        "hidden_act": activation("ffn.activation", missing="gelu_new"),
        "qk_layernorm": Switch("mixer.qk_norm", LAYER_NORM),
        "layer_norm_eps": number(*EPS, missing=1e-5),
        "rope_parameters": RopeKeys(fraction=0.5),
    },
    without=("head_dim", "rms_norm_eps"),
)
PHI_MSFT = replace(
    PHI, name="phi-msft", names=(MSFT_NAMES,),
    keys={
        "vocab_size": size("vocab"), "n_embd": size("dim"), "n_layer": LayerCount(), "n_head": Heads(alone=False),
        "n_head_kv": size("mixer.kv_heads", missing=field("mixer.heads"), null=field("mixer.heads")),
        "n_inner": size("ffn.hidden", missing=four_widths, null=four_widths),
        "n_positions": size("context", missing=2048), "rotary_dim": RotaryDim(missing=32),
        "activation_function": activation("ffn.activation", missing="gelu_new"),
        "layer_norm_epsilon": number(*EPS, missing=1e-5), "tie_word_embeddings": flag("tied", missing=False),
    },
    irrelevant=frozenset({"flash_attn", "flash_rotary", "fused_dense"}),  # which kernels compute it
)
FAMILIES = {"phi": PHI, "phi-msft": PHI_MSFT}
