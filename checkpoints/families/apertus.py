"""Apertus, 8B and 70B: Llama with a norm on every head of q and k, and a plain feed-forward with xIELU.

    x += o(attention(norm(x)));  x += down(xielu(up(norm(x))))            nanollm/layers/xielu.py

The norms are called attention_layernorm and feedforward_layernorm. Base 1.2e7 with Llama 3.1's stretch by 8, which is
also what a missing `rope_parameters` means. On disk an activation is four tensors, each of one number; two of them are
constants. Swiss AI 2025, arXiv 2509.14233.
"""

from collections.abc import Sequence

from torch import Tensor

from checkpoints.families.cwm import StretchedRope
from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen import QK_NORM
from checkpoints.names.config_table import only, part, size
from checkpoints.names.ops import Pieces, Shape
from checkpoints.names.table import override, rule, under
from nanollm.config import XIELU, Layer, Llama3, Norm


class Numbers:
    """The numbers of one parameter, a tensor each; the first two have a dimension, the others none."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [(1,), (1,), (), ()]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield from ((place, ours[0][place : place + 1]) for place in range(4))


APERTUS_NAMES = override(
    {ours: each for ours, each in LLAMA_NAMES.items() if not ours.endswith(".ffn.gate")}, *QK_NORM,
    *under("model.layers.{i}", "layers.{i}", {
        "attention_layernorm": "pre_mixer", "feedforward_layernorm": "pre_ffn"}),
    rule([f"model.layers.{{i}}.mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")],
         "layers.{i}.ffn.curve", Numbers),
)
APERTUS = LLAMA_SHAPE.but(
    "apertus", "ApertusForCausalLM", names=(APERTUS_NAMES,), layer={"mixer.qk_norm": part(Norm), "ffn": part(XIELU)},
    missing={"rms_norm_eps": 1e-5, "max_position_embeddings": 65536},
    keys={
        "hidden_act": only("xielu", written=True), "intermediate_size": size("ffn.hidden"),
        "rope_parameters": StretchedRope(12e6, Llama3(8.0, 8192)), "attention_bias": ATTENTION_BIAS,
        "qk_norm": only(True), "post_norm": only(False), "mlp_bias": only(False),  # in the hub's configs
    },
)
FAMILIES = {"apertus": APERTUS}
