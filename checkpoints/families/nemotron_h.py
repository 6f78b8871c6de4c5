"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: Nano, Super, Ultra. Each stored layer is one branch.

    x += branch(norm(x))      "M" Mamba-2   "*" attention   "-" an MLP   "E" experts

`hybrid_override_pattern` has a letter a layer; Nemotron 3 Ultra has words, `layers_block_type`. Waleffe et al. 2024
(arXiv 2406.07887); NVIDIA 2025 (arXiv 2504.03624).

    attention    without RoPE: the scans order the tokens. `rope_theta` stands in configs, and nobody reads it
    MLP          down(relu(up x)²), no gate, and so are experts
    experts      DeepSeek-V3's router and a shared expert of a width of its own; with `moe_latent_size` they read a
                 vector that is so long (moe.py). NVIDIA 2026 (arXiv 2604.12374)
    norms        rounded after the gain

Heads of Mamba-2 are their own, `mamba_num_heads` of `mamba_head_dim`; `expand` says nothing. The first configs call the
width of attention's heads `attention_head_dim`. Published, Δ is bounded by
`time_step_limit`, which is no bound in any checkpoint. transformers 5.23 has `time_step_min` in its place as a lower
bound of prompts, and none for the tokens that follow: this follows the published code. Where the folder has layers that
predict further tokens, `mtp.…`, they are left out.
"""

from typing import Any

from checkpoints.families.bamba import MAMBA2_PARTS
from checkpoints.families.deepseek import Groups
from checkpoints.families.family import Family
from checkpoints.families.llama import EPS, HEADS
from checkpoints.families.mamba2 import StepLimits
from checkpoints.names.config_table import Draft, Fixed, Repeats, Row, activation, count, flag, number, only, part, size
from checkpoints.names.layer_kinds import NEW_WORDS, Among, LayerKinds, words_of
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import either, moved, override, under
from nanollm.config import MLP, Attention, LatentExpert, Layer, Mamba2, ModelConfig, MoE, Norm

PLAIN = {"up_proj": "up", "down_proj": "down"}
NEMOTRON_H_NAMES = override(
    {},
    *under("", "", {"backbone.embeddings": "embed", "backbone.norm_f": "norm", "lm_head": "head"}),
    *either("backbone.layers.{i}.norm", "layers.{i}.pre_mixer", "layers.{i}.pre_ffn"),
    *under("backbone.layers.{i}.mixer", "layers.{i}.mixer", MAMBA2_PARTS | HEADS),
    *under("backbone.layers.{i}.mixer", "layers.{i}.ffn", {
        **PLAIN, "gate": "router", "gate.e_score_correction_bias": "router.correction",
        "fc1_latent_proj": "narrow", "fc2_latent_proj": "widen",
    }),
    *under("backbone.layers.{i}.mixer.shared_experts", "layers.{i}.ffn.shared", PLAIN),
    *under("backbone.layers.{i}.mixer.experts.{e}", "layers.{i}.ffn.experts",
           {f"{theirs}.weight": ours for theirs, ours in PLAIN.items()}, Stack),
)
IN_MEMORY = override(  # as transformers 5 has it in memory
    moved(NEMOTRON_H_NAMES, "backbone.", "model."),
    *under("model.layers.{i}.mixer.experts", "layers.{i}.ffn.experts", PLAIN),
)

LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
USUAL = ["mamba", "moe", "attention", "mlp"]
NORM = part(Norm, cast_after_gain=True)


def mixing(mixer: type) -> Any:
    """A layer that is a mixer alone."""
    return part(Layer, mixer=part(mixer), ffn=None, pre_mixer=NORM, pre_ffn=None)


def feeding(ffn: Any) -> Any:
    """A layer that is a feed-forward alone."""
    return part(Layer, mixer=None, ffn=ffn, pre_mixer=None, pre_ffn=NORM)


EXPERTS = part(MoE, expert=part(MLP, gated=False), shared=part(MLP, gated=False), score="sigmoid", correction=True,
               router_float32=True)
BRANCHES = {"mamba": mixing(Mamba2), "attention": mixing(Attention), "mlp": feeding(part(MLP, gated=False)),
            "moe": feeding(EXPERTS)}


def read_kinds(r: Reader) -> list[str]:
    """A letter or a word a layer; where both stand, they must agree."""
    letters, words = r.get("hybrid_override_pattern", None), r.get("layers_block_type", None)
    if letters is not None and (not isinstance(letters, str) or not letters or set(letters) - set(LETTERS)):
        raise r.error("hybrid_override_pattern", f"a letter a layer, of {' '.join(LETTERS)}")
    if words is not None:
        found = words_of(r, "layers_block_type", {kind: kind for kind in BRANCHES} | NEW_WORDS)
        if letters is None or found == [LETTERS[letter] for letter in letters]:
            return found
        raise r.error("layers_block_type", f"what hybrid_override_pattern ({letters}) says")
    return USUAL if letters is None else [LETTERS[letter] for letter in letters]


def write_kinds(kinds: list[str]) -> dict[str, Any]:
    letters = {word: letter for letter, word in LETTERS.items()}
    return {"hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
            "layers_block_type": kinds, "num_hidden_layers": len(kinds)}


class Latent(Row):
    """How long the vector is that experts read; null, and a missing key: they read the stream."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        if (width := r.size(key, None)) is not None:
            draft["ffn.expert"] = part(LatentExpert, width=width, mlp=part(MLP, gated=False))

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["ffn.expert.width"] if "ffn.expert.width" in draft else None}


NEMOTRON_H = Family(
    "nemotron_h", "NemotronHForCausalLM", names=(NEMOTRON_H_NAMES, IN_MEMORY), layer=BRANCHES["mamba"],
    model=part(ModelConfig, final_norm=NORM),
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim"),
        "hybrid_override_pattern": LayerKinds(BRANCHES, read_kinds, write_kinds), "moe_latent_size": Latent(),
        "num_hidden_layers": only(lambda draft: len(draft.layers)),
        "num_attention_heads": Among(Attention, size("mixer.heads", missing=32)),
        "num_key_value_heads": size("mixer.kv_heads", missing=8),
        "head_dim": Among(Attention, size("mixer.head_dim", missing=128, also=("attention_head_dim",))),
        "mamba_num_heads": Among(Mamba2, size("mixer.heads", missing=128)),
        "mamba_head_dim": Among(Mamba2, size("mixer.head_dim", missing=64)),
        "ssm_state_size": size("mixer.state", missing=128), "n_groups": size("mixer.groups", missing=8),
        "conv_kernel": size("mixer.conv", missing=4), "use_conv_bias": flag("mixer.conv_bias", missing=True),
        "use_bias": flag("mixer.bias", missing=False), "time_step_limit": StepLimits(),
        "intermediate_size": size("ffn.hidden", missing=21504),
        "moe_intermediate_size": size("ffn.expert.hidden", "ffn.expert.mlp.hidden", missing=7688),
        "moe_shared_expert_intermediate_size": size("ffn.shared.hidden", missing=7688),
        "mlp_hidden_act": activation("ffn.activation", "ffn.expert.activation", "ffn.expert.mlp.activation",
                                     "ffn.shared.activation", missing="relu2"),
        "n_routed_experts": count("ffn.experts", missing=8), "num_experts_per_tok": size("ffn.top_k", missing=2),
        "n_group": Groups(count=1, kept=1, best=2), "norm_topk_prob": flag("ffn.renormalize", missing=True),
        "routed_scaling_factor": number("ffn.scale", missing=1.0),
        "layer_norm_epsilon": number(*EPS, "mixer.eps", missing=1e-5),
        **dict.fromkeys(("norm_eps", "rms_norm_eps"), Repeats("layer_norm_epsilon", 1e-5)),
        "tie_word_embeddings": flag("tied", missing=False), "max_position_embeddings": size("context", missing=4096),
        "attention_bias": only(False), "mlp_bias": only(False), "mamba_proj_bias": only(False),
        "n_shared_experts": only(1), "sliding_window": only(None), "residual_in_fp32": only(False),
        "mamba_hidden_act": only("silu"),
        "time_step_min": Fixed((), 1e-9),  # for transformers, where it is a bound
    },
    ahead="mtp.",
    irrelevant=frozenset(
        "chunk_size expand mamba_ssm_cache_dtype moe_shared_expert_overlap mtp_hybrid_override_pattern "
        "mtp_layers_block_type num_logits_to_keep num_nextn_predict_layers partial_rotary_factor "
        "rescale_prenorm_residual rope_theta time_step_floor time_step_max use_mamba_kernels".split()),
)
FAMILIES = {"nemotron_h": NEMOTRON_H}
