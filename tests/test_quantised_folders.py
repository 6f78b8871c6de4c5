"""Folders that other programs packed (tests/quantised): what is read is what the programs themselves unpack.

What packages that are installed write is in test_quantised_packages.py.
"""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints import convert
from checkpoints.inspect import describe, look
from checkpoints.source import open_source
from checkpoints.storage import stream
from checkpoints.storage.files import read_folder
from checkpoints.storage.quantized import plain_config, plain_tensors
from checkpoints.storage.quantized.parts import unpacked
from nanollm.errors import CheckpointError, ConfigError
from nanollm.inference.quantize import QuantizedLinear
from nanollm.training.plan import Live
from tests.oracles import difference
from tests.quantised import HERE
from tests.test_compressed import MADE, compressed
from tests.test_quantized_load import same_state

CASES = sorted(path.name for path in HERE.iterdir() if path.is_dir() and (path / "config.json").exists())
KEPT = {"gptq": 7, "auto-round": 7, "awq": 7, "gptq-v2-dynamic": 4}                   # Linears that stay in 4 bits
quiet = pytest.mark.filterwarnings("ignore:.*passed over:UserWarning", "ignore:.*not kept so:UserWarning")


# ---- committed folders

@quiet
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_weights_that_the_program_unpacks(name):
    oracle = load_file(HERE / f"oracles/{name}.safetensors")
    plain, kept = open_source(HERE / name).fill(torch.float32), checkpoints.load(HERE / name, dtype=torch.float32)
    for model in (plain, kept):
        assert difference(model(oracle["tokens"]), oracle["logits"]) < 1e-6
    with torch.inference_mode():                                           # through the packed kernels of a CPU
        assert difference(kept(oracle["tokens"]), oracle["logits"]) < 1e-4
    packed = [module for module in kept.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == KEPT.get(name, 0) and all(module.zero is not None for module in packed)


@quiet
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_a_plain_folder(name, tmp_path):
    """By save where nothing is kept packed, and by convert, in bfloat16; other than by convert nothing is dropped."""
    convert.convert(convert.plan(open_source(HERE / name), "hf", torch.bfloat16), tmp_path / "out", verify=True)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert not values.keys() & {"quantization_config", "quantization"} and values["dtype"] == "bfloat16"
    found, oracle = checkpoints.load(tmp_path / "out"), load_file(HERE / f"oracles/{name}.safetensors")
    assert {one.dtype for one in found.parameters()} == {torch.bfloat16}
    assert difference(found.float()(oracle["tokens"]), oracle["logits"]) < 0.05
    if name not in KEPT:
        model = checkpoints.load(HERE / name, dtype=torch.bfloat16)
        checkpoints.save(model, tmp_path / "saved")
        again = load_file(tmp_path / "saved/model.safetensors")
        assert all(torch.equal(one, again[key]) for key, one in load_file(tmp_path / "out/model.safetensors").items())
        assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


@pytest.mark.parametrize("name, said", [
    ("gptq", "quantised by GPTQ: 4 bits in groups of 32, with zero points; load() keeps whole numbers so"),
    ("awq", "quantised by AWQ: 4 bits in groups of 32, with zero points; load() keeps whole numbers so"),
    ("modelopt-nvfp4", "quantised by ModelOpt: NVFP4; load() reads them as what they stand for"),
    ("mlx", "quantised by MLX: 4 bits in groups of 32; load() reads"),
])
def test_inspect_says_what_it_is(name, said):
    report = look(HERE / name)
    assert report.reason is None and said in describe(report)
    assert report.parameters == 35_008


def test_what_is_passed_over_is_said_once():
    with pytest.warns(UserWarning, match="they are zeros and the model has none there: 7 vectors of biases"):
        checkpoints.load(HERE / "gptq")
    with pytest.warns(UserWarning, match="7 scales of activations or of the cache .*only weights are in fewer bits"):
        checkpoints.load(HERE / "modelopt-fp8")


@quiet
def test_biases_that_are_no_zeros_are_not_passed_over(tmp_path):
    shutil.copytree(HERE / "gptq", tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "in/model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)1 unexpected.*mlp\.up_proj\.bias"):
        checkpoints.load(tmp_path / "in")


@quiet
@pytest.mark.parametrize("name, file, said", [
    ("modelopt-fp8", "hf_quant_config.json", {"producer": {"name": "modelopt", "version": "0.19.0"}, "quantization": {
        "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}),
    ("gptq-act-order", "quantize_config.json", {
        "bits": 4, "group_size": 32, "desc_act": True, "sym": False, "true_sequential": True, "damp_percent": 0.01,
        "static_groups": False, "model_name_or_path": None, "model_file_base_name": "model"}),
    ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
])
def test_a_file_beside_config_json_may_say_it(name, file, said, tmp_path):
    shutil.copytree(HERE / name, tmp_path / "in")
    values = json.loads((tmp_path / "in/config.json").read_text())
    del values["quantization_config"]
    (tmp_path / "in/config.json").write_text(json.dumps(values))
    with pytest.raises((CheckpointError, ConfigError)):
        checkpoints.load(tmp_path / "in")
    (tmp_path / "in" / file).write_text(json.dumps(said))
    oracle = load_file(HERE / f"oracles/{name}.safetensors")
    assert difference(checkpoints.load(tmp_path / "in", dtype=torch.float32)(oracle["tokens"]), oracle["logits"]) < 1e-6
    checkpoints.config(tmp_path / "in")


# ---- GPTQ of what has other shapes

@pytest.mark.parametrize("name", ["phi3", "mixtral", "qwen2-moe"])
def test_fused_matrices_and_experts_stay_packed(name, tmp_path):
    """The numbers of a folder that we quantised, in GPTQ's arrangement: the same modules, bit by bit."""
    transformers.AutoModelForCausalLM.from_config(MADE[name]()).save_pretrained(tmp_path / "in")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # which experts transformers reads
        compressed(tmp_path / "in", tmp_path / "ours", "int4", 32)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    tensors = load_file(tmp_path / "ours/model.safetensors")
    for key in [key for key in tensors if key.endswith("_packed")]:
        module = key.removesuffix(".weight_packed")
        words, scales, zeros, shape = (tensors.pop(f"{module}.weight_{end}") for end in (
            "packed", "scale", "zero_point", "shape"))
        z = unpacked(zeros.T.contiguous(), 4)[:, : shape[0]]                                       # (G, N)
        tensors |= {f"{module}.qweight": words.T.contiguous(), f"{module}.scales": scales.T.contiguous(),
                    f"{module}.qzeros": (z.unflatten(1, (-1, 8)) << 4 * torch.arange(8)).sum(-1).to(torch.int32)}
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    values = json.loads((tmp_path / "theirs/config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32,
                                     "checkpoint_format": "gptq_v2"}
    (tmp_path / "theirs/config.json").write_text(json.dumps(values))
    assert same_state(checkpoints.load(tmp_path / "theirs"), checkpoints.load(tmp_path / "ours"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_0_has_taken_its_1_from_the_word(bits, tmp_path):
    """GPTQModel's convert_gptq_v2_to_v1_format_module subtracts 1 … 1 from words, whatever is in them."""
    z, each = torch.randint(0, 1 << bits, (2, 32)), 32 // bits
    z[:, ::3] = 0
    words = (z.unflatten(1, (-1, each)) << bits * torch.arange(each)).sum(-1) - sum(1 << bits * i for i in range(each))
    save_file({"a.qweight": torch.zeros(2 * bits, 32, dtype=torch.int32), "a.scales": torch.ones(2, 32),
               "a.qzeros": words.to(torch.int32)}, tmp_path / "model.safetensors")
    how = plain_config({"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": 32}})[1]
    ours = torch.empty(32, 64)
    stream.read(plain_tensors(read_folder(tmp_path), how)["a.weight"], 0, ours, "a.weight")
    assert torch.equal(ours, -z.T.repeat_interleave(32, 1).float())


def test_the_last_group_of_a_row_may_be_short(tmp_path):
    """96 inputs in groups of 64."""
    scales = torch.rand(2, 32)
    save_file({"a.qweight": torch.full((12, 32), 0x33333333, dtype=torch.int32), "a.scales": scales,
               "a.qzeros": torch.zeros(2, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    how = plain_config({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}})[1]
    one, ours = plain_tensors(read_folder(tmp_path), how)["a.weight"], torch.empty(32, 96)
    stream.read(one, 0, ours, "a.weight")
    assert not one.in_order and torch.equal(ours, 2 * scales.T.repeat_interleave(64, 1)[:, :96])


# ---- a run at a time, and what does not fit

@quiet
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_matrix_that_is_turned_over_never_stands_whole_in_float32(name, tmp_path):
    """Of 8192 × 1024 weights the packed numbers are held, turned, 4 MB; in float32 they would be 32."""
    N, K = 8192, 1024
    words = {"gptq": (K // 8, N), "awq": (K, N // 8)}[name]
    save_file({"a.qweight": torch.ones(words, dtype=torch.int32), "a.scales": torch.ones(K // 128, N),
               "a.qzeros": torch.zeros(K // 128, N // 8, dtype=torch.int32)}, tmp_path / "model.safetensors")
    how = plain_config({"quantization_config": {"quant_method": name, "bits": 4, "group_size": 128}})[1]
    one, ours = plain_tensors(read_folder(tmp_path), how)["a.weight"], torch.empty(N, K, dtype=torch.bfloat16)
    with Live() as live:
        stream.read(one, 0, ours, "a.weight")
    assert live.most < 20e6 and "made" not in vars(one.codes)
    assert ours[0, :8].tolist() == ([0, *[-1] * 7] if name == "gptq" else [1] * 8)


def changed(name, tmp_path, change=lambda tensors: None, **config):
    shutil.copytree(HERE / name, tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    values = json.loads((tmp_path / "in/config.json").read_text())
    change(tensors)
    key = "quantization" if name.startswith("mlx") else "quantization_config"
    values[key] = {end: one for end, one in {**values[key], **config}.items() if one is not ...}
    save_file(tensors, tmp_path / "in/model.safetensors")
    (tmp_path / "in/config.json").write_text(json.dumps(values))
    return tmp_path / "in"


@pytest.mark.parametrize("name, config, message", [
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; expected 'gptq' or 'gptq_v2'"),
    ("gptq", {"bits": 5}, "quantization_config.bits is 5; expected 2 or 3 or 4 or 8"),
    ("gptq", {"bits": ...}, "quantization_config.bits is missing"),
    ("gptq", {"group_size": 0}, "group_size is 0; expected a whole number"),
    ("gptq", {"rotation": "hadamard"}, "rotation is 'hadamard'"),
    ("gptq", {"new_trick": 1}, "nothing here knows what these mean: quantization_config.new_trick = 1"),
    ("awq", {"version": "gemv"}, "version is 'gemv'; expected 'gemm'"),
    ("awq", {"bits": 3}, "bits is 3; expected 4"),
    ("auto-round", {"packing_format": "auto_round:fake"}, "packing_format is 'auto_round:fake'; expected 'auto_"),
    ("auto-round", {"data_type": "mx_fp"}, "data_type is 'mx_fp'; expected 'int'"),
    ("modelopt-nvfp4", {"quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'; expected 'FP8' or"),
    ("modelopt-nvfp4", {"quant_algo": "MIXED_PRECISION"}, "quantized_layers is missing; expected 'FP8'"),
    ("modelopt-nvfp4", {"group_size": 32}, "group_size is 32; expected 16"),
    ("mlx", {"bits": 7}, "quantization.bits is 7; expected 2 or 3"),
    ("mlx", {"mode": "mxfp8"}, "quantization.mode is 'mxfp8'; expected 'affine' or 'mxfp4' or 'nvfp4'"),
    ("mlx-mxfp4", {"group_size": 64}, "group_size is 64; expected 32, which is mxfp4's"),
    ("mlx", {"lm_head": {"bits": 1}}, "quantization.lm_head.bits is 1"),
])
def test_a_variant_that_is_not_read_is_refused_by_its_key(name, config, message, tmp_path):
    folder = changed(name, tmp_path, **config)
    for read in (checkpoints.load, checkpoints.config):
        with pytest.raises(ConfigError, match=message) as error:
            read(folder)
        assert "Read of " in str(error.value) and "upload" in str(error.value)


UP = "model.layers.0.mlp.up_proj"


def fewer(end):
    return lambda tensors: tensors.update({f"{UP}.{end}": tensors[f"{UP}.{end}"][:-1].contiguous()})


@quiet
@pytest.mark.parametrize("name, change, message", [
    ("gptq", fewer("qweight"), r"up_proj has qweight \(7, 96\), scales \(2, 96\)"),
    ("gptq", fewer("scales"), r"up_proj has qweight \(8, 96\), scales \(1, 96\), qzeros \(2, 12\); expected"),
    ("gptq", fewer("g_idx"), r"up_proj.g_idx is torch.int32 \(63,\); expected torch.int32 of shape \(64,\)"),
    ("gptq", lambda t: t.pop(f"{UP}.qzeros"), "up_proj.qzeros is missing"),
    ("gptq", lambda t: t[f"{UP}.g_idx"].fill_(7), "an order of inputs with groups from 7 to 7; expected 0 to 1"),
    ("gptq", lambda t: t[f"{UP}.scales"].fill_(torch.inf), "up_proj.* holds a NaN or an infinity"),
    ("awq", fewer("qweight"), r"up_proj.qweight is \(63, 12\); expected \(K, N/8\), K a multiple"),
    ("awq", fewer("qzeros"), r"up_proj.qzeros is .*\(1, 12\); expected torch.int32 of shape \(2, 12\)"),
    ("modelopt-nvfp4", fewer("weight_scale"), r"weight_scale is .*\(95, 4\); expected .* of shape \(96, 4\)"),
    ("modelopt-nvfp4", lambda t: t.update({f"{UP}.pre_quant_scale": torch.ones(64)}), "(?s)unexpected.*pre_quant"),
    ("modelopt-fp8", lambda t: t.update({f"{UP}.weight_scale": torch.ones(3)}), r"expected .* of shape \(\) or \(1,\)"),
    ("mlx", fewer("biases"), r"up_proj.biases is torch.float16 \(95, 2\); expected"),
    ("mlx", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].int()}), "up_proj.weight is torch.int32"),
])
def test_parts_that_do_not_fit_are_named(name, change, message, tmp_path):
    folder = changed(name, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(folder)


def test_a_language_model_inside_another_has_its_own(tmp_path):
    inner = json.loads((HERE / "awq/config.json").read_text())
    values, how = plain_config({"model_type": "outer", "text_config": inner})
    assert how.NAME == "AWQ" and "quantization_config" not in values["text_config"] and "quantization_config" in inner


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_numbers_of_any_bits_are_a_stream(bits):
    codes = torch.randint(0, 1 << bits, (3, 64))
    stream_ = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
    words = [[one >> 32 * i & 0xFFFFFFFF for i in range(2 * bits)] for one in stream_]
    found = unpacked(torch.tensor(words).to(torch.int32), bits)
    assert torch.equal(found, codes.int())
