"""Ministral 3 (3B, 8B, 14B): Mistral with YaRN, in which queries grow with the logarithm of their position.

    q ← q · (1 + β ln(1 + ⌊p / L⌋))       β = llama_4_scaling_beta, 0.1;  L = original_max_position_embeddings, 16384

Both keys stand inside RoPE's object. A missing object means the published one: base 1e6, stretched by 16. Heads are 128
wide. A model without the growth is written as the Mistral that it is.
"""

from typing import Any, ClassVar

from checkpoints.families.family import Family
from checkpoints.families.mistral import MISTRAL
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import ABSENT, Draft, part, size
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
    published: ClassVar[dict[str, Any]] = PUBLISHED  # what a missing object means

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """What RoPE is beside the growth."""
        keys = ("rope_scaling", "rope_parameters")
        key = next((key for key in keys if r.get(key, None)), "rope_parameters")
        said = r.inside(key) or r.of(dict(self.published), f"{key}.")
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


FAMILIES = {"ministral3": MINISTRAL3}
