"""Mistral: Llama with a sliding window on all layers, or on none, and no biases.

    Mistral-7B v0.1, Zephyr    window 4096, theta 1e4
    v0.2, v0.3                 window null, theta 1e6; v0.3 has a vocabulary of 32768
    Nemo                       head_dim 128, which is not hidden_size / heads
    Ministral-8B               model_type "ministral": `layer_types` says which layers slide (32768); without it, all

A config.json without `sliding_window` has one of 4096: only an explicit null turns it off. The repositories hold the
weights twice; `consolidated.safetensors` is the other copy, with other names and the interleaved RoPE layout.
"""

from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.names.config_rows import Windows
from checkpoints.names.config_table import only, size
from checkpoints.names.reader import Reader


class AllSlide(Windows):
    """Where there is no `layer_types`, all layers."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        return [True] * layers


MISTRAL = LLAMA_SHAPE.but(
    "mistral", "MistralForCausalLM", missing={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    keys={
        "sliding_window": size("mixer.window", missing=4096, null=None),
        "attention_bias": only(False),  # a Llama's key, in configs of merged models; there are no biases
    },
)
MINISTRAL = MISTRAL.but(
    "ministral", "MinistralForCausalLM",
    about="Ministral 8B: Mistral with a window in the layers that layer_types names.",
    keys={"layer_types": AllSlide(or_null=True)}, without=("sliding_window",))
FAMILIES = {"mistral": MISTRAL, "ministral": MINISTRAL}
