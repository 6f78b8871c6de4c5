"""Llama 4: Scout (16 experts in every layer) and Maverick (128, in every other one). Of the multimodal folder the text.

    attention   three layers of four rotate and see their own chunk of 8,192 tokens; the fourth rotates nothing, sees
                all, and its queries grow with the position (nanollm/layers/chunked_attention.py, scaling.py)
    q and k     in the layers that rotate, every head over its root mean square, no gain (`use_qk_norm`: Scout). Here
                before the rotation, in the published code after it: which leaves the length as it is, up to rounding
    experts     1 a token; σ of its logit is multiplied into what it reads (nanollm/layers/input_weighted_moe.py), and
                one expert that every token visits
    RoPE        neighbours turn together, in float32; base 5e5; Scout: Llama 3.1's stretch, by 16

On disk the experts of a layer are one tensor, transposed, the gate's columns left of up's. A layer without experts has
an MLP of `intermediate_size_mlp`. Scores are rounded to the working dtype before the published softmax, here after it.
https://github.com/meta-llama/llama-models/blob/main/models/llama4/MODEL_CARD.md
"""

from typing import Any

from checkpoints.families.llama import ATTENTION_BIAS, GATED, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.multimodal import TextInside
from checkpoints.names.config_rows import HeadDim, Kinds, RopeKeys
from checkpoints.names.config_table import ABSENT, Draft, activation, count, only, part, size
from checkpoints.names.expert_ops import Turned, TurnedGateUp
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, moved, override, rule, under
from nanollm.config import MLP, Attention, ChunkedAttention, InputWeightedMoE, LogTokenSteps, Norm, Rope

LLAMA4_NAMES = override(
    LLAMA_NAMES,
    *under("model.layers.{i}.feed_forward", "layers.{i}.ffn", {**GATED, "router": "router"}),
    *under("model.layers.{i}.feed_forward.shared_expert", "layers.{i}.ffn.shared", GATED),
    rule("model.layers.{i}.feed_forward.experts.gate_up_proj", EXPERTS_GATE_UP, TurnedGateUp),
    rule("model.layers.{i}.feed_forward.experts.down_proj", "layers.{i}.ffn.experts.down", Turned),
)


class Interleaved(Kinds):
    """Which layers rotate, each in its chunk, and which do not and see all; and what either has of its own."""

    def __init__(self) -> None:
        parts = {
            "chunked": part(ChunkedAttention, rope=part(Rope, layout="interleaved", rounds="result"), window=1),
            "tempered": part(Attention, growth=part(LogTokenSteps, original=2, beta=0.1)), "full": part(Attention),
        }
        super().__init__("mixer", parts, self.kinds, lambda kinds: {})

    def kinds(self, r: Reader, layers: int) -> list[str]:
        """A 1 in `no_rope_layers` is a layer that rotates; where it is missing or empty, every fourth does not."""
        every, tuned = r.size("no_rope_layer_interval", 4), r.flag("attn_temperature_tuning", True)
        r.must("nope_layer_interval", every)
        rotates = r.get("no_rope_layers", None) or [int((i + 1) % every != 0) for i in range(layers)]
        if not isinstance(rotates, list) or len(rotates) != layers or not all(one in (0, 1) for one in rotates):
            raise r.error("no_rope_layers", f"{layers} times 0 or 1")
        r.must("layer_types", ["chunked_attention" if one else "full_attention" for one in rotates], None)
        return ["chunked" if one else "tempered" if tuned else "full" for one in rotates]

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The kind of each layer, with the length of its chunks and its norm, or of the steps in which queries grow."""
        super().read(r, draft, key)
        chunk, step = r.size("attention_chunk_size", 8192), r.size("floor_scale", 8192)
        norm = part(Norm, gain=False) if r.flag("use_qk_norm", True) else None
        for layer in draft.layers:
            if layer.get("mixer").kind is ChunkedAttention:
                layer.set("mixer.window", chunk)
                layer.set("mixer.qk_norm", norm)
            else:
                layer.set("mixer.growth.original", step)            # where there is one

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The list, and what the layers have of their own; what none has at its default."""
        chunked = [layer for layer in draft.layers if layer.get("mixer").kind is ChunkedAttention]
        steps = [layer.get("mixer.growth.original") for layer in draft.layers if layer not in chunked]
        return {
            key: [int(layer in chunked) for layer in draft.layers], "attn_temperature_tuning": ABSENT not in steps,
            "use_qk_norm": not chunked or chunked[0].get("mixer.qk_norm") is not None,
            "attention_chunk_size": chunked[0].get("mixer.window") if chunked else 8192,
            "floor_scale": next((step for step in steps if step is not ABSENT), 8192),
        }


def kinds(r: Reader, layers: int) -> list[str]:
    """The kind of each layer: experts in those that `moe_layers` names, or else in every so many-th."""
    every = r.size("interleave_moe_layer_step", 1)
    routed = r.get("moe_layers", None)
    routed = list(range(every - 1, layers, every)) if routed is None else routed
    if not isinstance(routed, list) or not all(type(i) is int and 0 <= i < layers for i in routed):
        raise r.error("moe_layers", f"a list of layers from 0 to {layers - 1}")
    return ["experts" if i in routed else "mlp" for i in range(layers)]


def keys(kinds: list[str]) -> dict[str, Any]:
    """The layers with experts."""
    return {"moe_layers": [i for i, kind in enumerate(kinds) if kind == "experts"]}


EXPERTS = part(InputWeightedMoE, expert=part(MLP), shared=part(MLP), renormalize=False, score="sigmoid",
               round_weights=True)
LLAMA4 = LLAMA_SHAPE.but(
    "llama4_text", "Llama4ForCausalLM", names=(LLAMA4_NAMES,),
    missing={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    keys={
        "no_rope_layers": Interleaved(),
        "moe_layers": Kinds("ffn", {"mlp": part(MLP), "experts": EXPERTS}, kinds, keys),
        "head_dim": HeadDim(missing=128), "attention_bias": ATTENTION_BIAS, "attn_scale": only(0.1),
        "intermediate_size_mlp": size("ffn.hidden", missing=16384),
        "intermediate_size": size("ffn.expert.hidden", "ffn.shared.hidden", missing=8192),
        "hidden_act": activation(
            "ffn.activation", "ffn.expert.activation", "ffn.shared.activation", missing="silu"),
        "num_local_experts": count("ffn.experts", missing=16), "num_experts_per_tok": size("ffn.top_k", missing=1),
        "rope_parameters": RopeKeys(theta=500_000.0),
    },
    irrelevant=frozenset({"for_llm_compressor"}),
)
LLAMA4_WITH_VISION = TextInside.of(
    LLAMA4, "llama4_text", names=(moved(LLAMA4_NAMES, "", "language_model."),),
    irrelevant=LLAMA4.irrelevant | {"vision_config", "boi_token_index", "eoi_token_index", "image_token_index"},
    left_out=("vision_model.", "multi_modal_projector."),
)
FAMILIES = {"llama4_text": LLAMA4, "llama4": LLAMA4_WITH_VISION}
