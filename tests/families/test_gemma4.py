"""Gemma 4's config.json: the published shapes in both dialects, what missing keys mean, what is refused; stored tensors
that are not used; gradients through keys that several layers read. Logits: tests/fixtures/gemma4.py."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import (
    MLP,
    CrossLayerAttention,
    LayerEnd,
    Norm,
    NormedMoE,
    NormedValueAttention,
    PerLayerInput,
    Proportional,
    Rope,
)
from nanollm.errors import ConfigError
from nanollm.training import distributed
from tests.fixtures import FIXTURES
from tests.oracles import tokens, write

SLIDING, FULL = "sliding_attention", "full_attention"
NORM = Norm(cast_after_gain=True)
WHOLE = Rope(1e6, scaling=Proportional(0.25))
COMMON = dict(model_type="gemma4_text", vocab_size=262144, num_attention_heads=8, final_logit_softcapping=30.0)
E2B = COMMON | dict(
    hidden_size=1536, intermediate_size=6144, num_hidden_layers=35, layer_types=([SLIDING] * 4 + [FULL]) * 7,
    num_key_value_heads=1, num_kv_shared_layers=20, use_double_wide_mlp=True, num_global_key_value_heads=None)
EXPERTS = COMMON | dict(
    hidden_size=2816, intermediate_size=2112, num_hidden_layers=30, num_attention_heads=16, num_key_value_heads=8,
    attention_k_eq_v=True, num_global_key_value_heads=2, hidden_size_per_layer_input=0, sliding_window=1024,
    enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704,
    use_bidirectional_attention="vision", max_position_embeddings=262144)
DENSE = {key: value for key, value in EXPERTS.items() if "experts" not in key} | {"enable_moe_block": False}


def read(values, **keys):
    return read_config(values | keys)[1]


def test_e2b():
    config = read(E2B)
    own, borrowed = config.layers[:15], config.layers[15:]
    assert own[0].mixer == NormedValueAttention(8, 1, 256, Rope(), 512, NORM, scale=1.0)
    assert own[14].mixer == NormedValueAttention(8, 1, 512, WHOLE, None, NORM, scale=1.0, kept=True)
    assert [i for i, layer in enumerate(own) if layer.mixer.kept] == [13, 14]
    assert borrowed[0].mixer == CrossLayerAttention(8, 1, 256, Rope(), 512, NORM, scale=1.0)
    assert borrowed[-1].mixer == CrossLayerAttention(8, 1, 512, WHOLE, None, NORM, scale=1.0)
    assert {layer.ffn for layer in own} == {MLP(6144, "gelu_tanh")} and borrowed[0].ffn.hidden == 12288
    assert {layer.end for layer in config.layers} == {LayerEnd(PerLayerInput(256, NORM), NORM)}
    assert (config.context, config.tied, config.embed_scale) == (131072, True, 1536**0.5)
    each = {str(i): {"head_dim": 512} for i in range(4, 35, 5)}
    assert config == read(E2B, per_layer_config=each, global_head_dim=512)      # as transformers writes it since 5.23


def test_26b_a4b():
    first, sixth = (read(EXPERTS).layers[i] for i in (0, 5))
    one = MLP(704, "gelu_tanh")
    assert first.ffn == sixth.ffn == NormedMoE(128, 8, one, True, MLP(2112, "gelu_tanh"), norm=NORM)
    assert first.pre_ffn is None and first.end == LayerEnd() and first.post_ffn == NORM
    assert first.mixer == NormedValueAttention(16, 8, 256, Rope(), 1024, NORM, scale=1.0)
    assert sixth.mixer == NormedValueAttention(16, 2, 512, WHOLE, None, NORM, scale=1.0, values_are_keys=True)
    assert read(DENSE).layers[0].ffn == MLP(2112, "gelu_tanh") and read(DENSE).layers[0].pre_ffn == NORM


@pytest.mark.parametrize("values", [
    E2B, EXPERTS, DENSE, E2B | {"use_double_wide_mlp": False}, DENSE | {"attention_k_eq_v": False},
    DENSE | {"layer_types": [FULL] * 30}, DENSE | {"num_hidden_layers": 8}, DENSE | {"global_head_dim": 256},
])
def test_what_is_written_reads_back(values):
    written = write_config(read(values), FAMILIES["gemma4_text"])[1]
    assert read_config(written)[1] == read(values)


@pytest.mark.parametrize("values, cause", [
    (E2B | {"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input is 1000; expected vocab_size"),
    (E2B | {"num_kv_shared_layers": 32}, "num_kv_shared_layers is 32; expected a full_attention layer before"),
    (E2B | {"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1"),
    (E2B | {"layer_types": [FULL] * 34 + [SLIDING]}, "layer_types is .* expected full_attention in the last layer"),
    (DENSE | {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
    (DENSE | {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    (DENSE | {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar = 256"),
    (DENSE | {"enable_moe_block": True}, "NormedMoE.experts = None"),
    (DENSE | {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e6}}}, "an object for sliding"),
    (DENSE | {"per_layer_config": {str(i): {"head_dim": 8 * i} for i in range(5, 30, 6)}}, "the same for all layers"),
    (DENSE | {"per_layer_config": {"5": {"sliding_window": 8}}}, "per_layer_config.5.sliding_window = 8"),
    (DENSE | {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config.0.head_dim = 8"),
    (DENSE | {"per_layer_config": {str(i): {"head_dim": 64} for i in range(5, 30, 6)}, "global_head_dim": 512},
     "global_head_dim is 512"),
    (DENSE | {"rope_parameters": {kind: {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}
                                  for kind in (SLIDING, FULL)}}, "proportional|factor = 2.0"),
])
def test_refused(values, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(values)


@pytest.fixture(scope="module")
def e2b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2b")
    write(FIXTURES["gemma4-e2b"], folder)
    return folder, checkpoints.load(folder)


def test_keys_that_borrowing_layers_have_on_disk_are_not_used(e2b, tmp_path):
    """As the published files have them; transformers drops them too."""
    folder, model = e2b
    stored = load_file(folder / "model.safetensors")
    for name in ("k_proj", "v_proj", "k_norm"):
        stored[f"model.layers.5.self_attn.{name}.weight"] = stored[f"model.layers.0.self_attn.{name}.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    x = tokens(FIXTURES["gemma4-e2b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(checkpoints.load(tmp_path)(x), model(x))
    stored.pop("model.layers.0.self_attn.k_proj.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match="layers.0.self_attn.k_proj"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_gradients_are_the_same_with_activation_checkpointing(e2b, how):
    """Also where layers read what another, which runs again, has kept."""
    x, found = tokens(FIXTURES["gemma4-e2b"]), []
    for one in ("none", how):
        model = copy.deepcopy(e2b[1]).requires_grad_(True)
        for layer in model.layers:
            layer.forward = distributed.recomputed(layer.forward, one)
        model(x).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert all(grad.abs().max() > 0 for grad in found[0].values())
