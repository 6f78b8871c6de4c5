"""Mistral: Llama with a sliding window on all layers, or on none, and no biases.

    Mistral-7B v0.1, Zephyr    window 4096, theta 1e4
    v0.2, v0.3                 window null, theta 1e6; v0.3 has a vocabulary of 32768
    Nemo                       head_dim 128, which is not hidden_size / heads

A config.json without `sliding_window` has one of 4096: only an explicit null turns it off. The repositories hold the
weights twice; `consolidated.safetensors` is the other copy, with other names and the interleaved RoPE layout.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES, read_attention, read_decoder, read_mlp, write_llama_shape
from checkpoints.names.reader import Reader
from nanollm.config import Layer, ModelConfig, Norm

CONTEXT = 131072                                         # what a missing max_position_embeddings means


def read(r: Reader) -> ModelConfig:
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    window = r.size("sliding_window", 4096, or_null=True)
    attention = read_attention(r, context=CONTEXT, kv_heads=8, window=window)
    layer = Layer(attention, read_mlp(r), pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, CONTEXT)


def write(config: ModelConfig) -> dict[str, Any]:
    values = write_llama_shape(config, "mistral", "MistralForCausalLM")
    return values | {"sliding_window": config.layers[0].mixer.window}


MISTRAL = Family("mistral", read, write, (LLAMA_NAMES,), INV_FREQ)
