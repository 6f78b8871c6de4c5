"""What the keys of GLM-4.5 and GLM-4.7-Flash mean."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, LatentAttention, Layer, ModelConfig, MoE, Norm, Rope
from nanollm.errors import ConfigError

AIR = dict(  # GLM-4.5-Air
    model_type="glm4_moe", vocab_size=151552, hidden_size=4096, intermediate_size=10944, num_hidden_layers=46,
    num_attention_heads=96, num_key_value_heads=8, head_dim=128, attention_bias=True, partial_rotary_factor=0.5,
    rope_theta=1_000_000, rope_scaling=None, max_position_embeddings=131072, rms_norm_eps=1e-5, use_qk_norm=False,
    moe_intermediate_size=1408, n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8, norm_topk_prob=True,
    n_group=1, topk_group=1, routed_scaling_factor=1.0, first_k_dense_replace=1, num_nextn_predict_layers=1,
    tie_word_embeddings=False,
)
FLASH = dict(
    model_type="glm4_moe_lite", vocab_size=154880, hidden_size=2048, intermediate_size=10240, num_hidden_layers=47,
    num_attention_heads=20, num_key_value_heads=20, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192,
    qk_rope_head_dim=64, v_head_dim=256, moe_intermediate_size=1536, n_routed_experts=64, n_shared_experts=1,
    num_experts_per_tok=4, norm_topk_prob=True, n_group=1, topk_group=1, topk_method="noaux_tc",
    routed_scaling_factor=1.8, first_k_dense_replace=1, partial_rotary_factor=1.0, rope_theta=1_000_000,
    rms_norm_eps=1e-5, max_position_embeddings=202752, tie_word_embeddings=False, num_nextn_predict_layers=1,
)
NORM = Norm(eps=1e-5)


def read(values: dict, **more) -> ModelConfig:
    return read_config(values | more)[1]


def test_published_sizes():
    def layers(mixer, mlp, moe, number):
        first, rest = (Layer(mixer, ffn, NORM, pre_ffn=NORM) for ffn in (mlp, moe))
        return first, *(rest,) * (number - 1)

    routed = dict(renormalize=True, score="sigmoid", correction=True, router_float32=True)
    mixer, moe = Attention(96, 8, 128, Rope(1e6, fraction=0.5), qkv_bias=True), MoE(
        128, 8, MLP(1408), shared=MLP(1408), **routed)
    assert read(AIR) == ModelConfig(151552, 4096, layers(mixer, MLP(10944), moe, 46), NORM, context=131072)
    mixer, moe = LatentAttention(20, 192, 64, 256, 512, 768, Rope(1e6, "interleaved")), MoE(
        64, 4, MLP(1536), shared=MLP(1536), scale=1.8, **routed)
    assert read(FLASH) == ModelConfig(154880, 2048, layers(mixer, MLP(10240), moe, 47), NORM, context=202752)


def test_which_layers_are_dense():
    def kinds(**more):
        short = {key: value for key, value in FLASH.items() if key != "first_k_dense_replace"}
        return "".join("-M"[isinstance(layer.ffn, MoE)] for layer in read(short, num_hidden_layers=4, **more).layers)
    words = ["sparse", "dense", "sparse", "dense"]
    assert kinds() == kinds(first_k_dense_replace=1) == "-MMM"
    assert kinds(mlp_layer_types=words) == "M-M-"
    config = read(FLASH, num_hidden_layers=4, mlp_layer_types=words, first_k_dense_replace=0)
    assert read_config(write_config(config, FAMILIES["glm4_moe_lite"])[1])[1] == config


REFUSED = {
    "another number of dense layers": (FLASH, dict(first_k_dense_replace=3), "first_k_dense_replace is 3; expected 1"),
    "too few words": (FLASH, dict(mlp_layer_types=["dense"]), "expected 47 times dense or sparse"),
    "half of the rotated part": (FLASH, dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; expected 1.0"),
    "a bias on latents": (FLASH, dict(attention_bias=True), "attention_bias is True; expected False"),
    "more groups than there are": (AIR, dict(topk_group=3), "topk_group is 3; expected 1, or n_group of at least"),
    "groups of one": (AIR, dict(n_group=128, topk_group=8), "ExpertGroups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    base, keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(base, **keys)
