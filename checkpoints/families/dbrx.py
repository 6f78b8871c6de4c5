"""DBRX 132B: 16 experts, 4 a token, in every layer, and one matrix for q, k and v.

    x += o(attention(norm(x)));  x += Σ_e g_e down_e(silu(gate_e h) · up_e h),  h = norm(x)

    norms     LayerNorm with a gain and no bias, ε 1e-5
    q, k, v   stored as one matrix, rows q … k … v …; cut off at ± `clip_qkv` (8.0) before the rotation
    router    softmax over all experts; the chosen weights divided by their norm of an order,
              `moe_normalize_expert_weights`, which is 1: their sum; null: as they are. The published code rounds the
              softmax to the working dtype before it chooses; this does not
    on disk   the experts of a layer are one matrix (E·F, D) each of w1 (gate), v1 (up) and w2 (down, transposed)

Keys are in `attn_config` and `ffn_config`; RoPE's base is attn_config.rope_theta (5e5), which transformers 5.23 passes
over for 1e4; this follows the published code. https://github.com/databricks/dbrx
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.names.config_rows import Heads, Inside, LayerCount, base
from checkpoints.names.config_table import Draft, Keys, Row, count, field, number, only, part, size
from checkpoints.names.expert_ops import Piled, PiledTurned
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import ACTIVATIONS, Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import MLP, Attention, Layer, ModelConfig, MoE, Norm, Rope

DBRX_NAMES = override(
    {},
    *under("", "", {"transformer.wte": "embed", "transformer.norm_f": "norm", "lm_head": "head"}),
    *under("transformer.blocks.{i}", "layers.{i}", {
        "norm_attn_norm.norm_1": "pre_mixer", "norm_attn_norm.norm_2": "pre_ffn",
        "norm_attn_norm.attn.out_proj": "mixer.o", "ffn.router.layer": "ffn.router",
    }),
    rule("transformer.blocks.{i}.norm_attn_norm.attn.Wqkv", QKV, Blocks),
    *under("transformer.blocks.{i}.ffn.experts.mlp", "layers.{i}.ffn.experts", {"w1": "gate", "v1": "up"}, Piled),
    rule("transformer.blocks.{i}.ffn.experts.mlp.w2", "layers.{i}.ffn.experts.down", PiledTurned),
)


class NamedActivation(Row):
    """An object with the name of an activation, or the name alone."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The activation of each expert."""
        inner = r.inside(key) if isinstance(r.get(key, None), dict) else None
        draft["ffn.expert.activation"] = inner.activation("name", "silu") if inner else r.activation(key, "silu")
        if inner:
            inner.close()

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The object."""
        name = next((name for name, ours in ACTIVATIONS.items() if ours == draft["ffn.expert.activation"]), None)
        return {key: {"name": name}} if name else {}


class Normalised(Row):
    """The order of the norm by which the chosen weights are divided: 1, which is their sum; or null: by nothing."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Whether they are."""
        draft["ffn.renormalize"] = r.must(key, 1.0, None) is not None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """1 or null."""
        return {key: 1.0 if draft["ffn.renormalize"] else None}


class OuterRope(Row):
    """RoPE as transformers 5 writes it beside `attn_config`: what it says counts where that says no base.

    Else it must say the same, or 1e4, which transformers writes whatever stands there."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The base. Raises ConfigError for another than that of attn_config, and for any scaling."""
        rope, inner = read_rope(r, 10_000.0, draft["context"]), r.get("attn_config", None) or {}
        allowed = (Rope(draft["mixer.rope.theta"]), Rope()) if "rope_theta" in inner else (Rope(rope.theta),)
        if rope not in allowed:
            raise r.error(key, "no scaling, and the base of attn_config.rope_theta")
        if "rope_theta" not in inner:
            draft["mixer.rope.theta"] = rope.theta

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Both dialects, for transformers."""
        return write_rope(Rope(draft["mixer.rope.theta"]))


NORM = part(Norm, kind="layer", eps=1e-5)
ATTENTION: Keys = {
    "kv_n_heads": size("mixer.kv_heads", missing=1), "clip_qkv": number("mixer.clip", missing=None),
    "rope_theta": base("mixer.rope.theta", missing=10_000.0),
}
EXPERTS: Keys = {
    "ffn_hidden_size": size("ffn.expert.hidden", missing=3584), "ffn_act_fn": NamedActivation(),
    "moe_num_experts": count("ffn.experts", missing=4), "moe_top_k": size("ffn.top_k", missing=1),
    "moe_normalize_expert_weights": Normalised(), "hidden_size": only(field("dim")),
}
INNER = frozenset({"attn_pdrop", "moe_jitter_eps", "moe_loss_weight", "is_encoder_decoder"})
DBRX = Family(
    "dbrx", "DbrxForCausalLM",
    keys={
        "vocab_size": size("vocab", missing=32000), "d_model": size("dim", missing=2048),
        "n_layers": LayerCount(), "n_heads": Heads(alone=False, missing=16),
        "max_seq_len": size("context", missing=2048), "tie_word_embeddings": only(False, written=True),
        "attn_config": Inside(ATTENTION, irrelevant=INNER),
        "rope_parameters": OuterRope(), "num_key_value_heads": only(field("mixer.kv_heads")),
        "ffn_config": Inside(EXPERTS, irrelevant=INNER),
    },
    layer=part(Layer, mixer=part(Attention, rope=part(Rope)), ffn=part(MoE, expert=part(MLP), round_weights=True),
               pre_mixer=NORM, pre_ffn=NORM),
    model=part(ModelConfig, final_norm=NORM), names=(DBRX_NAMES,),
    irrelevant=frozenset({"emb_pdrop"}),
)
FAMILIES = {"dbrx": DBRX}
