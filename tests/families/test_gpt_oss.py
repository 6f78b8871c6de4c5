"""gpt-oss: published configs, 4-bit experts as they are published, arrangements of stacked experts, and what is
refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from checkpoints.names.expert_ops import GateUp, Interleaved, Turned
from nanollm.config import Attention, ClippedGLU, Layer, ModelConfig, MoE, Norm, Rope, Yarn
from nanollm.errors import CheckpointError, ConfigError
from nanollm.model import Decoder
from tests.arranged import fill, stored_tensors
from tests.fixtures import FIXTURES
from tests.oracles import write

OSS = dict(
    model_type="gpt_oss", attention_bias=True, attention_dropout=0.0, eos_token_id=200002, experts_per_token=4,
    head_dim=64, hidden_act="silu", hidden_size=2880, initial_context_length=4096, intermediate_size=2880,
    layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072, num_attention_heads=64,
    num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=8, num_local_experts=32,
    output_router_logits=False, pad_token_id=199999, rms_norm_eps=1e-5,
    rope_scaling=dict(
        beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096, rope_type="yarn",
        truncate=False,
    ),
    rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
    use_cache=True, vocab_size=201088,
)


def read(**keys) -> ModelConfig:
    return read_config(OSS | keys)[1]


def test_published_sizes():
    norm, rope = Norm(eps=1e-5, cast_after_gain=True), Rope(150_000.0, scaling=Yarn(32.0, 4096, truncate=False))
    moe = MoE(32, 4, ClippedGLU(2880, 1.702, 7.0), True, router_bias=True, round_weights=True)
    pair = [
        Layer(Attention(64, 8, 64, rope, window, qkv_bias=True, out_bias=True, sinks=True), moe, norm, pre_ffn=norm)
        for window in (128, None)
    ]
    assert read() == ModelConfig(201088, 2880, (*pair,) * 12, norm, context=131072)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read()).parameters()) == 20_914_757_184
        large = read(num_hidden_layers=36, num_local_experts=128, layer_types=None)
        assert sum(p.numel() for p in Decoder(large).parameters()) == 116_829_156_672


def test_missing_keys():
    """YaRN is the default of the family, and every other layer slides, the first one included."""
    said = {
        key: OSS[key]
        for key in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers", "num_local_experts", "rms_norm_eps")
    }
    assert read_config(said)[1] == read()
    assert read_config(said | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})[1].layers[
        0
    ].mixer.rope == Rope(1e4)


def test_what_is_written_reads_back():
    for config in (
        read(),
        read(
            tie_word_embeddings=True, swiglu_limit=5.0, swiglu_alpha=1.5, attention_bias=False,
            layer_types=["full_attention"] * 24,
        ),
    ):
        values = write_config(config, FAMILIES["gpt_oss"])[1]
        assert values["model_type"] == "gpt_oss" and read_config(values)[1] == config


REFUSED = {
    "another number a token": (dict(experts_per_token=2), "experts_per_token is 2; expected 4"),
    "another gate": (dict(hidden_act="gelu"), "hidden_act is 'gelu'; expected 'silu'"),
    "an unknown type": (dict(layer_types=["chunked_attention"] * 24), "layer_types"),
    "no limit": (dict(swiglu_limit=0.0), "swiglu_limit is 0.0; expected a finite number above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(**keys)


# ---- stacked experts

@pytest.mark.parametrize(
    "op, shapes, stored",
    [
        (GateUp, [(3, 5, 4), (3, 5, 4)], (3, 10, 4)), (Interleaved, [(3, 5, 4), (3, 5, 4)], (3, 4, 10)),
        (Interleaved, [(3, 5), (3, 5)], (3, 10)), (Turned, [(3, 4, 5)], (3, 5, 4)),
    ],
    ids="gate-up interleaved biases turned".split(),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_are_inverses(op, shapes, stored, dtype):
    ours = [torch.randn(shape).to(dtype) for shape in shapes]
    tensor, = stored_tensors(op, ours)
    assert (
        tensor.shape == stored
        and op.shapes([each.to("meta") for each in ours], None) == [stored]
        and tensor.dtype == dtype
    )
    again = [torch.full_like(each, torch.nan) for each in ours]
    fill(op, [tensor], again)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_gate_and_up_columns_take_turns():
    gate, up = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert stored_tensors(Interleaved, [gate, up])[0][0, 0].tolist() == [0, 1, 0, 1]
    assert stored_tensors(Interleaved, [gate[..., 0], up[..., 0]])[0][0].tolist() == [0, 1, 0, 1]


# ---- 4 bits

def quantised(folder, seed: int = 0) -> dict[str, torch.Tensor]:
    """Give the folder random 4-bit experts, as the hub has them. Returns what transformers makes of them."""
    draw, path = torch.Generator().manual_seed(seed), folder / "model.safetensors"
    tensors, meant = load_file(path), {}
    for name in [
        each for each in tensors if each.endswith("experts.down_proj") or each.endswith("experts.gate_up_proj")
    ]:
        E, K, R = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (E, R, K // 32, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(120, 126, (E, R, K // 32), dtype=torch.uint8, generator=draw)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.fixture
def folder(tmp_path):
    fixture = FIXTURES["gpt-oss-20b"]
    write(
        type(fixture)(**{**vars(fixture), "keys": fixture.keys | {"intermediate_size": 32}}), tmp_path / "in",
        torch.bfloat16,
    )
    return tmp_path / "in"


def test_four_bits_are_read_as_transformers_reads_them(folder, tmp_path):
    meant = quantised(folder)
    model = checkpoints.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and len(meant) == 6
    for i, layer in enumerate(model.layers):
        both, down = (meant[f"model.layers.{i}.mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
        experts = layer.ffn.experts
        assert (
            torch.equal(experts.gate, both[..., 0::2].mT)
            and torch.equal(experts.up, both[..., 1::2].mT)
            and torch.equal(experts.down, down.mT)
        )
        assert both.float().abs().max() > 0.3 and len(both.unique()) > 30
    exact = checkpoints.load(folder, dtype=torch.float32)  # 4 bits and a power of two: bfloat16 holds them all
    assert torch.equal(exact.layers[0].ffn.experts.down, model.layers[0].ffn.experts.down.float())
    checkpoints.save(model, tmp_path / "out")
    values, tensors = (
        json.loads((tmp_path / "out/config.json").read_text()), load_file(tmp_path / "out/model.safetensors"),
    )
    assert "quantization_config" not in values and values["torch_dtype"] == "bfloat16"
    assert all(torch.equal(tensors[name], value) for name, value in meant.items()) and not [
        name for name in tensors if name.endswith("_blocks")
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(checkpoints.load(tmp_path / "out").parameters(), model.parameters(), strict=True)
    )


def test_four_bits_that_do_not_fit(folder):
    quantised(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    for change, words in (
        (tensors[f"{name}_scales"][:, :-1], r"down_proj_blocks is .* expected \(E, R, G, 16\) with bytes"),
        (None, "(?s)missing.*down_proj.*unexpected.*down_proj_blocks"),
        (torch.full_like(tensors[f"{name}_scales"], 255), "down_proj holds a NaN or an infinity"),
    ):
        changed = {key: value for key, value in tensors.items() if key != f"{name}_scales"} | (
            {} if change is None else {f"{name}_scales": change.contiguous()}
        )
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            checkpoints.load(folder)
