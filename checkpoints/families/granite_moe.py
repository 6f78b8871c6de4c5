"""Granite 3's and PowerMoE's mixtures of experts: Granite with experts in place of the MLP, in every layer.

    granitemoe          1B-A400M: 32 experts, 8 a token; 3B-A800M: 40, 8. The chosen weights are the softmax over the
                        chosen, which is that over all, renormalised; they are rounded to the working dtype
    granitemoeshared    and an MLP for every token, of `shared_intermediate_size` (0: none)
    granitemoe_swa      the same with the attention of Granite Swash (granite.py), 3B-A600M

Granite's four factors: granite.py. On disk the experts of a layer are one tensor, gate rows above up rows, and so is
the shared MLP. PowerMoE: Shen et al. 2024 (arXiv 2408.13359), §4.
"""

from typing import Any

from checkpoints.families.cwm import FirstOfFourFull
from checkpoints.families.granite import GRANITE, SINKS, BaseOfEach
from checkpoints.families.llama import LLAMA_NAMES
from checkpoints.names.config_rows import whole
from checkpoints.names.config_table import Draft, Row, activation, count, part, size
from checkpoints.names.expert_ops import GateUp
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, override, rule
from nanollm.config import MLP, MoE

GRANITE_MOE_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.block_sparse_moe.router.layer", "layers.{i}.ffn.router"),
    rule("model.layers.{i}.block_sparse_moe.input_linear.weight", EXPERTS_GATE_UP, GateUp),
    rule("model.layers.{i}.block_sparse_moe.output_linear.weight", "layers.{i}.ffn.experts.down"),
)
SHARED_NAMES = override(
    GRANITE_MOE_NAMES,
    rule("model.layers.{i}.shared_mlp.input_linear", [f"layers.{{i}}.ffn.shared.{name}" for name in ("gate", "up")],
         Blocks),
    rule("model.layers.{i}.shared_mlp.output_linear", "layers.{i}.ffn.shared.down"),
)


class SharedWidth(Row):
    """The width of the MLP that every token visits; 0, and a missing key, mean that there is none."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The MLP or None."""
        width = whole(r, key, 0)
        draft["ffn.shared"] = part(MLP, hidden=width) if width else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The width or 0."""
        return {key: draft["ffn.shared.hidden"] if "ffn.shared.hidden" in draft else 0}


GRANITE_MOE = GRANITE.but(
    "granitemoe", "GraniteMoeForCausalLM", names=(GRANITE_MOE_NAMES,), without=("mlp_bias",),
    layer={"ffn": part(MoE, expert=part(MLP), renormalize=True, round_weights=True)},
    keys={
        "num_local_experts": count("ffn.experts", missing=8), "num_experts_per_tok": size("ffn.top_k", missing=2),
        "intermediate_size": size("ffn.expert.hidden", missing=11008),
    },
)
GRANITE_MOE_SHARED = GRANITE_MOE.but(
    "granitemoeshared", "GraniteMoeSharedForCausalLM", names=(SHARED_NAMES,),
    keys={
        "shared_intermediate_size": SharedWidth(),
        "hidden_act": activation("ffn.expert.activation", "ffn.shared.activation", missing="silu"),
    },
)
SWA_NAMES = override(
    SHARED_NAMES, SINKS,
    rule("model.layers.{i}.block_sparse_moe.router", "layers.{i}.ffn.router"),
    rule("model.layers.{i}.block_sparse_moe.experts.gate_up_proj", EXPERTS_GATE_UP, GateUp),
    rule("model.layers.{i}.block_sparse_moe.experts.down_proj", "layers.{i}.ffn.experts.down"),
)
GRANITE_MOE_SWA = GRANITE_MOE_SHARED.but(
    "granitemoe_swa", "GraniteMoeSWAForCausalLM", names=(SWA_NAMES,), layer={"mixer.sinks": True},
    about="Granite Swash, 3B-A600M: Granite's experts, heads with sinks, and a window in three layers of four.",
    keys={"layer_types": FirstOfFourFull(128), "rope_parameters": BaseOfEach()},
)
FAMILIES = {"granitemoe": GRANITE_MOE, "granitemoeshared": GRANITE_MOE_SHARED, "granitemoe_swa": GRANITE_MOE_SWA}
