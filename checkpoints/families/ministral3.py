"""Ministral 3 (3B, 8B, 14B): Mistral with YaRN, in which queries grow with the logarithm of their position.

    q ← q · (1 + β ln(1 + ⌊p / L⌋))       β = llama_4_scaling_beta, 0.1;  L = original_max_position_embeddings, 16384

Both keys stand inside RoPE's object. A missing object means the published one: base 1e6, stretched by 16. Heads are 128
wide. A model without the growth is written as the Mistral that it is.

mistral3 is a folder with a vision tower, which is left out, around a text_config: a Mistral (Mistral-Small-3.1, 3.2) or
a Ministral 3. Whether the head is tied is said outside, or else inside.

    on the hub                        language_model.model.layers.…     vision_tower.…          multi_modal_projector.…
    as the modules are called now     model.language_model.layers.…     model.vision_tower.…
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.mistral import MISTRAL
from checkpoints.families.multimodal import TextInside, inside
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import ABSENT, Draft, part, read_keys, size
from checkpoints.names.reader import Reader
from checkpoints.names.rope import ORIGINAL
from nanollm.config import LogSteps, ModelConfig, Rope

BETA = "llama_4_scaling_beta"
PUBLISHED = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL: 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, BETA: 0.1,
}


class GrowingQueries(RopeKeys):
    """RoPE, and how queries grow, which the same object says."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """What RoPE is beside the growth."""
        keys = ("rope_scaling", "rope_parameters")
        key = next((key for key in keys if r.get(key, None)), "rope_parameters")
        said = r.inside(key) or r.of(dict(PUBLISHED), f"{key}.")
        original, beta = said.size(ORIGINAL), said.number(BETA)
        draft["mixer.growth"] = part(LogSteps, original=original, beta=beta)
        rest = {name: value for name, value in said.values.items() if name not in (BETA, "max_position_embeddings")}
        if rest.get("rope_type", rest.get("type", "default")) == "default":
            del rest[ORIGINAL]  # of the growth alone
        inner = r.of(r.values | dict.fromkeys(keys) | {key: rest})
        rope = super().rope(inner, draft)
        r.seen |= inner.seen
        return rope

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """RoPE's keys, with those of the growth inside."""
        values, growth = super().write(draft, key), draft["mixer.growth"]
        for name in ("rope_scaling", "rope_parameters"):
            if values.get(name) and growth not in (None, ABSENT):
                values[name] |= {ORIGINAL: growth.get("original"), BETA: growth.get("beta")}
        return values


class OrMistral(Family):
    """Without the growth it is a Mistral, of which transformers' class says nothing else."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        grows = any(getattr(layer.mixer, "growth", None) is not None for layer in config.layers)
        return super().write(config) if grows else MISTRAL.write(config)


MINISTRAL3 = OrMistral(
    MISTRAL.name, MISTRAL.architecture, keys=MISTRAL.keys, layer=MISTRAL.layer, names=MISTRAL.names,
    ignorable=MISTRAL.ignorable,
).but(
    "ministral3", "Ministral3ForCausalLM",
    missing={"head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144},
    keys={"rope_parameters": GrowingQueries(theta=1e6), "sliding_window": size("mixer.window", missing=None)},
)


class EitherInside(TextInside):
    """A text_config of Mistral, which a missing model_type means, or of Ministral 3."""
    KEYS = {"mistral": MISTRAL.keys, "ministral3": MINISTRAL3.keys}

    def read(self, r: Reader) -> ModelConfig:
        """The language model. Raises ConfigError where there is no text_config."""
        text = r.inside("text_config")
        if text is None:
            raise r.error("text_config", "an object, the config of the language model")
        keys = self.KEYS[text.must("model_type", *self.KEYS)]
        tied = r.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False))
        inner = text.of(text.values | {"tie_word_embeddings": tied})
        config = read_keys(keys, inner, self.model, self.layer)
        inner.close()
        return config


MISTRAL3 = EitherInside.of(
    MINISTRAL3, names=inside(MINISTRAL3.names),
    irrelevant=frozenset({"vision_config", "image_token_index", "multimodal_projector_bias", "projector_hidden_act",
                          "spatial_merge_size", "vision_feature_layer"}),
    left_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
FAMILIES = {"ministral3": MINISTRAL3, "mistral3": MISTRAL3}
