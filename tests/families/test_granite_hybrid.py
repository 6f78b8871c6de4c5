"""Granite 4 and Bamba: which layer is what, what published configs say, what is refused."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, Mamba2, MoE, Norm, Rope
from nanollm.errors import ConfigError

H_SMALL = dict(
    model_type="granitemoehybrid", architectures=["GraniteMoeHybridForCausalLM"], attention_bias=False,
    attention_dropout=0.0, attention_multiplier=0.0078125, bos_token_id=100257, embedding_multiplier=12,
    eos_token_id=100257, hidden_act="silu", hidden_size=4096, init_method="mup", initializer_range=0.1,
    intermediate_size=768, layer_types=(["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4, logits_scaling=16,
    logits_to_keep=None, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64,
    mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128, mamba_proj_bias=False,
    max_position_embeddings=131072, normalization_function="rmsnorm", num_attention_heads=32, num_experts_per_tok=10,
    num_hidden_layers=40, num_key_value_heads=8, num_local_experts=72, output_router_logits=False, pad_token_id=100256,
    position_embedding_type="nope", residual_multiplier=0.22, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000,
    router_aux_loss_coef=0.0001, shared_intermediate_size=1536, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.56.0", use_cache=True, vocab_size=100352,
)
BAMBA = dict(
    model_type="bamba", architectures=["BambaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_layer_indices=[9, 18, 27], bos_token_id=128000, eos_token_id=128001, hidden_act="silu", hidden_size=4096,
    initializer_range=0.02, intermediate_size=14336, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4,
    mamba_d_head=64, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128, mamba_proj_bias=False,
    max_position_embeddings=262144, mlp_bias=False, num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=8, num_logits_to_keep=1, pad_token_id=0, rms_norm_eps=1e-5, rope_scaling=None,
    rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=128256,
)
NORM, SCAN = Norm(eps=1e-5), Mamba2(128, 64, 1, 128, 4)


def test_h_small():
    config = read_config(H_SMALL)[1]
    experts = MoE(72, 10, MLP(768), True, MLP(1536), round_weights=True)
    assert config.layers[0] == Layer(SCAN, experts, NORM, pre_ffn=NORM, residual_scale=0.22)
    attention = Attention(32, 8, 128, scale=0.0078125)
    assert config.layers[5] == config.layers[35] == Layer(attention, experts, NORM, pre_ffn=NORM, residual_scale=0.22)
    assert len(set(config.layers)) == 2 and config.tied and config.embed_scale == 12 and config.head_scale == 1 / 16


def test_without_experts_and_with_rope():
    dense = H_SMALL | dict(num_local_experts=0, layer_types=["attention"] * 40, position_embedding_type="rope")
    layer, = set(read_config(dense)[1].layers)
    assert layer.ffn == MLP(1536) and layer.mixer == Attention(32, 8, 128, Rope(), scale=0.0078125)
    config = read_config(dense)[1]
    assert read_config(write_config(config, FAMILIES["granitemoehybrid"])[1])[1] == config


def test_bamba():
    config = read_config(BAMBA)[1]
    mlp, attention = MLP(14336), Attention(32, 8, 128, Rope(fraction=0.5))
    assert [i for i, layer in enumerate(config.layers) if layer == Layer(attention, mlp, NORM, pre_ffn=NORM)] == [
        9, 18, 27]
    assert config.layers[0] == Layer(SCAN, mlp, NORM, pre_ffn=NORM) and len(set(config.layers)) == 2
    least = read_config(BAMBA | dict(mamba_d_head="auto", attn_layer_indices=None))[1]
    assert set(least.layers) == {config.layers[0]}


@pytest.mark.parametrize("values, keys, cause", [
    (H_SMALL, dict(layer_types=["mamba"] * 39), "layer_types is .*expected 40 times mamba or attention"),
    (H_SMALL, dict(position_embedding_type="alibi"), "position_embedding_type is 'alibi'"),
    (H_SMALL, dict(num_local_experts=-1), "num_local_experts is -1"),
    (H_SMALL, dict(normalization_function="layernorm"), "normalization_function is 'layernorm'"),
    (H_SMALL, dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (H_SMALL, dict(mamba_d_head=32), "mamba_n_heads is 128; expected mamba_expand"),
    (BAMBA, dict(attn_layer_indices=[32]), "attn_layer_indices is .32.; expected a list of layers from 0 to 31"),
    (BAMBA, dict(mamba_n_groups=3), "groups = 3: expected a divisor of heads"),
])
def test_refused(values, keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(values | keys)
