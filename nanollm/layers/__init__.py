"""The parts of a layer, one equation a file; here, which module a config describes.

A fork adds its mixer or feed-forward to MODULES. A mixer's module says all that the rest of the house needs to know of
it, and no other file has to name it (inference/tensor_parallel.py does, for the kinds that it divides among ranks):

    forward(x, ctx, state)                          (B, T, D) → (B, T, D)
    new_state(config, batch, length, dtype, device) what it remembers between calls, layers/state.py
    multiply_adds(config, dim, context)             of one new token, the last of `context`
    INIT                                            how its parameters are drawn, nanollm/init.py
    WORDS                                           what `python -m checkpoints.show` says of each field of its config

A feed-forward has the same, without a state: forward(x), multiply_adds(config, dim).
"""

from typing import Any

from nanollm import config as c
from nanollm.layers.attention import Attention
from nanollm.layers.chunked_attention import ChunkedAttention
from nanollm.layers.cross_layer import CrossLayerAttention
from nanollm.layers.filtered_attention import FilteredAttention
from nanollm.layers.gated_attention import GatedAttention
from nanollm.layers.gated_delta_net import GatedDeltaNet
from nanollm.layers.hyena import Hyena
from nanollm.layers.input_weighted_moe import InputWeightedMoE
from nanollm.layers.latent_attention import LatentAttention
from nanollm.layers.mamba import Mamba
from nanollm.layers.mamba2 import Mamba2
from nanollm.layers.mlp import MLP
from nanollm.layers.moe import MoE
from nanollm.layers.multi_head_mamba import MultiHeadMamba
from nanollm.layers.narrow_values import NarrowValueAttention
from nanollm.layers.no_mixer import NoMixer
from nanollm.layers.normed_moe import NormedMoE
from nanollm.layers.normed_values import NormedValueAttention
from nanollm.layers.parallel_mixer import ParallelMixer
from nanollm.layers.recurrent import RGLRU
from nanollm.layers.rwkv import RWKV
from nanollm.layers.scaled_mlp import ScaledMLP
from nanollm.layers.shared_block import SharedBlockScan
from nanollm.layers.short_conv import ShortConv
from nanollm.layers.sparse_attention import SparseLatentAttention
from nanollm.layers.xielu import XIELU

MODULES: dict[type, Any] = {
    c.Attention: Attention,
    c.ChunkedAttention: ChunkedAttention,
    c.NormedValueAttention: NormedValueAttention,
    c.CrossLayerAttention: CrossLayerAttention,
    c.LatentAttention: LatentAttention,
    c.SparseLatentAttention: SparseLatentAttention,
    c.FilteredAttention: FilteredAttention,
    c.GatedAttention: GatedAttention,
    c.NarrowValueAttention: NarrowValueAttention,
    c.Mamba: Mamba,
    c.MultiHeadMamba: MultiHeadMamba,
    c.Mamba2: Mamba2,
    c.RGLRU: RGLRU,
    c.RWKV: RWKV,
    c.Hyena: Hyena,
    c.GatedDeltaNet: GatedDeltaNet,
    c.ShortConv: ShortConv,
    c.ParallelMixer: ParallelMixer,
    c.SharedBlockScan: SharedBlockScan,
    type(None): NoMixer,
    c.MLP: MLP,
    c.ScaledMLP: ScaledMLP,
    c.MoE: MoE,
    c.XIELU: XIELU,
    c.InputWeightedMoE: InputWeightedMoE,
    c.NormedMoE: NormedMoE,
}
