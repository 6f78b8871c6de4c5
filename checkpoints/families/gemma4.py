"""Gemma 4: Gemma 3's pattern of layers and norms, with other heads where a layer has no window. Of the folder the text.

    layers      5 sliding, 1 full … (E2B: 4 and 1); the last is full
    heads       256 wide in the sliding layers (`head_dim`), 512 in the full ones (`global_head_dim`), which in 31B and
                26B-A4B have fewer keys (`num_global_key_value_heads`) and no values of their own (`attention_k_eq_v`)
    q, k, v     every head over its root mean square, v without gain; scores are not scaled
                (nanollm/layers/normed_values.py)
    RoPE        base 1e4 in the sliding layers; 1e6 in the full ones, where the fastest quarter of the pairs turns
    norms       the gain as it is, not an offset from one as in Gemma 1 to 3; rounded after it
    each layer  ends with the stream times a learned number, `layer_scalar` (nanollm/layers/layer_end.py)
    E2B, E4B    each layer reads a short vector of the token, its own (nanollm/layers/per_layer.py); the last layers
                (`num_kv_shared_layers`) attend to keys and values of the last layers before them, sliding or full
                (nanollm/layers/cross_layer.py), and E2B's have an MLP twice as wide. Their own keys and values, which
                the files have, are not used
    12B         as 31B, but its own model_type, `gemma4_unified`
    26B-A4B     each layer has experts beside the MLP (`enable_moe_block`), 8 of 128 a token
                (nanollm/layers/normed_moe.py)

transformers writes what the full layers have of their own as `per_layer_config`, an object a layer, since 5.23; then it
passes over the keys `global_…`, and so do we, if they say the same. "use_bidirectional_attention": "vision" is about
pictures: text is causal. https://ai.google.dev/gemma/docs/core
"""

from typing import Any

from checkpoints.families.gemma import GELU, GEMMA3, GEMMA3_NAMES
from checkpoints.families.llama import EPS, GATED
from checkpoints.families.multimodal import TextInside
from checkpoints.names.config_rows import FULL, SLIDING, Kinds, Periodic, whole
from checkpoints.names.config_table import ABSENT, Draft, Part, Row, count, number, only, part, size, unread
from checkpoints.names.expert_ops import GateUp
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import EXPERTS_GATE_UP, either, moved, override, rule, under
from nanollm.config import (
    MLP,
    CrossLayerAttention,
    LayerEnd,
    Norm,
    NormedMoE,
    NormedValueAttention,
    PerLayerInput,
    Proportional,
    Rope,
)

GEMMA4_NAMES = override(
    GEMMA3_NAMES,
    rule("model.layers.{i}.layer_scalar", "layers.{i}.end.scale"),
    *under("model.layers.{i}", "layers.{i}.end", {
        "per_layer_input_gate": "gate", "per_layer_projection": "out", "post_per_layer_input_norm": "norm"}),
    *either("model.layers.{i}.pre_feedforward_layernorm", "layers.{i}.pre_ffn", "layers.{i}.ffn.pre_shared"),
    *(each for theirs, ours in GATED.items() for each in either(
        f"model.layers.{{i}}.mlp.{theirs}", f"layers.{{i}}.ffn.{ours}", f"layers.{{i}}.ffn.shared.{ours}")),
    *under("model.layers.{i}", "layers.{i}.ffn", {
        "post_feedforward_layernorm_1": "post_shared", "pre_feedforward_layernorm_2": "pre_experts",
        "post_feedforward_layernorm_2": "post_experts", "router.proj": "router", "router.scale": "pre_router.scale",
        "router.per_expert_scale": "router.expert_scale", "experts.down_proj": "experts.down"}),
    rule("model.layers.{i}.experts.gate_up_proj", EXPERTS_GATE_UP, GateUp),
    rule("model.embed_tokens_per_layer.weight", "shared.per_layer.table"),
    *under("model", "shared.per_layer", {
        "per_layer_model_projection": "linear", "per_layer_projection_norm": "norm"}),
)
UNUSED = frozenset(f"{prefix}layers.{{i}}.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")
                   for prefix in ("model.", "model.language_model."))       # of the layers that borrow theirs
NORM = part(Norm, cast_after_gain=True)


def full(draft: Draft) -> list[Part]:
    """The layers without a window."""
    return [layer for layer in draft.layers if layer.get("mixer.window") is None]


class EndsFull(Periodic):
    """All but every sixth layer slide, and never the last one."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        """transformers makes the last layer a full one."""
        return [*super().pattern(r, layers)[:-1], False]

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Raises ConfigError for a list whose last layer slides, which transformers changes as it reads."""
        super().read(r, draft, key)
        if draft.layers[-1].get("mixer.window") is not None:
            raise r.error(key, f"{FULL} in the last layer")


OWN = part(NormedValueAttention, rope=part(Rope), qk_norm=NORM, scale=1.0)
BORROWED = part(CrossLayerAttention, rope=part(Rope), qk_norm=NORM, scale=1.0)


class Borrowed(Kinds):
    """How many of the last layers attend to what the last sliding and the last full layer before them keep."""

    def __init__(self) -> None:
        super().__init__("mixer", {"own": OWN, "borrowed": BORROWED}, lambda r, layers: [], lambda kinds: {})

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Raises ConfigError where there is none to keep them."""
        first = len(draft.layers) - whole(r, key, 0)
        own, rest = draft.layers[: max(first, 0)], draft.layers[max(first, 0) :]
        windows = [layer.get("mixer.window") for layer in own]
        for layer in rest:
            if (window := layer.get("mixer.window")) not in windows:
                raise r.error(key, f"a {FULL if window is None else SLIDING} layer before those that share")
            layer.set("mixer", BORROWED)
            layer.set("mixer.window", window)
        for window in {layer.get("mixer.window") for layer in rest}:
            own[len(own) - 1 - windows[::-1].index(window)].set("mixer.kept", True)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Which layers they are is found by reading it back."""
        return {key: sum(layer.get("mixer").kind is CrossLayerAttention for layer in draft.layers)}


class TwiceAsWide(Row):
    """Whether the layers that borrow keys have an MLP twice as wide."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """After `intermediate_size`."""
        for layer in draft.layers if r.flag(key, False) else ():
            if layer.get("mixer").kind is CrossLayerAttention:
                for path in ("ffn.hidden", "ffn.shared.hidden"):
                    layer.set(path, 2 * layer.get(path) if layer.get(path) is not ABSENT else None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        first, last = draft.layers[0], draft.layers[-1]
        return {key: any(first.get(path) != last.get(path) for path in ("ffn.hidden", "ffn.shared.hidden"))}


class ExpertsBeside(Kinds):
    """Whether all layers have experts beside the MLP."""

    def __init__(self) -> None:
        one = part(MLP, activation="gelu_tanh")
        super().__init__("ffn", {"mlp": one, "both": part(NormedMoE, expert=one, shared=one, renormalize=True,
                                                          norm=NORM)}, lambda r, layers: [], lambda kinds: {})

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """They have then no norm before both."""
        for layer in draft.layers if r.flag(key, False) else ():
            layer.set("ffn", self.parts["both"])
            layer.set("pre_ffn", None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft.layers[0].get("ffn").kind is NormedMoE}


class OwnInputs(Row):
    """end.inputs: how wide a layer's own vector of a token is, 0 for none."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        width = whole(r, key, 256)
        for layer in draft.layers if width else ():
            layer.set("end.inputs", part(PerLayerInput, width=width, norm=NORM))
            layer.set("end.norm", NORM)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: 0 if draft["end.inputs"] in (None, ABSENT) else draft["end.inputs.width"]}


class OwnRows(Row):
    """As many as the vocabulary has, where layers have vectors of their own."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        if r.get(key, 262_144) != draft["vocab"] and draft["end.inputs"] is not None:
            raise r.error(key, f"vocab_size ({draft['vocab']})")

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["vocab"]}


class RopeOfEach(Row):
    """A RoPE for the layers that slide, another for the full ones, each an object in rope_parameters."""
    MEANT = {SLIDING: Rope(1e4), FULL: Rope(1e6, scaling=Proportional(0.25))}       # where there is no rope_parameters

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Give each layer the one of its kind."""
        each, ropes = r.inside(key), dict(self.MEANT)
        if each:
            found = {kind: each.inside(kind) for kind in ropes}
            each.close()
            ropes = {kind: read_rope(r.of({key: own.values}, f"{r.prefix}{kind}."), 1e4, draft["context"])
                     for kind, own in found.items() if own}
        for layer in draft.layers:
            kind = SLIDING if layer.get("mixer.window") else FULL
            if kind not in ropes:
                raise r.error(key, f"an object for {kind}")
            rope = ropes[kind]
            for name in ("theta", "fraction", "scaling"):
                layer.set(f"mixer.rope.{name}", getattr(rope, name))

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Both; what no layer has as the family's own."""
        ropes = dict(self.MEANT)
        for layer in draft.layers:
            if (rope := layer.get("mixer.rope")) is not None:   # without one it is no Gemma 4, as reading shows
                ropes[SLIDING if layer.get("mixer.window") else FULL] = rope.build()
        return {key: {kind: write_rope(rope)["rope_parameters"] for kind, rope in ropes.items()}}


class HeadsOfFull(Row):
    """The width of a head, how many keys there are, and whether values are keys, in the layers without a window."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """From an object a layer, or from the keys for all of them."""
        same = r.flag("attention_k_eq_v", False)
        K, d = draft["mixer.kv_heads"], draft["mixer.head_dim"]
        width, kv_heads = r.size("global_head_dim", 512), r.size("num_global_key_value_heads", None)
        if key in r.values:
            found = self.each(r, draft, key, K, d)
            r.must("global_head_dim", found[0], None)
            r.must("num_global_key_value_heads", *((found[1], None) if same else (kv_heads,)))
        else:
            found = width, kv_heads if same and kv_heads else K
        for layer in full(draft):
            layer.set("mixer.head_dim", found[0])
            layer.set("mixer.kv_heads", found[1])
            layer.set("mixer.values_are_keys", same)

    @staticmethod
    def each(r: Reader, draft: Draft, key: str, kv_heads: int, width: int) -> tuple[int, int]:
        """Width and number of heads, which all layers without a window must have alike, and no other."""
        objects, found = r.inside(key), []
        for i, layer in enumerate(draft.layers):
            own = objects.inside(str(i)) if objects else None
            if layer.get("mixer.window") is None:
                found.append((own.size("head_dim", width), own.size("num_key_value_heads", kv_heads)) if own else
                             (width, kv_heads))
            if own:
                own.close()
        if objects:
            objects.close()
        if len(set(found)) > 1:
            raise r.error(key, f"the same for all layers of {FULL}")
        return found[0]

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Both ways."""
        wide = full(draft)
        most = next((layer for layer in draft.layers if layer not in wide), wide[0])
        (K, d), own = ((one.get("mixer.kv_heads"), one.get("mixer.head_dim")) for one in (most, wide[0]))
        same = wide[0].get("mixer.values_are_keys")
        given = {"head_dim": own[1]} | ({} if own[0] == K else {"num_key_value_heads": own[0]})
        return {
            "num_key_value_heads": K, "head_dim": d, "global_head_dim": own[1], "attention_k_eq_v": same,
            "num_global_key_value_heads": own[0] if same else None,
            key: {str(i): given for i, layer in enumerate(draft.layers) if layer in wide},
        }

    def says(self) -> str:
        return "mixer.head_dim, mixer.kv_heads and mixer.values_are_keys without a window"


GEMMA4 = GEMMA3.but(
    "gemma4_text", "Gemma4ForCausalLM", names=(GEMMA4_NAMES,), norm=NORM,
    layer={
        "mixer": OWN, "post_mixer": NORM, "post_ffn": NORM, "end": part(LayerEnd),
    },
    without=("hidden_act", "query_pre_attn_scalar", "attn_logit_softcapping"),
    missing={"vocab_size": 262_144},
    keys={
        "rms_norm_eps": number(*EPS, "mixer.value_norm.eps", "end.norm.eps", "end.inputs.norm.eps", "ffn.norm.eps",
                               missing=1e-6),
        "hidden_activation": only(GELU, written=True),
        "use_bidirectional_attention": only(None, "vision"),
        "layer_types": EndsFull(6, default=512),
        "rope_parameters": RopeOfEach(), "per_layer_config": HeadsOfFull(),
        "hidden_size_per_layer_input": OwnInputs(), "vocab_size_per_layer_input": OwnRows(),
        "num_kv_shared_layers": Borrowed(), "use_double_wide_mlp": TwiceAsWide(),
        "enable_moe_block": ExpertsBeside(), "intermediate_size": size("ffn.hidden", "ffn.shared.hidden"),
        "num_experts": count("ffn.experts", missing=None, null=None),
        "top_k_experts": size("ffn.top_k", missing=None, null=None),
        "moe_intermediate_size": size("ffn.expert.hidden", missing=None, null=None),
    },
    ignorable=GEMMA3.ignorable | UNUSED,
    irrelevant=frozenset({"expert_intermediate_size"}),
)
UNIFIED = GEMMA4.but(  # 12B, whose pictures and sound go through no tower: of its text model Gemma 4's plain kind
    "gemma4_unified_text", "Gemma4UnifiedForCausalLM", missing={"max_position_embeddings": 262_144},
    keys={
        "layer_types": EndsFull(6, default=1024), "hidden_size_per_layer_input": only(0, None),
        "vocab_size_per_layer_input": unread(ABSENT), "enable_moe_block": only(False, None),
        "num_experts": only(None), "top_k_experts": only(None), "moe_intermediate_size": only(None),
    },
)
AROUND = GEMMA4.irrelevant | {"vision_config", "audio_config", "eoa_token_index", "vision_soft_tokens_per_image"}
LEFT_OUT = tuple(f"model.{name}." for name in (
    "vision_tower", "audio_tower", "vision_embedder", "embed_vision", "embed_audio"))
INSIDE = (moved(GEMMA4_NAMES, "model.", "model.language_model."),)
FAMILIES = {
    "gemma4_text": GEMMA4, "gemma4_unified_text": UNIFIED,
    "gemma4": TextInside.of(GEMMA4, "gemma4_text", names=INSIDE, irrelevant=AROUND, left_out=LEFT_OUT),
    "gemma4_unified": TextInside.of(UNIFIED, "gemma4_unified_text", names=INSIDE, irrelevant=AROUND, left_out=LEFT_OUT),
}
