"""What a missing key means, family by family: what transformers' config class fills in.

Each key of a config.json is dropped in turn. transformers' class fills it; what we read of the filled one must be
what we read where the key is missing. A size that every published config states may be refused instead, by name: a
model of a wrong size would not load anyway.
"""

import json
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from checkpoints.families import FAMILIES, difference, read_config
from nanollm.config import ModelConfig
from nanollm.errors import ConfigError
from tests.fixtures import FIXTURES
from tests.oracles import hf_config

NATIVE: dict[str, str] = {}  # model_type → its first fixture, of those that transformers has a class for
for _name, _fixture in FIXTURES.items():
    if _fixture.oracle == "native" and _fixture.kind in FAMILIES:
        NATIVE.setdefault(_fixture.kind, _name)

SIZES = {  # without these nothing is known of a model, and every published config has them
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "n_embd", "n_layer", "n_head", "d_model", "n_layers", "n_heads", "num_layers", "num_heads", "num_experts_per_tok",
}


LATENT = "the class fills its own number, whatever the heads; latent attention has a key for each head"
EXPLAINED = {  # where our reading differs on purpose
    **{(kind, "num_key_value_heads"): LATENT for kind in (
        "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite", "deepseek_v32", "glm_moe_dsa", "mistral4")},
}


def filled(values: dict[str, Any]) -> dict[str, Any] | None:
    """The config.json with every key that transformers' class has; None where the class itself refuses it."""
    kind = transformers.CONFIG_MAPPING[values["model_type"]]
    try:
        return json.loads(kind.from_dict(kind._decode_special_floats(values)).to_json_string(use_diff=False))
    except (ValueError, StrictDataclassError):
        return None


def reading(values: dict[str, Any] | None) -> ModelConfig | str:
    """What we read, or the words of the refusal."""
    try:
        return "refused" if values is None else read_config(values)[1]
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("kind", NATIVE)
def test_a_missing_key_means_what_transformers_fills_in(kind):
    whole = json.loads(hf_config(FIXTURES[NATIVE[kind]]).to_json_string(use_diff=False))
    wrong, compared = [], 0
    for key in whole.keys() - {"model_type"}:
        values = {name: value for name, value in whole.items() if name != key}
        theirs, ours = reading(filled(values)), reading(values)
        compared += 1
        if isinstance(ours, str) and (key in SIZES or isinstance(theirs, str)):
            continue
        if ours != theirs and (kind, key) not in EXPLAINED:
            both = isinstance(ours, ModelConfig) and isinstance(theirs, ModelConfig)
            wrong.append(
                f"{key} missing, filled: {difference(ours, theirs, 'config') if both else f'{ours}, {theirs}'}"
            )
    assert compared > 20 and not wrong, "\n".join(wrong)
