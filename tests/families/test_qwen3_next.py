"""Qwen3-Next and Qwen3.5: published configs, which layer is what, fused matrices, the layers behind the last."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from checkpoints.families.qwen3_next import QKVZ, ByHead, key_heads, query_heads
from nanollm.config import (
    MLP,
    Attention,
    GatedAttention,
    GatedDeltaNet,
    Layer,
    Linear,
    ModelConfig,
    MoE,
    Norm,
    Rope,
    Yarn,
)
from nanollm.errors import ConfigError
from nanollm.model import Decoder
from nanollm.training.growing import stretched
from tests.fixtures import FIXTURES
from tests.oracles import write
from tests.test_roundtrip import all_tensors, same_tensors

A3B = dict(
    model_type="qwen3_next", architectures=["Qwen3NextForCausalLM"], attention_bias=False, decoder_sparse_step=1,
    full_attention_interval=4, head_dim=256, hidden_act="silu", hidden_size=2048, intermediate_size=5120,
    linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
    linear_value_head_dim=128, max_position_embeddings=262144, mlp_only_layers=[], moe_intermediate_size=512,
    norm_topk_prob=True, num_attention_heads=16, num_experts=512, num_experts_per_tok=10, num_hidden_layers=48,
    num_key_value_heads=2, output_router_logits=False, partial_rotary_factor=0.25, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=1e7, router_aux_loss_coef=0.001, shared_expert_intermediate_size=512,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False, vocab_size=151936,
)
TEXT_27B = dict(
    model_type="qwen3_5_text", attention_bias=False, attn_output_gate=True, dtype="bfloat16", eos_token_id=248044,
    full_attention_interval=4, head_dim=256, hidden_act="silu", hidden_size=5120, intermediate_size=17408,
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 16, linear_conv_kernel_dim=4, linear_key_head_dim=128,
    linear_num_key_heads=16, linear_num_value_heads=48, linear_value_head_dim=128, max_position_embeddings=262144,
    mlp_only_layers=[], mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, num_attention_heads=24,
    num_hidden_layers=64, num_key_value_heads=4, rms_norm_eps=1e-6, use_cache=True, vocab_size=248320,
    mamba_ssm_dtype="float32", rope_parameters=dict(
        mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="default", rope_theta=10000000,
        partial_rotary_factor=0.25,
    ),
)
WHOLE_27B = dict(
    model_type="qwen3_5", architectures=["Qwen3_5ForConditionalGeneration"], image_token_id=248056,
    text_config=TEXT_27B, tie_word_embeddings=False, video_token_id=248057,
    vision_config={"model_type": "qwen3_5", "depth": 27}, vision_end_token_id=248054, vision_start_token_id=248053,
)
NORM = Norm(offset=1.0, cast_after_gain=True)


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def attention(heads: int, kv_heads: int, rope: Rope) -> GatedAttention:
    return GatedAttention(Attention(heads, kv_heads, 256, rope, qk_norm=NORM))


def test_published_sizes():
    moe = MoE(512, 10, MLP(512), True, MLP(512), shared_gate=True, round_weights=True)
    delta = Layer(GatedDeltaNet(32, 16, 128, 128, 4), moe, NORM, pre_ffn=NORM)
    whole = Layer(attention(16, 2, Rope(1e7, fraction=0.25)), moe, NORM, pre_ffn=NORM)
    assert read(A3B) == ModelConfig(151936, 2048, (delta, delta, delta, whole) * 12, NORM, context=262144)
    written = write_config(read(A3B), FAMILIES["qwen3_next"])[1]
    assert {key: written[key] for key in A3B.keys() & written.keys() if "dtype" not in key}.items() <= A3B.items()
    delta = Layer(GatedDeltaNet(48, 16, 128, 128, 4), MLP(17408), NORM, pre_ffn=NORM)
    whole = Layer(attention(24, 4, Rope(1e7, fraction=0.25)), MLP(17408), NORM, pre_ffn=NORM)
    assert read(WHOLE_27B) == read(TEXT_27B) == ModelConfig(
        248320, 5120, (delta, delta, delta, whole) * 16, NORM, context=262144)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read(A3B)).parameters()) == 79_674_391_296
        assert sum(p.numel() for p in Decoder(read(WHOLE_27B)).parameters()) == 26_895_998_464


def test_a_model_made_here_is_written_as_qwen3_5():
    delta, whole = GatedDeltaNet(4, 2, 16, 8, 3), GatedAttention(Attention(4, 2, 16, Rope(fraction=0.5), qk_norm=NORM))
    layers = tuple(Layer(mixer, MLP(48), NORM, pre_ffn=NORM) for mixer in (whole, delta, delta))
    config = ModelConfig(50, 32, layers, NORM, context=64)
    family, values = write_config(config)
    assert family is FAMILIES["qwen3_5_text"] and read_config(values)[1] == config
    longer = stretched(config, "linear", 2.0)
    assert longer.layers[0].mixer.rope.scaling == Linear(2.0) and longer.layers[1:] == layers[1:]


def test_which_layer_is_what():
    def kinds(**keys):
        return "".join("A" if isinstance(layer.mixer, GatedAttention) else "-"
                       for layer in read(A3B, num_hidden_layers=6, **keys).layers)
    assert kinds() == "---A--" and kinds(full_attention_interval=3) == "--A--A"
    assert kinds(layer_types=["full_attention"] * 2 + ["linear_attention"] * 4) == "AA----"
    assert read(A3B, mlp_only_layers=[0]).layers[0].ffn == MLP(5120)


def test_a_stretch_is_one_of_text():
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=262144)
    mixer = read(TEXT_27B, rope_parameters=TEXT_27B["rope_parameters"] | yarn).layers[3].mixer
    assert mixer.rope == Rope(1e7, fraction=0.25, scaling=Yarn(4.0, 262144))


REFUSED = {
    "another activation": (A3B | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    "another kind of layer": (A3B | {"layer_types": ["sliding_attention"] * 48}, "expected 48 times linear_att"),
    "too few kinds": (A3B | {"layer_types": ["full_attention"]}, "expected 48 times"),
    "values that share no key": (A3B | {"linear_num_key_heads": 5}, "key_heads = 5: expected a divisor of heads"),
    "sliding": (A3B | {"use_sliding_window": True}, "use_sliding_window is True"),
    "no gate": (TEXT_27B | {"attn_output_gate": False}, "attn_output_gate is False"),
    "no text": (WHOLE_27B | {"text_config": None}, "text_config is None; expected an object"),
    "another text model": (
        WHOLE_27B | {"text_config": TEXT_27B | {"model_type": "qwen3_5_moe_text"}},
        "text_config.model_type is 'qwen3_5_moe_text'",
    ),
    "an unknown key inside": (WHOLE_27B | {"text_config": TEXT_27B | {"new_trick": 3}}, "text_config.new_trick = 3"),
    "tied here and not there": (
        WHOLE_27B | {"text_config": TEXT_27B | {"tie_word_embeddings": True}},
        "tie_word_embeddings is False; expected True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    values, cause = REFUSED[case]
    with pytest.raises(ConfigError, match=cause):
        read_config(values)


def test_the_rows_of_the_head_of_the_file():
    """Two key heads of one channel, four value heads of one channel; two query heads of one channel."""
    delta = Layer(GatedDeltaNet(4, 2, 1, 1, 4), None, pre_ffn=None)
    qkv, z = torch.tensor([0, 1, 10, 11, 20, 21, 22, 23]), torch.tensor([30, 31, 32, 33])
    rows = [rows.tolist() for _, rows in QKVZ(key_heads).pieces([qkv, z], delta)]
    assert sum(rows, []) == [0, 10, 20, 21, 30, 31, 1, 11, 22, 23, 32, 33]
    beta, alpha = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11, 12, 13])
    rows = [rows.tolist() for _, rows in ByHead(key_heads).pieces([beta, alpha], delta)]
    assert rows == [[0, 1], [10, 11], [2, 3], [12, 13]]
    gated = Layer(GatedAttention(Attention(2, 1, 1)), None, pre_ffn=None)
    rows = [rows.tolist() for _, rows in ByHead(query_heads).pieces([beta[:2], alpha[:2]], gated)]
    assert rows == [[0], [10], [1], [11]]


def test_the_layers_behind_the_last_are_left_out(tmp_path):
    write(FIXTURES["qwen3-next-mixed"], tmp_path)
    plain = checkpoints.load(tmp_path)
    path = tmp_path / "model.safetensors"
    ahead = {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.mlp.gate.weight": torch.ones(6, 64)}
    save_file(load_file(path) | ahead, path, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"left out: mtp\.… \(2 tensors, 34,304 bytes\)$"):
        again = checkpoints.load(tmp_path)
    assert again.config == plain.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


def test_experts_in_one_tensor(tmp_path):
    """As the hub has Qwen3.5's: gate above up, all experts of a layer together; it is written back so."""
    write(FIXTURES["qwen3.5-35b-a3b"], tmp_path)
    each, path = checkpoints.load(tmp_path), tmp_path / "model.safetensors"
    stored = load_file(path)
    for i in range(5):
        at = f"model.layers.{i}.mlp.experts"
        def taken(part, at=at):
            return torch.stack([stored.pop(f"{at}.{e}.{part}_proj.weight") for e in range(6)])
        stored[f"{at}.gate_up_proj"] = torch.cat([taken("gate"), taken("up")], 1)
        stored[f"{at}.down_proj"] = taken("down")
    save_file(stored, path, {"format": "pt"})
    fused = checkpoints.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(each.parameters(), fused.parameters(), strict=True))
    checkpoints.save(fused, tmp_path / "out")
    assert same_tensors(all_tensors(tmp_path / "out"), stored)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen3_5_moe_text"
