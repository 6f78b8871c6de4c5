"""OLMo-hybrid: the published shape, what missing keys mean, where there is no RoPE, what is refused."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from checkpoints.families.olmo_hybrid import Apart
from nanollm.config import MLP, Attention, GatedDeltaNet, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.model import Decoder

TYPES = (["linear_attention"] * 3 + ["full_attention"]) * 8
HYBRID_7B = dict(
    model_type="olmo_hybrid", architectures=["OlmoHybridForCausalLM"], attention_bias=False, attention_dropout=0.0,
    eos_token_id=100257, hidden_act="silu", hidden_size=3840, initializer_range=0.02, intermediate_size=11008,
    layer_types=TYPES, linear_allow_neg_eigval=True, linear_conv_kernel_dim=4, linear_key_head_dim=96,
    linear_num_key_heads=30, linear_num_value_heads=30, linear_value_head_dim=192, max_position_embeddings=65536,
    num_attention_heads=30, num_hidden_layers=32, num_key_value_heads=30, pad_token_id=100277, rms_norm_eps=1e-6,
    rope_parameters=dict(rope_theta=None, rope_type="default"), tie_word_embeddings=False, use_cache=True,
    vocab_size=100352,
)
NORM, HEADS = Norm(cast_after_gain=True), Norm(cast_after_gain=True, scope="all")
DELTA = Layer(GatedDeltaNet(30, 30, 192, 96, 4, 1e-5, True), MLP(11008), NORM, pre_ffn=NORM)
FULL = Layer(Attention(30, 30, 128, qk_norm=HEADS), MLP(11008), None, NORM, None, NORM)


def read(**keys) -> ModelConfig:
    return read_config(HYBRID_7B | keys)[1]


def test_published_sizes():
    config = read()
    assert config == ModelConfig(100352, 3840, (DELTA, DELTA, DELTA, FULL) * 8, NORM, context=65536)
    values = write_config(config, FAMILIES["olmo_hybrid"])[1]
    assert {key: values[key] for key in HYBRID_7B.keys() & values.keys() if "token_id" not in key}.items() <= (
        HYBRID_7B.items())
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(config).parameters()) == 7_430_870_688


def test_what_missing_keys_mean():
    sizes = ("linear_num", "linear_key", "linear_value", "num_key", "layer_types")
    least = {key: value for key, value in HYBRID_7B.items() if not key.startswith((*sizes, "linear_"))}
    assert read_config(least)[1] == read() == read(**{key: None for key in HYBRID_7B if key.startswith(sizes)})
    short = read_config(least | {"num_hidden_layers": 3})[1]
    assert short.layers == (DELTA, DELTA, FULL), "the last one attends where no fourth one would"
    assert not read(linear_allow_neg_eigval=False).layers[0].mixer.reflects


def test_rope_where_theta_is_a_number():
    rope = Rope(5e5, rounds="result")
    assert read(rope_parameters=dict(rope_theta=5e5, rope_type="default")).layers[3].mixer.rope == rope
    old = {key: value for key, value in HYBRID_7B.items() if key != "rope_parameters"}
    assert read_config(old | {"rope_theta": None})[1] == read()
    assert read_config(old | {"rope_theta": 5e5})[1].layers[3].mixer.rope == rope
    assert read_config(old)[1].layers[3].mixer.rope == Rope(rounds="result")


@pytest.mark.parametrize("keys, cause", [
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(layer_types=TYPES[1:]), "expected 32 times linear_attention or full_attention"),
    (dict(layer_types=["full_attention"] * 32), "expected some of either kind"),
    (dict(rope_parameters=dict(rope_theta=None, rope_type="yarn")), "rope_parameters.rope_type is 'yarn'"),
    (dict(linear_num_key_heads=7), r"key_heads = 7: expected a divisor of heads \(30\)"),
    (dict(num_attention_heads=31), "num_attention_heads is 31; expected a divisor of"),
])
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read(**keys)


def test_three_tensors_are_one():
    layer = Layer(GatedDeltaNet(4, 2, 3, 1, 4), None, pre_ffn=None)
    rows = torch.arange(16)[:, None]
    assert Apart.shapes([rows], layer) == [(2, 1), (2, 1), (12, 1)]
    assert [(at, len(piece), int(piece[0])) for at, piece in Apart.pieces([rows], layer)] == [
        (0, 2, 0), (1, 2, 2), (2, 12, 4)]
