"""Jamba: which layer is what, what published configs say, what is refused."""

import pytest

from checkpoints.families import read_config, write_config
from checkpoints.families.jamba import JAMBA
from nanollm.config import MLP, Attention, Layer, Mamba, ModelConfig, MoE, Norm
from nanollm.errors import ConfigError

V01 = dict(
    model_type="jamba", architectures=["JambaForCausalLM"], attention_dropout=0.0, attn_layer_offset=4,
    attn_layer_period=8, bos_token_id=1, eos_token_id=2, expert_layer_offset=1, expert_layer_period=2,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336, mamba_conv_bias=True,
    mamba_d_conv=4, mamba_d_state=16, mamba_dt_rank=256, mamba_expand=2, mamba_proj_bias=False,
    max_position_embeddings=262144, num_attention_heads=32, num_experts=16, num_experts_per_tok=2,
    num_hidden_layers=32, num_key_value_heads=8, num_logits_to_keep=1, output_router_logits=False, pad_token_id=0,
    rms_norm_eps=1e-6, router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="4.40.0.dev0", use_cache=True, use_mamba_kernels=True,
    vocab_size=65536,
)
NORM = Norm(eps=1e-6)
MIXER = Mamba(8192, 16, 4, 256, inner_norm=NORM)
EXPERTS = MoE(16, 2, MLP(14336), renormalize=False, round_weights=True)


def test_v01():
    config = read_config(V01)[1]
    assert [i for i, layer in enumerate(config.layers) if layer.mixer == Attention(32, 8, 128)] == [4, 12, 20, 28]
    assert [i for i, layer in enumerate(config.layers) if layer.ffn == EXPERTS] == [*range(1, 32, 2)]
    assert config.layers[0] == Layer(MIXER, MLP(14336), NORM, pre_ffn=NORM) and len(set(config.layers)) == 3
    assert not config.tied and not config.float32_residual and config.context == 262144
    family, values = write_config(config, JAMBA)
    assert {
        key: values[key] for key in V01.keys() & values.keys() if "token_id" not in key and "dtype" not in key
    }.items() <= V01.items()


def test_defaults():
    sizes = dict(
        model_type="jamba", vocab_size=97, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_hidden_layers=32,
    )
    assert read_config(sizes)[1].layers == read_config(V01)[1].layers
    assert {layer.ffn for layer in read_config(sizes | dict(num_experts=1))[1].layers} == {MLP(14336)}


@pytest.mark.parametrize("keys, cause", [
    (dict(attn_layer_offset=8), "attn_layer_offset is 8; expected a whole number from 0 to attn_layer_period - 1"),
    (dict(expert_layer_offset=-1), "expert_layer_offset is -1"),
    (dict(sliding_window=4096), "sliding_window is 4096; expected None"),
    (dict(mamba_inner_layernorms=False), "mamba_inner_layernorms is False"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(num_attention_heads=30), "num_attention_heads is 30; expected a divisor of"),
    (dict(num_experts_per_tok=17), "top_k = 17: expected at most experts"),
])
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(V01 | keys)


def test_what_jamba_cannot_say():
    scan, attention = Layer(MIXER, MLP(64)), Layer(Attention(32, 8, 128), MLP(64))
    for layers, cause in (
        ((scan,), "no layer has attention"),
        ((attention, scan, attention, scan, scan), r"layers\[4\].mixer is .*would be read as"),
    ):
        with pytest.raises(ConfigError, match=f"jamba: .*{cause}"):
            write_config(ModelConfig(97, 4096, layers, context=128), JAMBA)
    assert write_config(ModelConfig(97, 4096, (attention,) * 2, context=128), JAMBA)[1]["attn_layer_period"] == 1
