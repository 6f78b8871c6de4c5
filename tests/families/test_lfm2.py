"""LFM2: which layer is what, how wide the MLP is, what is refused; and the convolution by hand."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, MoE, Norm, Rope, ShortConv
from nanollm.errors import ConfigError
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.short_conv import ShortConv as ShortConvModule

LFM2 = dict(
    model_type="lfm2", architectures=["Lfm2ForCausalLM"], block_auto_adjust_ff_dim=True, block_dim=2048,
    block_ff_dim=12288, block_ffn_dim_multiplier=1.0, block_mlp_init_scale=1.0, block_multiple_of=256,
    block_norm_eps=1e-5, block_out_init_scale=1.0, block_use_swiglu=True, block_use_xavier_init=True, bos_token_id=1,
    conv_L_cache=3, conv_bias=False, conv_dim=2048, conv_dim_out=2048, conv_use_xavier_init=True, eos_token_id=7,
    full_attn_idxs=[2, 5, 8, 10, 12, 14], hidden_size=2048, initializer_range=0.02, max_position_embeddings=128000,
    norm_eps=1e-5, num_attention_heads=32, num_heads=32, num_hidden_layers=16, num_key_value_heads=8, pad_token_id=0,
    rope_theta=1000000.0, torch_dtype="bfloat16", transformers_version="4.54.0", use_cache=True, use_pos_enc=True,
    vocab_size=65536,
)
MOE = {key: value for key, value in LFM2.items() if not key.startswith("block_") and key != "full_attn_idxs"} | dict(
    model_type="lfm2_moe", architectures=["Lfm2MoeForCausalLM"], intermediate_size=7168, moe_intermediate_size=1792,
    layer_types=["conv", "conv", "full_attention", "conv"] * 4, norm_topk_prob=True, num_dense_layers=2,
    num_experts=32, num_experts_per_tok=4, routed_scaling_factor=1.0, use_expert_bias=True,
)
NORM = Norm(eps=1e-5)
ATTENTION = Attention(32, 8, 64, Rope(1e6), qk_norm=NORM)


def test_lfm2():
    config = read_config(LFM2)[1]
    assert config.layers[0] == Layer(ShortConv(2048, 3), MLP(8192), NORM, pre_ffn=NORM) and config.tied
    assert [i for i, layer in enumerate(config.layers) if layer == Layer(ATTENTION, MLP(8192), NORM, pre_ffn=NORM)] == [
        2, 5, 8, 10, 12, 14]
    assert read_config(write_config(config, FAMILIES["lfm2"])[1])[1] == config


def test_experts():
    config = read_config(MOE)[1]
    experts = MoE(32, 4, MLP(1792), 1e-6, score="sigmoid", correction=True)
    assert [layer.ffn for layer in config.layers] == [MLP(7168)] * 2 + [experts] * 14
    assert read_config(write_config(config, FAMILIES["lfm2_moe"])[1])[1] == config
    assert read_config(MOE | dict(norm_topk_prob=False))[1].layers[2].ffn.renormalize is False


@pytest.mark.parametrize("keys, width", [
    (dict(), 8192), (dict(block_ffn_dim_multiplier=1.3), 10752), (dict(block_ffn_dim_multiplier=None), 8192),
    (dict(block_multiple_of=100), 8200), (dict(block_auto_adjust_ff_dim=False), 12288), (dict(block_ff_dim=100), 256),
])
def test_the_width_is_adjusted(keys, width):
    assert read_config(LFM2 | keys)[1].layers[0].ffn == MLP(width)


@pytest.mark.parametrize("values, keys, cause", [
    (LFM2, dict(intermediate_size=6656), "block_ff_dim is 12288; expected 6656"),
    (LFM2, dict(layer_types=["conv"] * 16), "full_attn_idxs is .*expected the layers that layer_types calls"),
    (LFM2, dict(full_attn_idxs="all"), "full_attn_idxs is 'all'"),
    (LFM2, dict(conv_dim=1024), "conv_dim is 1024; expected 2048"),
    (LFM2, dict(block_use_swiglu=False), "block_use_swiglu is False"),
    (LFM2, dict(block_norm_eps=1e-6), "block_norm_eps is 1e-06; expected 1e-05"),
    (LFM2, dict(use_pos_enc=False), "use_pos_enc is False"),
    (MOE, dict(layer_types=["conv", "mamba"] * 8), "layer_types is .*expected 16 times conv or full_attention"),
    (MOE, dict(num_experts_per_tok=33), "top_k = 33: expected at most experts"),
])
def test_refused(values, keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(values | keys)


def test_the_convolution_by_hand():
    """One channel: gates of 2 and 10, taps 1, 2, 3 for the token itself, the one before, the one before that."""
    mixer = ShortConvModule(ShortConv(1, 3), 1)
    mixer.in_proj.weight.data, mixer.out_proj.weight.data = torch.tensor([[2.0], [10.0], [1.0]]), torch.ones(1, 1)
    mixer.conv1d.weight.data = torch.tensor([[[3.0, 2.0, 1.0]]])
    x = torch.tensor([[[1.0], [2.0], [0.0], [1.0]]])                        # B ⊙ x̃ = 2x², C = 10x: u = 2 8 0 2
    y = mixer(x, ForwardContext(torch.arange(4)[None], True, torch.float32))
    assert y.flatten().tolist() == [10 * 1 * 2, 10 * 2 * (8 + 4), 0.0, 10 * 1 * (2 + 0 + 24)]
