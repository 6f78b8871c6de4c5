"""Mixtral: Mistral's attention, and eight experts in place of the MLP. 8x7B, 8x22B.

On disk an expert's w1 is the gate, w3 the up and w2 the down projection, one tensor each; here they are stacked.
"""

from checkpoints.families.llama import LLAMA_NAMES
from checkpoints.families.mistral import MISTRAL
from checkpoints.families.qwen_moe import FUSED_EXPERTS
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import count, only, part, size
from checkpoints.names.ops import Stack
from checkpoints.names.table import override, rule, under
from nanollm.config import MLP, MoE

EXPERT = {"w1.weight": "gate", "w3.weight": "up", "w2.weight": "down"}
MIXTRAL_NAMES = override(
    LLAMA_NAMES, rule("model.layers.{i}.block_sparse_moe.gate", "layers.{i}.ffn.router"),
    *under("model.layers.{i}.block_sparse_moe.experts.{e}", "layers.{i}.ffn.experts", EXPERT, Stack),
)
IN_MEMORY = override(LLAMA_NAMES, *FUSED_EXPERTS)  # as transformers 5 has it in memory

MIXTRAL = MISTRAL.but(
    "mixtral", "MixtralForCausalLM", names=(MIXTRAL_NAMES, IN_MEMORY),
    layer={"ffn": part(MoE, expert=part(MLP), renormalize=True)}, missing={"rms_norm_eps": 1e-5},
    keys={
        "rope_parameters": RopeKeys(theta=1e6),
        "sliding_window": size("mixer.window", missing=None),
        "num_local_experts": count("ffn.experts", missing=8), "num_experts_per_tok": size("ffn.top_k", missing=2),
        "moe_frequency": only(1),  # Neuron's: every layer has experts
    },
)
FAMILIES = {"mixtral": MIXTRAL}
