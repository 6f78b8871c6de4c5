"""What the keys of families with DeepSeek-V3's experts, or experts of their own, mean: dots.llm1, Solar-Open,
MiniMax-M2, ERNIE-4.5, DBRX, FlexOlmo, Hunyuan 3."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, ModelConfig, MoE, Norm, Rope, Yarn
from nanollm.errors import ConfigError
from nanollm.layers.moe import route
from tests.fixtures import FIXTURES
from tests.oracles import write

SIZES = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
V3 = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
DOTS = SIZES | V3 | dict(model_type="dots1", intermediate_size=80, num_key_value_heads=6)
SOLAR = dict(
    model_type="solar_open", partial_rotary_factor=1.0, hidden_size=4096, num_hidden_layers=48, num_attention_heads=64,
    head_dim=128, num_key_value_heads=8, vocab_size=196608, intermediate_size=10240, moe_intermediate_size=1280,
    rms_norm_eps=1e-5, rope_theta=1_000_000, max_position_embeddings=131072, n_routed_experts=128, n_shared_experts=1,
    norm_topk_prob=True, routed_scaling_factor=1.0, num_experts_per_tok=8, tie_word_embeddings=False,
    first_k_dense_replace=0, rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536},
)
M2 = dict(
    model_type="minimax_m2", attn_type_list=[1] * 62, head_dim=128, hidden_act="silu", hidden_size=3072,
    intermediate_size=1536, max_position_embeddings=204800, mtp_transformer_layers=1, num_attention_heads=48,
    num_experts_per_tok=8, num_hidden_layers=62, num_key_value_heads=8, num_local_experts=256, num_mtp_modules=3,
    qk_norm_type="per_layer", rms_norm_eps=1e-6, rope_theta=5_000_000, rotary_dim=64, scoring_func="sigmoid",
    shared_intermediate_size=0, tie_word_embeddings=False, use_mtp=True, use_qk_norm=True, use_routing_bias=True,
    vocab_size=200064,
)
HY3 = SIZES | dict(model_type="hy_v3", num_key_value_heads=2)
ERNIE = SIZES | dict(model_type="ernie4_5_moe", intermediate_size=80, num_hidden_layers=6, num_key_value_heads=2)
DBRX = dict(
    model_type="dbrx", d_model=6144, n_heads=48, n_layers=40, max_seq_len=32768, vocab_size=100352, resid_pdrop=0.0,
    emb_pdrop=0.0, tie_word_embeddings=False,
    attn_config=dict(clip_qkv=8, kv_n_heads=8, rope_theta=500_000),
    ffn_config=dict(ffn_hidden_size=10752, moe_jitter_eps=0.01, moe_loss_weight=0.05, moe_num_experts=16, moe_top_k=4),
)


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_published_sizes():
    norm = Norm(eps=1e-5)
    moe = MoE(128, 8, MLP(1280), True, MLP(1280), score="sigmoid", correction=True, router_float32=True)
    layer = Layer(Attention(64, 8, 128, Rope(1e6, scaling=Yarn(2.0, 65536))), moe, norm, pre_ffn=norm)
    assert read(SOLAR) == ModelConfig(196608, 4096, (layer,) * 48, norm, context=131072)
    moe = MoE(256, 8, MLP(1536), True, score="sigmoid", correction=True)
    layer = Layer(Attention(48, 8, 128, Rope(5e6, fraction=0.5), qk_norm=Norm(scope="all")), moe)
    assert read(M2) == ModelConfig(200064, 3072, (layer,) * 62, context=204800)
    norm = Norm("layer", 1e-5)
    layer = Layer(Attention(48, 8, 128, Rope(500_000.0), clip=8), MoE(16, 4, MLP(10752), True, round_weights=True),
                  norm, pre_ffn=norm)
    assert read(DBRX) == ModelConfig(100352, 6144, (layer,) * 40, norm, context=32768)


def test_which_layers_have_experts():
    def kinds(base, **keys):
        return "".join("-M"[isinstance(layer.ffn, MoE)] for layer in read(base, **keys).layers)
    assert kinds(HY3) == "-MM" and kinds(HY3, mlp_layer_types=["sparse"] * 3) == "MMM"
    assert kinds(DOTS) == "MMM" and kinds(DOTS, first_k_dense_replace=2) == "--M"
    assert kinds(ERNIE) == kinds(ERNIE, moe_layer_end_index=None) == "-MMMMM"
    assert kinds(ERNIE, moe_layer_start_index=2, moe_layer_end_index=4) == "--MMM-"
    assert kinds(ERNIE, moe_layer_interval=3) == "--M--M" and kinds(ERNIE, moe_layer_start_index=6) == "------"


def test_ropes_and_windows_of_mellum():
    base = SIZES | dict(model_type="mellum", moe_intermediate_size=24, intermediate_size=80, num_experts_per_tok=2,
                        num_key_value_heads=2)
    config = read(base, layer_types=["full_attention", "sliding_attention", "full_attention"],
                  mlp_layer_types=["dense", "sparse", "sparse"])
    assert [layer.mixer.window for layer in config.layers] == [None, 1024, None]
    assert [layer.mixer.rope.theta for layer in config.layers] == [5e5, 1e4, 5e5]
    assert isinstance(config.layers[0].ffn, MLP) and config.layers[1].ffn.renormalize
    assert {layer.mixer.window for layer in read(base).layers} == {None}
    with pytest.raises(ConfigError, match="layer_types is"):
        read(base, layer_types=["conv"] * 3)


MIMO = SIZES | dict(model_type="mimo_v2_flash", moe_intermediate_size=24, intermediate_size=80, n_routed_experts=8,
                    num_experts_per_tok=2)


def test_a_correction_on_the_logits_of_kolibri():
    base = SIZES | dict(model_type="kolibri1", num_key_value_heads=2, num_hidden_layers=6)
    config = read(base, norm_topk_prob=True)
    assert [layer.mixer.window for layer in config.layers] == [513] * 4 + [None, 513]
    assert [layer.mixer.rope is None for layer in config.layers] == [False] * 4 + [True, False]
    logits, c = torch.tensor([[4.0, -3.0, 3.0]]), torch.tensor([0.0, 7.5, 0.5])
    chosen = route(logits, dataclasses.replace(config.layers[0].ffn, experts=3, top_k=2), c)[1]
    assert chosen.tolist() == [[1, 0]]                   # 4.5, 4, 3.5; of the sigmoids 7.5, 1.5 (the third), 1


def test_heads_gates_and_ropes_of_laguna():
    base = SIZES | dict(model_type="laguna", moe_intermediate_size=24, intermediate_size=80, num_key_value_heads=2)
    config = read(base, num_attention_heads_per_layer=[6, 2, 4], gating="per-element",
                  layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert [layer.mixer.attention.heads for layer in config.layers] == [6, 2, 4]
    assert [layer.mixer.rope for layer in config.layers] == [Rope(5e5, fraction=0.5), Rope(), Rope(5e5, fraction=0.5)]
    assert {(layer.mixer.per, layer.mixer.activation) for layer in config.layers} == {("channel", "softplus")}
    assert read(base).layers[0].mixer.per == "head" and isinstance(read(base).layers[0].ffn, MLP)
    for keys, words in (
        (dict(num_attention_heads_per_layer=[6, 2]), "num_attention_heads_per_layer is"),
        (dict(gating=False), "gating is False"), (dict(moe_router_logit_softcapping=30.0), "softcapping is 30.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(base, **keys)


def test_what_slides_in_mimo():
    config = read(MIMO, num_key_value_heads=3, sliding_window_size=7)
    found = [(layer.mixer.attention.window, layer.mixer.attention.kv_heads, layer.mixer.attention.sinks)
             for layer in config.layers]
    assert found == [(None, 3, False), (8, 6, True), (8, 6, True)]
    assert [layer.mixer.rope.theta for layer in config.layers] == [5e6, 1e4, 1e4]
    for keys, words in (
        (dict(hybrid_layer_pattern=[1, 1, 1]), r"hybrid_layer_pattern is \[1, 1, 1\]; expected \[0, 1, 1\]"),
        (dict(moe_layer_freq=[1, 1, 1]), "moe_layer_freq is"), (dict(swa_num_key_value_heads=3), "expected 6"),
        (dict(swa_v_head_dim=64), "swa_v_head_dim is 64; expected 128"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(MIMO, num_key_value_heads=3, **keys)


def test_what_is_written_reads_back():
    for base, keys in (
        (DOTS, dict(sliding_window=7, max_window_layers=2)), (M2, dict(rotary_dim=128)), (DBRX, {}),
        (ERNIE, dict(moe_layer_interval=3)), (ERNIE, dict(moe_layer_start_index=6)),
        (ERNIE, dict(moe_num_shared_experts=0)), (DBRX, dict(ffn_config=dict(moe_normalize_expert_weights=None))),
    ):
        config = read(base, **keys)
        assert read_config(write_config(config, FAMILIES[base["model_type"]])[1])[1] == config


def test_the_base_of_dbrx_is_that_of_attention():
    """transformers 5 adds rope_parameters with 1e4, which counts only where attn_config says nothing."""
    def theta(base, **rope):
        return read(DBRX, attn_config=base, rope_parameters={"rope_type": "default", **rope}).layers[0].mixer.rope.theta
    assert theta({"rope_theta": 5e5}, rope_theta=1e4) == theta({"rope_theta": 5e5}, rope_theta=5e5) == 5e5
    assert theta({}, rope_theta=2e5) == 2e5
    with pytest.raises(ConfigError, match=r"rope_parameters .* the base of attn_config.rope_theta"):
        theta({"rope_theta": 5e5}, rope_theta=2e5)


def test_what_predicts_ahead_is_left_out_of_ernie(tmp_path):
    write(FIXTURES["ernie-4.5-21b"], tmp_path)
    path = tmp_path / "model.safetensors"
    ahead = {f"model.mtp_{name}.weight": torch.zeros(64) for name in (
        "block.0.input_layernorm", "block.0.mlp.up_proj", "emb_norm.0", "hidden_norm.0", "linear_proj.0")}
    save_file(load_file(path) | ahead, path, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"left out: model.mtp_block.0.… \(2 tensors, .*model.mtp_linear_proj.…"):
        checkpoints.load(tmp_path)


REFUSED = {
    "part of a head": (SOLAR, dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; expected 1.0"),
    "a dense layer": (SOLAR, dict(first_k_dense_replace=1), "first_k_dense_replace is 1; expected 0"),
    "no number of experts": (DOTS, dict(n_routed_experts=None), "n_routed_experts is None"),
    "scores of another kind": (DOTS, dict(scoring_func="softmax"), "scoring_func is 'softmax'"),
    "linear attention": (M2, dict(attn_type_list=[0, 1] * 31), "attn_type_list"),
    "no correction": (M2, dict(use_routing_bias=False), "use_routing_bias is False"),
    "more than a head": (M2, dict(rotary_dim=129), "rotary_dim is 129; expected a whole number from 1 to 128"),
    "dense layers said twice": (HY3, dict(first_k_dense_replace=2), "first_k_dense_replace is 2; expected 1"),
    "biases": (ERNIE, dict(use_bias=True), "use_bias is True"),
    "a norm of order 2": (DBRX, dict(ffn_config={"moe_normalize_expert_weights": 2}), "ffn_config.moe_normalize"),
    "an activation with more": (
        DBRX, dict(ffn_config={"ffn_act_fn": {"name": "silu", "beta": 2}}), "ffn_act_fn.beta = 2",
    ),
    "an unknown key inside": (DBRX, dict(attn_config={"qk_ln": True}), "attn_config.qk_ln = True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    base, keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(base, **keys)
