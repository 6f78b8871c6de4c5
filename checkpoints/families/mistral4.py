"""Mistral Small 4, 119B-A6B: latent attention whose queries grow as Ministral 3's, and many small experts.

    attention   DeepSeek-V3's (nanollm/layers/latent_attention.py), interleaved, YaRN, with the growth of ministral3.py
    experts     softmax, 4 of 128, renormalised, and one that every token visits; groups, if there are any, as V3 has
                them. The router works in the working dtype, and so does its softmax there, which is float32 here

RoPE's object also says which part of a query turns; it must be what `qk_rope_head_dim` says.

mistral3 is a folder with a vision tower, which is left out, around a text_config: a Mistral (Mistral-Small-3.1, 3.2), a
Ministral 3 or a Mistral 4. Whether the head is tied is said outside, or else inside.

    on the hub                        language_model.model.layers.…     vision_tower.…          multi_modal_projector.…
    as the modules are called now     model.language_model.layers.…     model.vision_tower.…
"""

from typing import Any, ClassVar

from checkpoints.families.deepseek import DEEPSEEK_V3, LATENT_NAMES, SHARED, FirstDense, Groups, TemperedRope, width
from checkpoints.families.ministral3 import BETA, MINISTRAL3, GrowingQueries
from checkpoints.families.mistral import MISTRAL
from checkpoints.families.multimodal import TextInside, inside
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_table import Draft, only
from checkpoints.names.reader import Reader
from checkpoints.names.rope import ORIGINAL
from nanollm.config import LatentAttention, ModelConfig


class TemperedGrowth(GrowingQueries, TemperedRope):
    """RoPE, how queries grow, and the scale of the scores, which the same object says."""
    published: ClassVar[dict[str, Any]] = {
        "type": "yarn", "rope_theta": 1e4, "factor": 128.0, ORIGINAL: 8192, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, BETA: 0.1,
    }

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The object, or the published one, without the part that turns, which must be that of qk_rope_head_dim."""
        key = next((key for key in ("rope_scaling", "rope_parameters") if r.get(key, None)), "rope_parameters")
        said = r.inside(key) or r.of(dict(self.published), f"{key}.")
        said.must("partial_rotary_factor", draft["mixer.rope_dim"] / width(draft))
        rest = {name: value for name, value in said.values.items() if name != "partial_rotary_factor"}
        inner = r.of(r.values | {key: rest})
        super().read(inner, draft, key)
        r.seen |= inner.seen

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The object, in the new dialect alone: what the class reads in the old one lacks the part that turns."""
        said = super().write(draft, key)["rope_parameters"]
        return {"rope_parameters": said | {"partial_rotary_factor": draft["mixer.rope_dim"] / width(draft)}}


MISTRAL4 = DEEPSEEK_V3.but(
    "mistral4", "Mistral4ForCausalLM", names=with_experts(LATENT_NAMES, *SHARED)[::-1],
    missing={
        "max_position_embeddings": 1048576, "n_routed_experts": 128, "num_experts_per_tok": 4, "q_lora_rank": 1024,
        "routed_scaling_factor": 1.0, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    },
    keys={
        "first_k_dense_replace": FirstDense(missing=0, round_weights=True), "n_group": Groups(count=1, kept=1, best=2),
        "head_dim": only(width), "rope_parameters": TemperedGrowth(),
        "scoring_func": only("softmax"), "sliding_window": only(None),
    },
    without=("topk_method", "head_dim", "rope_parameters"), ahead="",
)


class OneInside(TextInside):
    """A text_config of Mistral, which a missing model_type means, of Ministral 3, or of Mistral 4."""
    FAMILIES = {"mistral": MISTRAL, "ministral3": MINISTRAL3, "mistral4": MISTRAL4}

    def read(self, r: Reader) -> ModelConfig:
        """The language model. Raises ConfigError where there is no text_config."""
        text = r.inside("text_config")
        if text is None:
            raise r.error("text_config", "an object, the config of the language model")
        family = self.FAMILIES[text.must("model_type", *self.FAMILIES)]
        tied = r.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False))
        inner = text.of(text.values | {"tie_word_embeddings": tied})
        config = family.read(inner)
        inner.close(family.irrelevant)
        return config

    def saved_as(self, config: ModelConfig) -> str:
        """The text model that it is."""
        return MISTRAL4.name if latent(config) else self.name


def latent(config: ModelConfig) -> bool:
    """Whether it is a Mistral 4: those before it have no latent attention."""
    return isinstance(config.layers[0].mixer, LatentAttention)


MISTRAL3 = OneInside.of(
    MINISTRAL3, names_of=lambda config: inside((MISTRAL4 if latent(config) else MINISTRAL3).names),
    irrelevant=frozenset({"vision_config", "image_token_index", "multimodal_projector_bias", "projector_hidden_act",
                          "spatial_merge_size", "vision_feature_layer"}),
    left_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
FAMILIES = {"mistral4": MISTRAL4, "mistral3": MISTRAL3}
