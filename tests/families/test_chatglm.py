"""ChatGLM's keys: the two meanings of rope_ratio, and the variants that are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import read_config, write_config
from checkpoints.families.chatglm import CHATGLM
from nanollm.config import Linear, ModelConfig, Rope
from nanollm.errors import CheckpointError, ConfigError
from tests.fixtures.chatglm import FIXTURES
from tests.oracles import difference, reference_logits, tokens
from tests.oracles import write as write_folder

VALUES = dict(
    model_type="chatglm", padded_vocab_size=97, hidden_size=48, ffn_hidden_size=80, num_layers=2,
    num_attention_heads=6, kv_channels=12, multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True,
)
DIVIDED, LARGER_BASE = Rope(1e4, "interleaved", 0.5, Linear(16.0)), Rope(16e4, "interleaved", 0.5)


def read(**keys) -> ModelConfig:
    return read_config(VALUES | keys)[1]


def rope(**keys) -> Rope:
    return read(**keys).layers[0].mixer.rope


@pytest.mark.parametrize("keys, expected", [
    (dict(_name_or_path="THUDM/chatglm2-6b-32k"), DIVIDED),
    (dict(_name_or_path="/cache/models--THUDM--chatglm2-6b-32k/snapshots/0a1b"), DIVIDED),
    (dict(_name_or_path="THUDM/chatglm3-6b-128k"), LARGER_BASE),
    (dict(_name_or_path="THUDM/glm4-9b-chat"), LARGER_BASE),             # as in the first upload of GLM-4
    (dict(_name_or_path="THUDM/glm-4-9b-chat-1m"), LARGER_BASE),
    (dict(_name_or_path="out/tuned", padded_vocab_size=151552), LARGER_BASE),
    (dict(rope_ratio_scales="positions"), DIVIDED),
    (dict(rope_ratio_scales="base"), LARGER_BASE),
    (dict(_name_or_path="THUDM/chatglm2-6b-32k", rope_ratio_scales="base"), LARGER_BASE),     # who says it knows it
])
def test_what_the_ratio_scales(keys, expected):
    assert rope(rope_ratio=16, **keys) == expected


@pytest.mark.parametrize(
    "name", [{}, {"_name_or_path": "out/tuned"}, {"_name_or_path": "chatglm2-to-chatglm3"}, {"_name_or_path": None}]
)
def test_a_ratio_that_cannot_be_understood_is_refused_with_both_meanings(name):
    both = (
        'rope_ratio is 16; expected "rope_ratio_scales" .* "positions" where positions are divided '
        '.* "base" where the base is multiplied'
    )
    with pytest.raises(ConfigError, match=both):
        rope(rope_ratio=16, **name)
    assert rope(rope_ratio=1, **name) == rope(**name) == Rope(1e4, "interleaved", 0.5)  # 1 means nothing either way


@pytest.mark.parametrize(
    "key, value",
    [
        ("rmsnorm", False), ("post_layer_norm", False), ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True), ("fp32_residual_connection", True), ("pre_seq_len", 128),
        ("quantization_bit", 4), ("multi_query_attention", False),
        ("num_hidden_layers", 3), ("vocab_size", 98), ("rope_ratio_scales", "angles"), ("rope_theta", 1e4),
        ("position_encoding_2d", True),
    ],
)
def test_refusals(key, value):
    with pytest.raises(ConfigError, match=f"{key} (is|=) {value!r}"):
        read(**{key: value})


def test_a_head_of_its_own_is_kept_where_config_json_says_tied(tmp_path):
    """As fine-tuning tools write it. The published code has no get_output_embeddings, so that nothing is ever tied."""
    fixture = FIXTURES["chatglm2-6b"]
    theirs = write_folder(fixture, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    x = tokens(fixture)
    with torch.inference_mode():
        assert difference(checkpoints.load(tmp_path)(x), reference_logits(fixture, theirs, x)) < fixture.bound
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.output_layer.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing:\n    transformer.output_layer.weight"):
        checkpoints.load(tmp_path)


def test_written_anew_it_says_what_the_ratio_scales():
    for scales in ("positions", "base"):
        config = read(rope_ratio=16, rope_ratio_scales=scales)
        assert (
            write_config(config, CHATGLM)[1]["rope_ratio_scales"] == scales
        )  # write_config compares what it reads back


def test_the_buffer_of_the_first_uploads_is_passed_over(tmp_path):
    write_folder(FIXTURES["chatglm2-6b"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"transformer.rotary_pos_emb.inv_freq": torch.ones(3)}, tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert len(list(checkpoints.load(tmp_path).parameters())) == 3 * 12 + 3
