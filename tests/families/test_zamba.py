"""Zamba: the published shape, which layers are hybrid, what is refused, and heads of the first Mamba by themselves."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Mamba, MultiHeadMamba, SharedBlockScan
from nanollm.errors import ConfigError
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mamba import Mamba as MambaModule
from nanollm.layers.multi_head_mamba import MultiHeadMamba as MultiHeadMambaModule
from tests.oracles import make_loud

SEVEN_B = dict(  # the shape of Zamba-7B-v1
    model_type="zamba", architectures=["ZambaForCausalLM"], attention_head_dim=464, attention_hidden_size=7424,
    attn_layer_offset=4, attn_layer_period=6, hidden_act="gelu", hidden_mamba_act="silu", hidden_size=3712,
    intermediate_size=14848, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_state=16, mamba_dt_rank=232, mamba_expand=2,
    mamba_proj_bias=False, max_position_embeddings=4096, n_mamba_heads=2, num_attention_heads=16,
    num_hidden_layers=76, num_key_value_heads=16, rms_norm_eps=1e-5, use_mamba_kernels=True, vocab_size=32000,
)


def test_seven_billion():
    config = read_config(SEVEN_B)[1]
    hybrid = [i for i, layer in enumerate(config.layers) if isinstance(layer.mixer, SharedBlockScan)]
    assert hybrid == [2, *range(7, 76, 6)]
    first = config.layers[2].mixer
    assert first.scan == config.layers[0].mixer == MultiHeadMamba(7424, 16, 4, 232, heads=2)
    assert first.block.attention == Attention(16, 16, 464, scale=(464 / 2) ** -0.5)
    assert first.block.mlp == MLP(14848, "gelu")
    assert read_config(write_config(config, FAMILIES["zamba"])[1])[1] == config


@pytest.mark.parametrize("keys, cause", [
    (dict(attention_head_dim=232), "attention_head_dim is 232"),
    (dict(hidden_mamba_act="gelu"), "hidden_mamba_act is 'gelu'"),
    (dict(n_mamba_heads=3), "MultiHeadMamba.heads = 3: expected a divisor of inner"),
    (dict(layers_block_type=["mamba"] * 3), "num_hidden_layers is 76; expected 3"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
])
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(SEVEN_B | keys)


def test_heads_are_mambas_of_their_own_channels():
    """Two heads are two Mambas of half the channels each, whose outputs are added."""
    both = MultiHeadMambaModule(MultiHeadMamba(64, 4, 4, 3, heads=2), 32)
    make_loud(both)
    x, ctx = torch.randn(2, 20, 32), ForwardContext(torch.arange(20).expand(2, 20), True, torch.float32)
    total = 0
    for head in range(2):
        alone = MambaModule(Mamba(32, 4, 4, 3), 32)
        mine = slice(32 * head, 32 * (head + 1))
        weights = {name: p[mine] for name, p in both.state_dict().items()}
        weights["in_proj.weight"] = both.in_proj.weight.unflatten(0, (2, 64))[:, mine].flatten(0, 1)
        weights["x_proj.weight"], weights["out_proj.weight"] = both.x_proj.weight[head], both.out_proj.weight[:, mine]
        alone.load_state_dict(weights)
        total = total + alone(x, ctx)
    assert torch.allclose(both(x, ctx), total, atol=1e-5)
