"""CWM, 32B, Meta's code world model: Llama 3 in which every fourth layer, the first of them, sees all.

    layer         0     1      2      3      4     5 …
    attention     full  slides slides slides full  slides …      8192 keys; `layer_types`, or every fourth without it

Base 1e6, and Llama 3.1's stretch by 16, which is also what a missing `rope_parameters` means. Heads are 128 wide. No
biases on attention. FAIR CodeGen team 2025, arXiv 2510.02387.
"""

from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys, Windows
from checkpoints.names.config_table import Draft, flag
from checkpoints.names.reader import Reader
from nanollm.config import Llama3, Rope


class FirstOfFourFull(Windows):
    """All but every fourth layer slide, from the second on."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        return [i % 4 != 0 for i in range(layers)]


class StretchedRope(RopeKeys):
    """Where there are neither rope_parameters nor rope_scaling, the published stretch."""

    def __init__(self, theta: float, stretch: Llama3) -> None:
        super().__init__(theta)
        self.stretch = stretch

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """Base and stretch; the class then reads no rope_theta either."""
        if r.get("rope_parameters", None) is None and r.get("rope_scaling", None) is None:
            r.must("rope_theta", self.theta)
            return Rope(self.theta, scaling=self.stretch)
        return super().rope(r, draft)


CWM = LLAMA_SHAPE.but(
    "cwm", "CwmForCausalLM",
    missing={"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    keys={
        "mlp_bias": flag("ffn.bias", missing=False), "layer_types": FirstOfFourFull(8192),
        "rope_parameters": StretchedRope(1e6, Llama3(16.0, 8192)),
    },
)
FAMILIES = {"cwm": CWM}
