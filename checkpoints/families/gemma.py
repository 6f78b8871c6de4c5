"""Gemma: Llama's block with a scaled embedding, norms whose gain is stored as an offset from one, and GeGLU. Tied.

    e = √D · E[token]                                                                    RMS norms with gain 1 + g
    x += [norm] o(attention(norm(x)));  x += [norm] down(gelu(gate(h)) · up(h)),  h = norm(x)

    family        [norm]  1 / scale of the scores              soft caps         layers                     arXiv
    1, CodeGemma  –       √d                                   –                 all full                   2403.08295
    2             yes     √query_pre_attn_scalar: 256, but     50 on scores,     sliding (4096) and full    2408.00118
                          144 for 27B                          30 on logits      in turn
    Vault         –       √query_pre_attn_scalar: 256          as 2              as 2                       2510.15001
    3             yes     likewise, but 168 for 27B            –                 5 sliding, 1 full …        2503.19786

Gemma 3 also normalises every head of q and k, and has two RoPEs: the sliding layers (512 keys in 1B and 270M, 1024
above) turn with base 1e4 whatever the context, the full ones with base 1e6, stretched by 8 from 4B on. Heads are 256
wide, 128 in both 27B, whatever hidden_size is.

The product of norm and gain is rounded once, and √D is rounded to the working dtype before it multiplies (√3072 is 55.5
in bfloat16). The gelu is always the tanh form: "hidden_act": "gelu" in the first Gemma configs means that one too.

A `gemma3` folder (4B and above) also has a vision tower. Its language model is the object "text_config", in which the
hub leaves out what is the class default; its tensors stand under language_model, and the tower's are left out.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen import QK_NORM
from checkpoints.names.config_rows import FULL, SLIDING, DividingHeads, Periodic
from checkpoints.names.config_table import Draft, Follows, Part, Repeats, Row, number, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import moved, override, rule, under
from nanollm.config import ModelConfig, Norm, Rope

GEMMA2_NAMES = override(LLAMA_NAMES, *under("model.layers.{i}", "layers.{i}", {
    "post_attention_layernorm": "post_mixer",
    "pre_feedforward_layernorm": "pre_ffn", "post_feedforward_layernorm": "post_ffn",
}))
GEMMA3_NAMES = override(GEMMA2_NAMES, *QK_NORM)


class QueryScalar(Row):
    """The scores are divided by the root of this, and by √d where it is d."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The scale 1/√scalar, or None where that is 1/√d."""
        scalar = r.number(key, 256)
        draft["mixer.scale"] = None if scalar == draft["mixer.head_dim"] else scalar**-0.5

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The whole number nearest to 1/scale²."""
        scale = draft["mixer.scale"]
        return {key: draft["mixer.head_dim"] if scale is None else round(scale**-2)}


class TwoRopes(Row):
    """One for the layers that slide, another for the full ones.

    rope_parameters has an object for each. Where it has none, the bases are rope_local_base_freq and rope_theta, and
    rope_scaling is for the full layers alone. A RoPE that no layer has is written as the family's own."""
    BASES = {SLIDING: ("rope_local_base_freq", 1e4), FULL: ("rope_theta", 1e6)}
    fraction: float | None = None  # as RopeKeys.fraction

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Read both, and give each layer the one of its kind."""
        each, scaling, ropes = r.inside("rope_parameters"), r.inside("rope_scaling"), {}
        for kind, (base, theta) in self.BASES.items():
            own = each.inside(kind) if each else None
            given = {**(own.values if own else {}), **(scaling.values if scaling and kind == FULL else {})}
            values = {"rope_theta": r.number(base, theta, above=1), "rope_parameters": given}
            if self.fraction is not None:
                values["partial_rotary_factor"] = r.number("partial_rotary_factor", self.fraction)
            inner = r.of(values, f"{r.prefix}{kind}.")
            ropes[kind] = read_rope(inner, theta, draft["context"], self.fraction)
        if each:
            each.close()
        for layer in draft.layers:
            rope = ropes[SLIDING if layer.get("mixer.window") else FULL]
            for name in ("theta", "fraction", "scaling"):
                layer.set(f"mixer.rope.{name}", getattr(rope, name))

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Both, in the keys of the old dialect and of the new one."""
        ropes = {kind: Rope(theta) for kind, (_, theta) in self.BASES.items()}
        for layer in draft.layers:
            if isinstance(rope := layer.get("mixer.rope"), Part):
                ropes[SLIDING if layer.get("mixer.window") else FULL] = rope.build()
        new = {kind: write_rope(rope)["rope_parameters"] for kind, rope in ropes.items()}
        old = {base: ropes[kind].theta for kind, (base, _) in self.BASES.items()}
        return old | {"rope_scaling": write_rope(ropes[FULL])["rope_scaling"], "rope_parameters": new}


class WithVision(Family):
    """A config.json whose "text_config" is the language model's."""

    def read(self, r: Reader) -> ModelConfig:
        """The language model. Raises ConfigError where there is no text_config."""
        text = r.inside("text_config")
        if text is None:
            raise r.error("text_config", "an object, the config of the language model")
        text.must("model_type", "gemma3_text")
        text.must("final_logit_softcapping", None)  # the multimodal class applies none
        config = super().read(text)
        text.close(UNREAD)
        r.must("tie_word_embeddings", config.tied)
        return config


GELU, NORM = "gelu_pytorch_tanh", part(Norm, offset=1.0, cast_after_gain=True)
UNREAD = frozenset({"cache_implementation", "_sliding_window_pattern"})
GEMMA = LLAMA_SHAPE.but(
    "gemma", "GemmaForCausalLM", norm=NORM, layer={"ffn.activation": "gelu_tanh"},
    missing={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    keys={
        "hidden_act": only(GELU, "gelu", written=True),  # two keys for one thing, of which transformers read now one
        "hidden_activation": only(GELU, None, written=True),  # and now the other: both must mean the tanh form
        "attention_bias": ATTENTION_BIAS,
        "use_bidirectional_attention": only(None, False),
        "embed_scale": Follows(lambda draft: draft["dim"] ** 0.5),
    },
)
GEMMA2 = GEMMA.but(
    "gemma2", "Gemma2ForCausalLM", names=(GEMMA2_NAMES,), layer={"post_mixer": NORM, "post_ffn": NORM},
    missing={"num_key_value_heads": 4},
    keys={
        "num_attention_heads": DividingHeads(),
        "head_dim": size("mixer.head_dim", missing=256),
        "query_pre_attn_scalar": QueryScalar(),
        "layer_types": Periodic(2), "sliding_window_size": Repeats("sliding_window", missing=4096),
        "attn_logit_softcapping": number("mixer.softcap", missing=50.0, null=None),
        "final_logit_softcapping": number("head_softcap", missing=30.0, null=None),
    },
    irrelevant=UNREAD,
)
VAULTGEMMA = GEMMA2.but(
    "vaultgemma", "VaultGemmaForCausalLM", layer={"post_mixer": None, "post_ffn": None},
    names=(override(LLAMA_NAMES, rule("model.layers.{i}.pre_feedforward_layernorm", "layers.{i}.pre_ffn")),),
)
GEMMA3 = GEMMA2.but(
    "gemma3_text", "Gemma3ForCausalLM", names=(GEMMA3_NAMES,), layer={"mixer.qk_norm": NORM},
    without=("sliding_window_size",),
    missing={"vocab_size": 262_208, "num_attention_heads": 8, "max_position_embeddings": 131_072},
    keys={
        "num_key_value_heads": size("mixer.kv_heads", missing=4),
        "layer_types": Periodic(6, "sliding_window_pattern"),
        "attn_logit_softcapping": only(None),  # transformers knows the key and applies none
        "final_logit_softcapping": number("head_softcap", missing=None),
        "rope_parameters": TwoRopes(),
    },
)
GEMMA3_WITH_VISION = WithVision(
    GEMMA3.name, GEMMA3.architecture, keys=GEMMA3.keys, layer=GEMMA3.layer, model=GEMMA3.model,
    names=(moved(GEMMA3_NAMES, "", "language_model."), moved(GEMMA3_NAMES, "model.", "model.language_model.")),
    irrelevant=frozenset({"vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index",
                          "eoi_token_index", "image_token_id", "boi_token_id", "eoi_token_id"}),
    left_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
FAMILIES = {
    "gemma": GEMMA, "gemma2": GEMMA2, "vaultgemma": VAULTGEMMA, "gemma3_text": GEMMA3, "gemma3": GEMMA3_WITH_VISION,
}
