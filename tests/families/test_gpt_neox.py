"""GPT-NeoX's config.json: the published sizes, both dialects, what is refused; and what old folders hold beside the
weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, Linear, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import write

PYTHIA = dict(
    model_type="gpt_neox", hidden_act="gelu", hidden_size=512, initializer_range=0.02, intermediate_size=2048,
    layer_norm_eps=1e-5, max_position_embeddings=2048, num_attention_heads=8, num_hidden_layers=6,
    rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, use_cache=True, use_parallel_residual=True,
    vocab_size=50304,
)
NEOX_20B = dict(
    model_type="gpt_neox", attention_probs_dropout_prob=0, hidden_act="gelu_fast", hidden_dropout_prob=0,
    hidden_size=6144, intermediate_size=24576, layer_norm_eps=1e-5, max_position_embeddings=2048,
    num_attention_heads=64, num_hidden_layers=44, rotary_emb_base=10000, rotary_pct=0.25, vocab_size=50432,
)
NORM = Norm("layer", 1e-5, bias=True)


def read(base: dict = PYTHIA, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_published_sizes():
    layer = Layer(
        Attention(8, 8, 64, Rope(fraction=0.25), qkv_bias=True, out_bias=True), MLP(2048, "gelu", False, True), NORM,
        pre_ffn=NORM, parallel=True,
    )
    assert read() == ModelConfig(50304, 512, (layer,) * 6, NORM, context=2048)
    assert read(NEOX_20B).layers[0].ffn == MLP(24576, "gelu_tanh", False, True) and read(NEOX_20B).layers[0].parallel
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read()).parameters()) == 70_426_624
        assert sum(p.numel() for p in Decoder(read(NEOX_20B)).parameters()) == 20_554_567_680


def test_both_dialects_read_alike():
    bare = {key: value for key, value in PYTHIA.items() if key not in ("rotary_emb_base", "rotary_pct")}
    assert read(bare) == read()  # a missing rotary_pct means a quarter, not the whole
    old = read(rotary_emb_base=5e4, rotary_pct=0.5, rope_scaling={"type": "linear", "factor": 2.0})
    assert old.layers[0].mixer.rope == Rope(5e4, fraction=0.5, scaling=Linear(2.0))
    assert (
        read(
            bare,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4, "partial_rotary_factor": 0.5},
        )
        == old
    )
    assert (
        read(bare, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4})
        .layers[0]
        .mixer.rope.fraction
        == 0.25
    )


def test_what_is_written_reads_back():
    for config in (
        read(), read(rotary_pct=1.0),
        read(NEOX_20B, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
    ):
        assert read_config(write_config(config, FAMILIES["gpt_neox"])[1])[1] == config


@pytest.mark.parametrize("keys, complaint", [
    ({"rotary_pct": 0.3}, "an even number of rotated channels, not 19.2 of 64"),
    ({"rotary_pct": 0}, "rotary_pct is 0"),
    ({"num_attention_heads": 7}, "num_attention_heads is 7; expected a divisor"),
    ({"num_key_value_heads": 2}, "nothing here knows what these mean: num_key_value_heads = 2"),
    ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ({"rope_theta": 5e4}, "rope_theta is 50000.0; expected 10000.0"),
])
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(**keys)


def test_masks_among_the_tensors_are_passed_over(tmp_path):
    write(FIXTURES["pythia"], tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    extra = {
        "bias": torch.ones(1, 1, 128, 128).bool(), "masked_bias": torch.tensor(-1e9),
        "rotary_emb.inv_freq": torch.ones(2),
    }
    masks = {
        f"gpt_neox.layers.{i}.attention.{name}": tensor.clone() for i in range(3) for name, tensor in extra.items()
    }
    save_file(tensors | masks, tmp_path / "in/model.safetensors", {"format": "pt"})
    checkpoints.save(checkpoints.load(tmp_path / "in"), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()
