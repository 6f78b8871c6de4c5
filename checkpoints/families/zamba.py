"""Zamba: Mamba layers with two heads, before some of which stands a transformer block that all of these share. 7B.

    linear_attention    x += mamba(norm(x))
    hybrid              x += mamba(norm(x + W block([x, e])))          e: the embedding

Glorioso et al. 2024 (arXiv 2405.16712). One block, without RoPE, and nothing beside it but W: zamba2.py has the rest.
Where `layers_block_type` is missing, the third layer is hybrid, and then one of every `attn_layer_period`. The rows of
Mamba's in_proj alternate: a channel's own, and its gate's. The matrices of a head are stored as a tensor's slices.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from checkpoints.families.llama import GATED, HEADS
from checkpoints.families.zamba2 import AROUND, HYBRID, PLAIN, WORDS, ZAMBA2, OfScan, kinds_with
from checkpoints.names.config_rows import Expand, Rank
from checkpoints.names.config_table import field, flag, only, part, size
from checkpoints.names.layer_kinds import LayerKinds, words_of
from checkpoints.names.ops import Pieces, Same, Shape
from checkpoints.names.reader import Reader
from checkpoints.names.table import Rule, Table, override, rule, under
from nanollm.config import Layer, ModelConfig, MultiHeadMamba, SharedBlockScan


class Alternating(Same):
    """The rows of a channel and of its gate by turns; here all of the one, then all of the other."""

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield 0, ours[0].unflatten(0, (2, -1)).transpose(0, 1)


class Slices(Same):
    """One slice a head: (I, …) here, (H, I/H, …) there."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        scan = getattr(layer.mixer, "scan", layer.mixer) if layer else None
        assert isinstance(scan, MultiHeadMamba)
        return [(scan.heads, len(ours[0]) // scan.heads, *ours[0].shape[1:])]


def scan(theirs: str, ours: str) -> list[Rule]:
    """The rules of a scan."""
    return [rule(f"{theirs}.in_proj", f"{ours}.in_proj", Alternating),
            *under(theirs, ours, {"conv1d": "conv1d", "x_proj_weight": "x_proj.weight", "out_proj": "out_proj"}),
            *under(theirs, ours, {"dt_proj_weight": "dt_proj.weight", "dt_proj_bias": "dt_proj.bias", "A_log": "A_log",
                                  "D": "D"}, Slices)]


OWN_NAMES = override(AROUND, *scan(*PLAIN), *scan(*HYBRID))


def names_of(config: ModelConfig) -> tuple[Table, ...]:
    """With the layer under which the block is stored, the first that has it."""
    hybrid = [i for i, layer in enumerate(config.layers) if isinstance(layer.mixer, SharedBlockScan)]
    theirs = f"model.layers.{min(hybrid, default=0)}.shared_transf"
    return (override(
        OWN_NAMES, *under(theirs, "shared.0", {"input_layernorm": "norm", "pre_ff_layernorm": "mlp_norm"}),
        *under(f"{theirs}.self_attn", "shared.0.attention", HEADS),
        *under(f"{theirs}.feed_forward", "shared.0.mlp", GATED),
    ),)


def read_kinds(r: Reader) -> list[str]:
    """A word a layer, or where a period says."""
    period, first, layers = r.size("attn_layer_period", 6), r.get("attn_layer_offset", 4), r.count("num_hidden_layers")
    if r.get("layers_block_type", None) is not None:
        return words_of(r, "layers_block_type", WORDS)
    return ["mamba", "mamba", "hybrid", *("hybrid" if i % period == first else "mamba" for i in range(layers - 3))]


def write_kinds(kinds: list[str]) -> dict[str, Any]:
    return {"layers_block_type": kinds, "num_hidden_layers": len(kinds)}


ZAMBA = ZAMBA2.but(
    "zamba", "ZambaForCausalLM", names=(OWN_NAMES,), names_of=names_of, in_memory=None,
    missing={"num_attention_heads": 16, "intermediate_size": 14848, "num_key_value_heads": 16},
    keys={
        "layers_block_type": LayerKinds(kinds_with(part(MultiHeadMamba)), read_kinds, write_kinds),
        "num_hidden_layers": only(lambda draft: len(draft.layers)),
        "attention_head_dim": only(field("mixer.block.attention.head_dim"), None),
        "attention_hidden_size": only(lambda draft: 2 * draft["dim"], None),
        "mamba_expand": OfScan(Expand(missing=2)), "n_mamba_heads": OfScan(size("mixer.heads", missing=2)),
        "mamba_d_state": OfScan(size("mixer.state", missing=16)), "mamba_dt_rank": OfScan(Rank()),
        "mamba_conv_bias": OfScan(flag("mixer.conv_bias", missing=True)),
        "mamba_proj_bias": OfScan(flag("mixer.bias", missing=False)), "hidden_mamba_act": only("silu"),
    },
    without=("adapter_rank", "add_bias_linear", "hybrid_layer_ids", "mamba_headdim", "mamba_ngroups", "num_mem_blocks",
             "rope_parameters", "time_step_limit", "time_step_min", "use_conv_bias", "use_long_context",
             "use_mem_rope"),
    irrelevant=frozenset({"num_logits_to_keep", "time_step_floor", "time_step_max", "time_step_min",
                          "use_associative_scan", "use_mamba_kernels"}),
)
FAMILIES = {"zamba": ZAMBA}
