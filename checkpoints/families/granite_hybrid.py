"""Granite 4: Mamba-2 and attention, and beside each an MLP, or experts and an MLP. H-Small, H-Tiny, H-Micro; Micro.

    x += r · mixer(norm(x));  x += r · (experts(h) + shared(h)),  h = norm(x)         r: `residual_multiplier`

`layer_types` says which layers attend; in Granite 4 Micro, 1B and 350M all do. There is no RoPE, unless
`position_embedding_type` is "rope", as in those. Without experts (`num_local_experts` 0) the shared MLP is all. Four
more multipliers, as in Granite 3: of the embedding, of the scores in place of 1/√d, of both branches, and the logits
are divided by `logits_scaling`. The router's softmax is over the experts that were chosen.
"""

from typing import Any

from checkpoints.families.bamba import MAMBA2_KEYS, MAMBA2_PARTS
from checkpoints.families.llama import ATTENTION_BIAS, EPS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Heads, Kinds, whole
from checkpoints.names.config_table import Draft, Row, field, number, only, part, size
from checkpoints.names.expert_ops import GateUp
from checkpoints.names.layer_kinds import NEW_WORDS, Among, words_of
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, GATE_UP, Table, override, rule, under
from nanollm.config import MLP, Attention, Mamba2, ModelConfig, MoE, Rope

HYBRID_NAMES = override(
    LLAMA_NAMES, *under("model.layers.{i}.mamba", "layers.{i}.mixer", MAMBA2_PARTS))
DENSE_NAMES = override(
    HYBRID_NAMES, rule("model.layers.{i}.shared_mlp.input_linear", GATE_UP, Blocks),
    rule("model.layers.{i}.shared_mlp.output_linear", "layers.{i}.ffn.down"),
)
EXPERT_NAMES = override(
    HYBRID_NAMES,
    rule("model.layers.{i}.shared_mlp.input_linear",
         ["layers.{i}.ffn.shared.gate", "layers.{i}.ffn.shared.up"], Blocks),
    rule("model.layers.{i}.shared_mlp.output_linear", "layers.{i}.ffn.shared.down"),
    rule("model.layers.{i}.block_sparse_moe.router.layer", "layers.{i}.ffn.router"),
    rule("model.layers.{i}.block_sparse_moe.input_linear.weight", EXPERTS_GATE_UP, GateUp),
    rule("model.layers.{i}.block_sparse_moe.output_linear.weight", "layers.{i}.ffn.experts.down"),
)


def read_kinds(r: Reader, layers: int) -> list[str]:
    """The mixer of each layer; without the key there is no attention."""
    if r.get("layer_types", None) is None:
        return ["mamba"] * layers
    return words_of(r, "layer_types", {"mamba": "mamba", "attention": "attention"} | NEW_WORDS, layers)


class ExpertsOrNone(Kinds):
    """How many experts there are; 0: the shared MLP is all."""

    def __init__(self) -> None:
        experts = part(MoE, expert=part(MLP), shared=part(MLP), renormalize=True, round_weights=True)
        super().__init__("ffn", {"mlp": part(MLP), "experts": experts}, self.kinds, self.number)

    def kinds(self, r: Reader, layers: int) -> list[str]:
        return ["experts" if whole(r, "num_local_experts", 8) else "mlp"] * layers

    def number(self, kinds: list[str]) -> dict[str, Any]:
        return {} if "experts" in kinds else {"num_local_experts": 0}

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        super().read(r, draft, key)
        if "ffn.experts" in draft:
            draft["ffn.experts"] = r.count(key, 8)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return super().write(draft, key) or {key: draft["ffn.experts"]}


class Positions(Row):
    """Whether attention turns its queries and keys: "rope"; null and "nope" say no."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        draft["mixer.rope"] = part(Rope) if r.must(key, None, "nope", "rope") == "rope" else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: "rope" if "mixer.rope.theta" in draft else "nope"}


def names_of(config: ModelConfig) -> tuple[Table, ...]:
    """With or without experts."""
    return (EXPERT_NAMES if isinstance(config.layers[0].ffn, MoE) else DENSE_NAMES,)


MIXERS = {"mamba": part(Mamba2), "attention": part(Attention)}
GRANITE_HYBRID = LLAMA_SHAPE.but(
    "granitemoehybrid", "GraniteMoeHybridForCausalLM", names=(EXPERT_NAMES, DENSE_NAMES), names_of=names_of,
    ignorable=frozenset(),
    keys=MAMBA2_KEYS | {
        "layer_types": Kinds("mixer", MIXERS, read_kinds, lambda kinds: {"layer_types": kinds}),
        "num_local_experts": ExpertsOrNone(), "position_embedding_type": Positions(),
        "num_attention_heads": Among(Attention, Heads(alone=False)),
        "num_key_value_heads": Among(Attention, size(
            "mixer.kv_heads", missing=field("mixer.heads"), null=field("mixer.heads"))),
        "intermediate_size": size("ffn.expert.hidden", missing=11008),
        "shared_intermediate_size": size("ffn.hidden", "ffn.shared.hidden", missing=1024),
        "num_experts_per_tok": size("ffn.top_k", missing=2),
        "rms_norm_eps": number(*EPS, "mixer.eps", missing=1e-6),
        "attention_multiplier": number("mixer.scale", missing=1.0),
        "embedding_multiplier": number("embed_scale", missing=1.0),
        "residual_multiplier": number("residual_scale", missing=1.0),
        "logits_scaling": number("head_scale", missing=1.0, to=lambda value: 1 / value, of=lambda ours: 1 / ours),
        "attention_bias": ATTENTION_BIAS, "normalization_function": only("rmsnorm"),
    },
    without=("head_dim",), irrelevant=frozenset({"mamba_chunk_size", "init_method", "logits_to_keep"}),
)
FAMILIES = {"granitemoehybrid": GRANITE_HYBRID}
