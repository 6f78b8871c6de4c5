"""What the keys of AFMoE and of Hunyuan-A13B mean."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import ModelConfig, MoE
from nanollm.errors import ConfigError

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6)
AFMOE = SIZES | dict(model_type="afmoe")
HUNYUAN = SIZES | dict(model_type="hunyuan_v1_moe", num_experts=4, moe_topk=2)


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_which_layers_slide_and_which_have_experts():
    def shape(**keys):
        layers = read(AFMOE, **keys).layers
        assert all((layer.mixer.attention.window is None) == (layer.mixer.rope is None) for layer in layers)
        return "".join("SF"[layer.mixer.rope is None] + "-M"[isinstance(layer.ffn, MoE)] for layer in layers)
    assert shape() == "S-SMSMFM" and shape(num_dense_layers=3, global_attn_every_n_layers=2) == "S-F-S-FM"
    assert shape(layer_types=["full_attention"] * 4) == "F-FMFMFM"
    assert read(AFMOE).embed_scale == 1 and read(AFMOE, mup_enabled=True).embed_scale == 48 ** 0.5


def test_a_number_once_or_for_each_layer():
    lists = dict(moe_topk=[2] * 4, num_experts=[4] * 4, num_shared_expert=[1] * 4, moe_intermediate_size=[80] * 4)
    same = read(HUNYUAN, **lists)
    assert same == read(HUNYUAN) and same.layers[0].ffn.top_k == 2


def test_what_is_written_reads_back():
    for base, keys in ((AFMOE, dict(mup_enabled=True)), (AFMOE, dict(sliding_window=7)), (HUNYUAN, {})):
        config = read(base, **keys)
        assert read_config(write_config(config, FAMILIES[base["model_type"]])[1])[1] == config


REFUSED = {
    "biases": (AFMOE, dict(attention_bias=True), "attention_bias is True"),
    "groups": (AFMOE, dict(n_group=4), "n_group is 4; expected 1"),
    "layers that differ": (HUNYUAN, dict(moe_topk=[1, 2, 2, 2]), "expected a number, or 4 times the same"),
    "two shared experts": (HUNYUAN, dict(num_shared_expert=2), "num_shared_expert is 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    base, keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(base, **keys)
