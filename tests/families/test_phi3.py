"""What Phi-3's keys mean and which of them are refused."""

import json
import math

import pytest
import torch
import transformers

import checkpoints
from checkpoints.families import read_config, write_config
from checkpoints.families.phi3 import PHI3
from nanollm.config import MLP, Attention, Layer, LongRope, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError
from tests.fixtures.phi3 import LONGROPE, ORIGINAL
from tests.oracles import BASE, difference, make_loud
from tests.oracles import rope as rotary

SIZES = dict(
    model_type="phi3", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6
)
LISTS = dict(short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[2.0, 3.0, 4.0, 5.0])


def read(**keys) -> ModelConfig:
    return read_config(SIZES | keys)[1]


def rope(**keys) -> Rope:
    return read(**keys).layers[0].mixer.rope


def test_defaults():
    norm = Norm(eps=1e-5)
    assert read() == ModelConfig(
        97, 48, (Layer(Attention(6, 6, 8, Rope(10_000.0)), MLP(80), norm, None, norm),) * 3, norm, context=4096
    )


def test_the_temperature_is_that_of_phi_3_mini_128k():
    """√(1 + ln 32 / ln 4096) from contexts of 131072 and 4096, in every spelling."""
    expected = LongRope(
        tuple(LISTS["short_factor"]), tuple(LISTS["long_factor"]), 4096, math.sqrt(1 + math.log(32) / math.log(4096))
    )
    long = dict(max_position_embeddings=131072)
    for spelling in (
        dict(rope_scaling={"type": "su", **LISTS}), dict(rope_scaling={"rope_type": "longrope", **LISTS}),
        dict(
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 4096, **LISTS,
            }
        ),
    ):
        assert rope(**long, **spelling).scaling == expected
    assert expected.attention_factor == pytest.approx(1.1902380714238083)


def test_three_quarters_of_a_head():
    lists = {key: value[:3] for key, value in LISTS.items()}
    assert rope(partial_rotary_factor=0.75, rope_scaling={"type": "longrope", **lists}).fraction == 0.75


@pytest.mark.parametrize(
    "keys, complaint",
    [
        (
            dict(rope_scaling={"type": "longrope", **LISTS, "short_factor": [1.0] * 3}),
            "rope_scaling.short_factor .* list of 4 numbers, .* not of 3",
        ),
        (
            dict(rope_parameters={"rope_type": "longrope", **LISTS, "long_factor": [1.0] * 5}),
            "rope_parameters.long_factor .* 4 numbers, .* not of 5",
        ),
        (
            dict(rope_scaling={"type": "longrope", **LISTS}, partial_rotary_factor=0.75),
            "short_factor .* list of 3 numbers",
        ),
        (
            dict(rope_scaling={"type": "longrope", **LISTS, "short_factor": [1.0, 2.0, 0.0, 1.0]}),
            "short_factor is .* finite numbers above 0",
        ),
        (
            dict(rope_scaling={"type": "yarn", "factor": 4.0}),
            "rope_scaling.type is 'yarn'; expected 'default' or 'longrope' or 'su'",
        ),
        (
            dict(rope_parameters={"rope_type": "linear", "factor": 4.0}),
            "rope_parameters.rope_type is 'linear'; expected 'default'",
        ),
        (
            dict(rope_scaling={"type": "su", **LISTS, "original_max_position_embeddings": 2048}),
            "original_max_position_embeddings is 2048; expected 4096",
        ),
        (dict(lm_head_bias=True), "lm_head_bias is True"), (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"), (dict(full_attn_mod=2), "full_attn_mod is 2"),
        (dict(interpolate_factor=2), "interpolate_factor is 2"),
    ],
)
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(**keys)


def test_written_anew_it_reads_back():
    for keys in (
        dict(sliding_window=7),
        dict(rope_scaling={"type": "su", **LISTS}, original_max_position_embeddings=1024, num_key_value_heads=2),
    ):
        assert write_config(read(**keys), PHI3)[0] is PHI3               # write_config compares what it reads back


TOWER = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
SOUND = TOWER | dict(num_blocks=1, ext_pw_out_channel=16, depthwise_separable_out_channel=16, nemo_conv_channels=16,
                     input_size=8)


@torch.inference_mode()
def test_phi_4_multimodal_is_read_without_its_towers(tmp_path):
    keys = BASE | rotary("longrope", **LONGROPE) | ORIGINAL | dict(
        vision_config=TOWER | dict(num_hidden_layers=2, image_size=28, crop_size=28), audio_config=SOUND,
        tie_word_embeddings=True, pad_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("phi4_multimodal", **keys), attn_implementation="eager").eval()
    make_loud(theirs)
    theirs.save_pretrained(tmp_path / "in")
    with pytest.warns(UserWarning, match="left out: model.embed_tokens_extend"):
        ours = checkpoints.load(tmp_path / "in")
    for length in (1, 24, 48):                           # the list of divisors changes at the 25th token
        x = torch.randint(0, 131, (2, length), generator=torch.Generator().manual_seed(length))
        assert difference(ours(x), theirs(x, use_cache=False).logits) < 1e-5
    checkpoints.save(ours, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "phi3"
    assert checkpoints.load(tmp_path / "out").config == ours.config
