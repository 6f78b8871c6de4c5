"""Zamba2: Mamba-2 layers, before some of which stands a transformer block: all of these share one, or two in turn.

    linear_attention    x += mamba(norm(x))
    hybrid              x += mamba(norm(x + W block([x, e])))          e: the embedding

    1.2B    one block; RoPE in it; what a layer adds to the block's MLP and to its q, k and v (adapter_rank)
    2.7B    two in turn; no RoPE; to the MLP alone               7B    two in turn; RoPE; to the MLP alone

Glorioso et al. 2024 (arXiv 2411.15242). A head of attention is 2 D / heads wide, and its scores are divided by the root
of half of that. The ε of the norm after Mamba-2's gate is 1e-5, whatever rms_norm_eps says.

A block is stored under the first layer that has it, and so are the adapters of all layers that use it, by the number of
the hybrid layer: `adapter_list.2` is that of the third. transformers 5.23 bounds Δ from below by `time_step_min` in a
prompt, and forgets it for a single token after it; here it is bounded for both.

Refused are `tie_word_embeddings` false, where transformers 5.23 shares no block either, and `use_long_context`, for
which the class once changed the base of RoPE, and does not any more.
"""

import math
from typing import Any

from checkpoints.families.bamba import MAMBA2_PARTS
from checkpoints.families.family import Family
from checkpoints.families.llama import HEADS
from checkpoints.families.mamba2 import inner
from checkpoints.names.config_rows import RopeKeys, four_widths, whole_multiple
from checkpoints.names.config_table import Draft, Part, Row, Switch, activation, field, flag, number, only, part, size
from checkpoints.names.layer_kinds import Among, LayerKinds, kind_of, words_of
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import Rule, Table, override, rule, under
from nanollm.config import MLP, Attention, Layer, Mamba2, ModelConfig, Norm, Rope, SharedBlock, SharedBlockScan

AROUND = override(  # all but scans and blocks
    {}, *under("", "", {"model.embed_tokens": "embed", "model.final_layernorm": "norm", "lm_head": "head"}),
    rule("model.layers.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    *under("model.layers.{i}", "layers.{i}.mixer", {"mamba_decoder.input_layernorm": "pre_scan", "linear": "linear"}),
)
PLAIN = "model.layers.{i}.mamba", "layers.{i}.mixer"  # where the scan of a layer is
HYBRID = "model.layers.{i}.mamba_decoder.mamba", "layers.{i}.mixer.scan"
OWN_NAMES = override(AROUND, *under(*PLAIN, MAMBA2_PARTS), *under(*HYBRID, MAMBA2_PARTS))


def names_of(config: ModelConfig, in_memory: bool = False) -> tuple[Table, ...]:
    """The table of a model: which layer a block is stored under follows from its config.

    In memory transformers has a block in each layer, and runs the adapters that stand there."""
    hybrid = [(i, layer.mixer.block.number) for i, layer in enumerate(config.layers)
              if isinstance(layer.mixer, SharedBlockScan)]
    first = {block: i for i, block in reversed(hybrid)}
    rules: list[Rule] = []
    for block, i in first.items():
        theirs, ours = f"model.layers.{i}.shared_transformer", f"shared.{block}"
        rules += [
            *under(theirs, ours, {"input_layernorm": "norm", "pre_ff_layernorm": "mlp_norm"}),
            *under(f"{theirs}.self_attn", f"{ours}.attention", HEADS),
            rule(f"{theirs}.feed_forward.gate_up_proj", [f"{ours}.mlp.gate", f"{ours}.mlp.up"], Blocks),
            rule(f"{theirs}.feed_forward.down_proj", f"{ours}.mlp.down"),
        ]
    for use, (i, block) in enumerate(hybrid):
        at = i if in_memory else first[block]
        theirs, ours = f"model.layers.{at}.shared_transformer", f"layers.{i}.mixer"
        lists = {"to_mlp": "feed_forward.gate_up_proj_adapter_list"}
        lists |= {f"to_{one}": f"self_attn.linear_{one}_adapter_list" for one in "qkv"}
        for own, name in lists.items():
            rules += under(f"{theirs}.{name}.{use}", f"{ours}.{own}", {"0": "down", "1": "up"})
    return (override(OWN_NAMES, *rules),)


SCAN = part(Mamba2, eps=1e-5)
BLOCK = part(SharedBlock, number=0, attention=part(Attention), mlp=part(MLP), norm=part(Norm))


def kinds_with(scan: Part) -> dict[str, Part]:
    """The two kinds of layers around a scan."""
    mixers = {"mamba": scan, "hybrid": part(SharedBlockScan, block=BLOCK, scan=scan, pre_scan=part(Norm))}
    before = {"mamba": part(Norm), "hybrid": None}
    return {kind: part(Layer, mixer=mixer, ffn=None, pre_mixer=before[kind], pre_ffn=None)
            for kind, mixer in mixers.items()}


WORDS = {"mamba": "mamba", "hybrid": "hybrid", "linear_attention": "mamba"}
USUAL = ["mamba"] + (["mamba"] * 5 + ["hybrid"]) * 7 + ["mamba"] * 4 + ["hybrid"] + ["mamba"] * 3 + ["hybrid"] + (
    ["mamba"] * 2)


def read_kinds(r: Reader) -> list[str]:
    """A word a layer."""
    return USUAL if r.get("layers_block_type", None) is None else words_of(r, "layers_block_type", WORDS)


def write_kinds(kinds: list[str]) -> dict[str, Any]:
    return {"layers_block_type": kinds, "num_hidden_layers": len(kinds),
            "hybrid_layer_ids": [i for i, kind in enumerate(kinds) if kind == "hybrid"]}


def hybrid_ids(draft: Draft) -> list[int]:
    """The layers with a block."""
    return [i for i, each in enumerate(draft.layers) if kind_of(each, "mixer") is SharedBlockScan]


class OfScan(Among):
    """A row for the scan of each layer, alone or behind a block: its paths begin with "mixer", as elsewhere."""

    def __init__(self, row: Row) -> None:
        self.row, self.shapes = row, row.shapes

    def part_of(self, draft: Draft) -> Draft:
        """Each scan as the mixer of a layer of its own: what is set there is set here."""
        hybrid = hybrid_ids(draft)
        scans = [each.get("mixer.scan" if i in hybrid else "mixer") for i, each in enumerate(draft.layers)]
        return Draft(draft.model, [Part(Layer, mixer=scan) for scan in scans])

    def says(self) -> str:
        return f"{self.row.says()}, also of mixer.scan"


class Turns(Row):
    """How many blocks there are, which the hybrid layers use in turn."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        blocks = r.size(key, 1)
        for use, i in enumerate(hybrid_ids(draft)):
            draft.layers[i].set("mixer.block.number", use % blocks)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: 1 + max([draft.layers[i].get("mixer.block.number") for i in hybrid_ids(draft)], default=0)}


class WideHeads(Row):
    """The number of query heads, each 2 D / heads wide."""
    missing = 32

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        heads, wide = r.size(key, self.missing), 2 * draft["dim"]
        if wide % heads:
            raise r.error(key, f"a divisor of twice hidden_size ({wide})")
        draft["mixer.block.attention.heads"], draft["mixer.block.attention.head_dim"] = heads, wide // heads
        draft["mixer.block.attention.scale"] = math.sqrt(2 * heads / wide)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.block.attention.heads"]} if "mixer.block.attention.heads" in draft else {}


class ScanHeads(Row):
    """How many times wider than the model Mamba-2 is; its heads share that."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        heads, channels = r.size("n_mamba_heads", 8), r.size(key, 2) * draft["dim"]
        if channels % heads:
            raise r.error("n_mamba_heads", f"a divisor of mamba_expand · hidden_size ({channels})")
        draft["mixer.heads"], draft["mixer.head_dim"] = heads, channels // heads

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {"n_mamba_heads": draft["mixer.heads"], "mamba_headdim": draft["mixer.head_dim"],
                key: whole_multiple(inner(draft), draft["dim"])}


class Ranks(Row):
    """The rank of what a layer adds to the block's MLP, and to its q, k and v with `use_shared_attention_adapter`."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        draft["mixer.mlp_rank"] = rank = r.size(key, 128)
        draft["mixer.qkv_rank"] = rank if r.flag("use_shared_attention_adapter", False) else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        if "mixer.mlp_rank" not in draft:
            return {}
        return {key: draft["mixer.mlp_rank"], "use_shared_attention_adapter": draft["mixer.qkv_rank"] is not None}


KINDS = kinds_with(SCAN)
ROPE = "mixer.block.attention.rope"
ZAMBA2 = Family(
    "zamba2", "Zamba2ForCausalLM", names=(OWN_NAMES,), names_of=names_of,
    in_memory=lambda config: names_of(config, in_memory=True), layer=KINDS["mamba"],
    model=part(ModelConfig, tied=True),
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim"),
        "layers_block_type": LayerKinds(KINDS, read_kinds, write_kinds),
        "num_hidden_layers": only(lambda draft: len(draft.layers), missing=54), "hybrid_layer_ids": only(hybrid_ids),
        "use_mem_rope": Switch(ROPE, part(Rope)), "num_mem_blocks": Turns(),
        "num_attention_heads": WideHeads(),
        "num_key_value_heads": size("mixer.block.attention.kv_heads", missing=field("mixer.block.attention.heads"),
                                    null=field("mixer.block.attention.heads")),
        "attention_head_dim": only(field("mixer.block.attention.head_dim")),
        "attention_hidden_size": only(lambda draft: 2 * draft["dim"]),
        "intermediate_size": size("mixer.block.mlp.hidden", missing=four_widths, null=four_widths),
        "hidden_act": activation("mixer.block.mlp.activation", missing="gelu"),
        "adapter_rank": Ranks(), "mamba_expand": OfScan(ScanHeads()),
        "mamba_headdim": OfScan(only(field("mixer.head_dim"))),
        "mamba_d_state": OfScan(size("mixer.state", missing=64)),
        "mamba_ngroups": OfScan(size("mixer.groups", missing=1)), "mamba_d_conv": OfScan(size("mixer.conv", missing=4)),
        "time_step_min": OfScan(number("mixer.least_step", missing=0.001)),
        "add_bias_linear": flag("mixer.bias", "mixer.scan.bias", "mixer.block.mlp.bias", missing=False),
        "rms_norm_eps": number("final_norm.eps", "pre_mixer.eps", "mixer.pre_scan.eps", "mixer.block.norm.eps",
                               missing=1e-5),
        "rope_parameters": RopeKeys(path=ROPE),
        "tie_word_embeddings": only(True, written=True), "max_position_embeddings": size("context", missing=4096),
        "use_conv_bias": only(True), "use_long_context": only(False), "time_step_limit": only(None),
    },
    irrelevant=frozenset({"chunk_size", "kv_channels", "num_logits_to_keep", "num_query_groups", "time_step_floor",
                          "time_step_max", "use_mamba_kernels", "use_mem_eff_path"}),
)
FAMILIES = {"zamba2": ZAMBA2}
