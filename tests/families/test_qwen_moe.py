"""Qwen's mixtures of experts: published configs, which layers have experts and windows, the fused layout, and what is
refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, ModelConfig, MoE, Norm, Rope
from nanollm.errors import CheckpointError, ConfigError
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import write
from tests.test_roundtrip import all_tensors, same_tensors

A2_7B = dict(
    model_type="qwen2_moe", hidden_act="silu", hidden_size=2048, intermediate_size=5632, max_position_embeddings=8192,
    max_window_layers=21, num_attention_heads=16, num_hidden_layers=24, num_key_value_heads=16, rms_norm_eps=1e-6,
    rope_theta=1e6, sliding_window=32768, use_sliding_window=False, tie_word_embeddings=False, vocab_size=151936,
    decoder_sparse_step=1, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts_per_tok=4,
    num_experts=60, norm_topk_prob=False, output_router_logits=False, router_aux_loss_coef=0.001,
)
A3B = dict(
    model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1, head_dim=128, hidden_act="silu",
    hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[],
    moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1e6,
    sliding_window=None, use_sliding_window=False, tie_word_embeddings=False, vocab_size=151936,
)
NORM = Norm()


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_published_sizes():
    moe = MoE(60, 4, MLP(1408), False, MLP(5632), shared_gate=True, round_weights=True)
    layer = Layer(Attention(16, 16, 128, Rope(1e6), qkv_bias=True), moe, NORM, pre_ffn=NORM)
    assert read(A2_7B) == ModelConfig(151936, 2048, (layer,) * 24, NORM, context=8192)
    moe = MoE(128, 8, MLP(768), True, round_weights=True)
    layer = Layer(Attention(32, 4, 128, Rope(1e6), qk_norm=NORM), moe, NORM, pre_ffn=NORM)
    assert read(A3B) == ModelConfig(151936, 2048, (layer,) * 48, NORM, context=40960)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read(A2_7B)).parameters()) == 14_315_784_192
        assert sum(p.numel() for p in Decoder(read(A3B)).parameters()) == 30_532_122_624


def test_which_layers_have_experts():
    def kinds(base, **keys):
        return "".join(
            "M" if isinstance(layer.ffn, MoE) else "-" for layer in read(base, num_hidden_layers=6, **keys).layers
        )
    assert kinds(A2_7B) == kinds(A3B) == "MMMMMM" and kinds(A2_7B, mlp_only_layers=None) == "MMMMMM"
    assert (
        kinds(A2_7B, decoder_sparse_step=2) == "-M-M-M"
        and kinds(A3B, decoder_sparse_step=3, mlp_only_layers=[5]) == "--M---"
    )
    assert read(A3B, mlp_only_layers=[0]).layers[0].ffn == MLP(6144)


def test_which_layers_slide():
    def windows(base, **keys):
        return [layer.mixer.window for layer in read(base, num_hidden_layers=4, **keys).layers]
    assert windows(A2_7B) == windows(A2_7B, sliding_window=0) == windows(A3B) == [None] * 4
    assert windows(A2_7B, use_sliding_window=True, sliding_window=9, max_window_layers=1) == [9, None, None, None]
    assert windows(A2_7B, use_sliding_window=True, sliding_window=9) == [9, None, 9, None]
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert windows(A2_7B, use_sliding_window=True, sliding_window=9, layer_types=types) == [None, 9, 9, None]
    assert windows(A3B, use_sliding_window=True, sliding_window=9) == [9] * 4


def test_both_names_of_the_number_of_experts():
    renamed = {key: value for key, value in A3B.items() if key != "num_experts"} | {"num_local_experts": 128}
    assert read(renamed) == read(A3B) == read(A3B, num_local_experts=128)


def test_what_is_written_reads_back():
    for config in (
        read(A2_7B), read(A2_7B, num_hidden_layers=4, use_sliding_window=True, sliding_window=9, mlp_only_layers=[1]),
        read(A3B, num_hidden_layers=5, decoder_sparse_step=2, attention_bias=True),
        read(A3B, use_sliding_window=True, sliding_window=7),
    ):
        family = FAMILIES["qwen2_moe" if config.layers[-1].mixer.qk_norm is None else "qwen3_moe"]
        values = write_config(config, family)[1]
        assert values["model_type"] == family.name and read_config(values)[1] == config


REFUSED = {
    "types without a window": (
        A2_7B, dict(layer_types=["sliding_attention"] * 24), "layer_types .* expected 24 times full_attention$",
    ),
    "too few types": (A2_7B, dict(layer_types=["full_attention"]), "layer_types"),
    "an unknown layer": (
        A3B, dict(mlp_only_layers=[48]), "mlp_only_layers is \\[48\\]; expected a list of layers from 0 to 47",
    ),
    "no list": (A3B, dict(mlp_only_layers="all"), "mlp_only_layers"),
    "two numbers of experts": (A3B, dict(num_local_experts=64), "num_local_experts is 64; expected 128"),
    "more chosen than there are": (A2_7B, dict(num_experts_per_tok=61), "MoE.top_k = 61"),
    "no window": (A2_7B, dict(use_sliding_window=True, sliding_window=0), "sliding_window is 0"),
    "first layers": (A2_7B, dict(max_window_layers=-1), "max_window_layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    base, keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(base, **keys)


def test_a_model_without_a_shared_expert_is_no_qwen2():
    config = read(A2_7B)
    moe = dataclasses.replace(config.layers[0].ffn, shared=None, shared_gate=False)
    config = dataclasses.replace(config, layers=(dataclasses.replace(config.layers[0], ffn=moe),))
    with pytest.raises(ConfigError, match="qwen2_moe: .*ffn.shared is None, and would be read as MLP"):
        write_config(config, FAMILIES["qwen2_moe"])


@pytest.mark.parametrize("name", ["qwen2-moe-sliding", "qwen3-moe"])
def test_all_experts_of_a_layer_in_one_tensor(name, tmp_path):
    """As transformers 5 holds them: gate rows above up rows."""
    write(FIXTURES[name], tmp_path / "in")
    wanted, tensors = checkpoints.load(tmp_path / "in"), load_file(tmp_path / "in/model.safetensors")
    for prefix in sorted({each.partition(".experts.")[0] for each in tensors if ".experts." in each}):
        def take(e, part, prefix=prefix):
            return tensors.pop(f"{prefix}.experts.{e}.{part}_proj.weight")
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([take(e, "gate"), take(e, "up")]) for e in range(6)]
        )
        tensors[f"{prefix}.experts.down_proj"] = torch.stack([take(e, "down") for e in range(6)])
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    model = checkpoints.load(tmp_path / "in")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    checkpoints.save(model, tmp_path / "out")
    assert same_tensors(all_tensors(tmp_path / "out"), tensors)
    del tensors[next(each for each in tensors if each.endswith("gate_up_proj"))]
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing:\n.*gate_up_proj"):
        checkpoints.load(tmp_path / "in")
