"""Nemotron-H and Nemotron 3: which branch each layer is, what published configs say, what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from checkpoints.families.nemotron_h import NEMOTRON_H_NAMES
from checkpoints.names.table import expand
from nanollm.config import MLP, Attention, LatentExpert, Layer, Mamba2, ModelConfig, MoE, Norm
from nanollm.errors import CheckpointError, ConfigError
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import tokens, write

SUPER = dict(  # nvidia/NVIDIA-Nemotron-3-Super-120B-A12B, without its quantisation
    model_type="nemotron_h", architectures=["NemotronHForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=1, chunk_size=128, conv_kernel=4, dtype="bfloat16", eos_token_id=2, expand=2, head_dim=128,
    hidden_dropout=0.0, hidden_size=4096, initializer_range=0.02, intermediate_size=2688, layer_norm_epsilon=1e-5,
    hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    mamba_head_dim=64, mamba_hidden_act="silu", mamba_num_heads=128, mamba_proj_bias=False,
    mamba_ssm_cache_dtype="float32", max_position_embeddings=262144, mlp_bias=False, mlp_hidden_act="relu2",
    moe_intermediate_size=2688, moe_latent_size=1024, moe_shared_expert_intermediate_size=5376,
    moe_shared_expert_overlap=False, mtp_hybrid_override_pattern="*E", n_group=1, n_groups=8, n_routed_experts=512,
    n_shared_experts=1, norm_eps=1e-5, norm_topk_prob=True, num_attention_heads=32, num_experts_per_tok=22,
    num_hidden_layers=88, num_key_value_heads=2, num_logits_to_keep=1, num_nextn_predict_layers=1, pad_token_id=0,
    partial_rotary_factor=1.0, rescale_prenorm_residual=True, residual_in_fp32=False, rope_theta=10000,
    routed_scaling_factor=5.0, sliding_window=None, ssm_state_size=128, tie_word_embeddings=False,
    time_step_floor=0.0001, time_step_limit=[0.0, float("inf")], time_step_max=0.1, time_step_min=0.001, topk_group=1,
    transformers_version="4.57.1", use_bias=False, use_cache=True, use_conv_bias=True, use_mamba_kernels=True,
    vocab_size=131072,
)
NORM = Norm(eps=1e-5, cast_after_gain=True)


def plain(hidden: int) -> MLP:
    return MLP(hidden, "relu2", gated=False)


def test_super():
    config = read_config(SUPER)[1]
    experts = MoE(512, 22, LatentExpert(1024, plain(2688)), True, plain(5376), score="sigmoid", correction=True,
                  scale=5.0, router_float32=True)
    assert config.layers[0] == Layer(Mamba2(128, 64, 8, 128, 4), None, NORM, pre_ffn=None)
    assert config.layers[1] == Layer(None, experts, None, pre_ffn=NORM)
    assert config.layers[7] == Layer(Attention(32, 2, 128), None, NORM, pre_ffn=None)
    assert len(config.layers) == 88 and len(set(config.layers)) == 3 and config.final_norm == NORM
    values = write_config(config, FAMILIES["nemotron_h"])[1]
    assert values["hybrid_override_pattern"] == SUPER["hybrid_override_pattern"]


def test_words_in_place_of_letters():
    letters = "M-*E"
    config = read_config(SUPER | dict(hybrid_override_pattern=letters, num_hidden_layers=4))[1]
    words = {key: value for key, value in SUPER.items() if key not in ("hybrid_override_pattern", "num_hidden_layers")}
    for old, new in (("mamba", "attention"), ("linear_attention", "full_attention")):
        assert read_config(words | dict(layers_block_type=[old, "mlp", new, "moe"]))[1] == config
    assert config.layers[1] == Layer(None, plain(2688), None, pre_ffn=NORM)


def test_the_first_configs_call_the_width_of_a_head_otherwise():
    first = {key: value for key, value in SUPER.items() if key != "head_dim"} | dict(attention_head_dim=64)
    assert read_config(first)[1].layers[7].mixer == Attention(32, 2, 64)


@pytest.mark.parametrize("keys, cause", [
    (dict(hybrid_override_pattern="M-x"), "hybrid_override_pattern is 'M-x'; expected a letter a layer, of M . - E"),
    (dict(layers_block_type=["mamba"]), "expected what hybrid_override_pattern"),
    (dict(layers_block_type=["mamba", "hyena"]), "layers_block_type is .*expected as many .* times mamba or attention"),
    (dict(hybrid_override_pattern="M" * 20_000), "expected at most 10000 layers"),
    (dict(num_hidden_layers=52), "num_hidden_layers is 52; expected 88"),
    (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(norm_eps=1e-6), "norm_eps is 1e-06; expected 1e-05"),
    (dict(n_shared_experts=2), "n_shared_experts is 2"),
    (dict(residual_in_fp32=True), "residual_in_fp32 is True"),
    (dict(moe_latent_size=0), "moe_latent_size is 0"),
    (dict(time_step_limit=[0.1, 0.01]), "time_step_limit is .* expected two numbers"),
])
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(SUPER | keys)


def test_a_layer_of_two_branches_has_no_letter():
    layer = Layer(Mamba2(128, 64, 8, 128, 4), plain(64), NORM, pre_ffn=NORM)
    with pytest.raises(ConfigError, match="has Mamba2 and MLP, which is none of mamba, attention, mlp, moe"):
        write_config(ModelConfig(97, 4096, (layer,), NORM), FAMILIES["nemotron_h"])


def test_layers_that_predict_ahead_are_left_out(tmp_path):
    fixture = FIXTURES["nemotron-3-super"]
    write(fixture, tmp_path)
    expected = checkpoints.load(tmp_path)(tokens(fixture))
    stored = load_file(tmp_path / "model.safetensors")
    further = {"mtp.layers.0.eh_proj.weight": torch.zeros(4, 8), "mtp.layers.1.norm.weight": torch.zeros(4)}
    save_file(stored | further, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"left out: mtp\.… \(2 tensors"):
        assert torch.equal(checkpoints.load(tmp_path)(tokens(fixture)), expected)


def test_a_stored_tensor_is_one_parameter():
    """The norm before a branch has one name, so a layer of two branches would want it twice."""
    layers = (Layer(Attention(4, 2, 8), plain(40)),)
    config = ModelConfig(97, 32, layers)
    with pytest.raises(CheckpointError, match=r"several parameters of one layer.*\n.*layers\.0\.norm\.weight"):
        expand(NEMOTRON_H_NAMES, dict(Decoder(config).named_parameters()), config)
