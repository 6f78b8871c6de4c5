"""GPT-J-6B, and CodeGen, which is GPT-J with q, k and v in one tensor. CodeGen: Nijkamp et al. 2022, arXiv 2203.13474.

    h = ln_1(x);  x += out_proj(attention(h)) + fc_out(gelu_tanh(fc_in(h)))     one LayerNorm a layer, for both branches

No biases on attention, but on the feed-forward and on the head, which is not tied. RoPE turns neighbours, in the first
`rotary_dim` channels of each head, base 1e4. The rows of CodeGen's `qkv_proj` are in four blocks, each with its quarter
of the heads, and values stand before keys; the number is fixed, whatever the size of the model:

    rows    q₀ v₀ k₀  q₁ v₁ k₁  q₂ v₂ k₂  q₃ v₃ k₃        (H/4 heads each), from the four TPU cores it was trained on
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from checkpoints.families.gpt2 import GPT2, MASKS
from checkpoints.names.config_rows import Heads
from checkpoints.names.config_table import Draft, Row, only, part, size
from checkpoints.names.ops import Blocks, Pieces
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule, under
from nanollm.config import Layer, Rope

GPTJ_NAMES = override(
    {},
    *under("", "", {"transformer.wte": "embed", "transformer.ln_f": "norm", "lm_head": "head"}),
    rule("transformer.h.{i}.ln_1", "layers.{i}.pre_mixer"),
    *under("transformer.h.{i}.attn", "layers.{i}.mixer", {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}),
    *under("transformer.h.{i}.mlp", "layers.{i}.ffn", {"fc_in": "up", "fc_out": "down"}),
)


class Quarters(Blocks):
    """Four blocks, each with a quarter of the rows of every parameter."""

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        quarters = [tensor.unflatten(0, (4, -1)) for tensor in ours]                # (H d, D) → (4, H/4 d, D)
        yield from ((0, rows) for block in zip(*quarters, strict=True) for rows in block)


CODEGEN_NAMES = override(GPTJ_NAMES, rule(
    "transformer.h.{i}.attn.qkv_proj", ["layers.{i}.mixer.q", "layers.{i}.mixer.v", "layers.{i}.mixer.k"], Quarters))


class RotaryDim(Row):
    """How many channels of a head RoPE turns."""

    def __init__(self, missing: int) -> None:
        self.missing = missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """As the part of a head, with which the number comes out whole."""
        width, head = r.size(key, self.missing), draft["mixer.head_dim"]
        if width > head:
            raise r.error(key, f"at most the width of a head ({head})")
        fraction = width / head
        draft["mixer.rope.fraction"] = fraction if int(head * fraction) == width else math.nextafter(fraction, 1)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        if "mixer.rope.fraction" not in draft:
            return {}
        return {key: int(draft["mixer.head_dim"] * draft["mixer.rope.fraction"])}


class WholeQuarters(Heads):
    """As `Heads`: a number that four divides."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        super().read(r, draft, key)
        if draft["mixer.heads"] % 4:
            raise r.error(key, "a multiple of 4, the blocks of qkv_proj")


GPTJ = GPT2.but(
    "gptj", "GPTJForCausalLM", names=(GPTJ_NAMES,), model={"head_bias": True},
    layer={"mixer.rope": part(Rope, layout="interleaved"), "mixer.qkv_bias": False, "mixer.out_bias": False,
           "parallel": True, "pre_ffn": None},
    missing={"tie_word_embeddings": False},
    keys={
        "n_positions": size("context", missing=2048, also=("max_position_embeddings",)),
        "rotary_dim": RotaryDim(missing=64), "rotary": only(True), "scale_attn_weights": only(True),
        "rope_scaling": only(None, {"rope_type": "gptj"}),  # MLC's word for the interleaved layout
    },
    without=("attention_head_type",), ignorable=MASKS,
)
CODEGEN = GPTJ.but(
    "codegen", "CodeGenForCausalLM", names=(CODEGEN_NAMES,),
    keys={"n_head": WholeQuarters(also=("num_attention_heads",))},
    without=("rotary", "rope_scaling"), ignorable=frozenset({"transformer.h.{i}.attn.causal_mask"}),
)
FAMILIES = {"gptj": GPTJ, "codegen": CODEGEN}
