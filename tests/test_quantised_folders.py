"""Folders in the layouts of other programs: what is read is what the programs themselves unpack.

GPTQ, AutoRound, AWQ, ModelOpt, MLX    folders that they packed, committed: tests/quantised
bitsandbytes, compressed-tensors       written here by the packages, as they are installed
fp8                                    written here, by the formula
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
LINEARS = 7
quiet = pytest.mark.filterwarnings("ignore:.*passed over:UserWarning", "ignore:.*not kept so:UserWarning")


@pytest.fixture
def llama(tmp_path):
    """A Llama of loud weights, whose linear ones `pack` replaces: name, weight → tensors by the ends of their names."""
    def make(quantization, pack, dtype=torch.float32, **more):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=None, bos_token_id=1,
            eos_token_id=2, **more)
        model = transformers.LlamaForCausalLM(config).eval().to(dtype)
        model.save_pretrained(tmp_path / "in")
        values, stored = json.loads((tmp_path / "in/config.json").read_text()), {}
        for name, weight in load_file(tmp_path / "in/model.safetensors").items():
            if "_proj" not in name:
                stored[name] = weight
                continue
            parts, found = pack(name, weight)
            stored |= {f"{name.removesuffix('.weight')}.{end}": one.contiguous() for end, one in parts.items()}
            model.get_parameter(name).data.copy_(found)
        save_file(stored, tmp_path / "in/model.safetensors", {"format": "pt"})
        (tmp_path / "in/config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
        return tmp_path / "in", model
    return make


def agree(folder, model, bound=1e-5):
    x = torch.randint(0, 40, (2, 13))
    with torch.no_grad():
        expected = model(x).logits
        assert difference(open_source(folder).fill(torch.float32)(x), expected) < bound
        assert difference(checkpoints.load(folder, dtype=torch.float32)(x), expected) < 10 * bound


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


# ---- bitsandbytes

@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("accelerate", reason="needs accelerate, by which transformers loads with bitsandbytes")
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e .[test]")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    {"load_in_8bit": True},
], ids=["nf4-double", "fp4", "nf4-as-bfloat16", "int8"])
def test_bitsandbytes_writes_what_is_read(kind, options, tmp_path, bnb):
    """transformers quantises, saves, loads and dequantises; it turns GPT-2's matrices over. (Widths are multiples of
    64: with others bitsandbytes 0.50.2 takes the a of other blocks on a CPU, but not in its own Python, see below.)"""
    torch.manual_seed(0)
    ids, size = dict(bos_token_id=1, eos_token_id=2), dict(vocab_size=64, initializer_range=0.3)
    config = transformers.GPT2Config(n_positions=32, n_embd=64, n_layer=2, n_head=2, **ids, **size) if (
        kind == "gpt2") else transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                                      num_attention_heads=4, num_key_value_heads=2, **ids, **size)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    one = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "in", dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**options))
    one.save_pretrained(tmp_path / "q")
    found = checkpoints.load(tmp_path / "q", dtype=torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).dequantize().float()
    checkpoints.save(found, tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    for name, weight in again.named_parameters():
        if name in ours:
            weight = weight.T if kind == "gpt2" and ours[name].shape != weight.shape else weight
            assert torch.equal(ours[name], weight) or kind == "gpt2" and torch.equal(ours[name], weight.T), name
    x = torch.randint(0, 64, (2, 13))
    with torch.no_grad():
        assert difference(found(x), again(x).logits) < 1e-5
        assert difference(found(x), checkpoints.load(tmp_path / "in")(x)) > 1e-3


@pytest.mark.parametrize("shape", [(24, 48), (5, 7), (3, 64)])
def test_blocks_of_bitsandbytes_run_through_rows_of_any_width(shape, tmp_path, bnb):
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    weight = torch.randn(shape)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=False)
    save_file({"a.weight": codes, **{f"a.weight.{key}": one for key, one in state.as_dict(packed=True).items()}},
              tmp_path / "model.safetensors")
    stored = plain_tensors(read_folder(tmp_path), plain_config({"quantization_config": {"load_in_4bit": True}})[1])
    expected = _dequantize_4bit_compute(codes.view(-1), state.absmax, state.code, 64, shape, torch.float32)
    ours, part = torch.empty(shape), torch.empty(3)
    stream.read(stored["a.weight"], 0, ours, "a.weight")
    stored["a.weight"].read_run(9, part)
    assert torch.equal(ours, expected.view(shape)) and torch.equal(part, ours.flatten()[9:12])
    assert difference(ours, weight) < 0.2


# ---- compressed-tensors

def arguments(bits, kind, strategy, group=None, symmetric=True, block=None, **more):
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": symmetric,
            "block_structure": block, "dynamic": False, "actorder": None, "observer": "minmax", **more}


def by_package(name, weight, args, form):
    """What the package's compressor of this format makes of a weight, and what it makes of that again."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    compressor = BaseCompressor.get_value_from_registry(form)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    (N, K), top = weight.shape, {"int": 2 ** (args["num_bits"] - 1) - 1, "float": 448 if args["num_bits"] == 8 else 6}
    rows, columns = {"tensor": (N, K), "channel": (1, K), "block": args["block_structure"]}.get(
        args["strategy"], (1, args["group_size"]))
    whole = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
    blocks = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    scale = torch.maximum(-low, high) / top[args["type"]]
    parts = {"weight": weight}
    if not args["symmetric"]:
        scale = (high - low) / (2 * top["int"] + 1)
        parts["weight_zero_point"] = (-low / scale).round().sub(top["int"] + 1).to(torch.int8)
    if form == "nvfp4-pack-quantized":
        parts["weight_global_scale"] = 448 * 6 / weight.abs().max().view(1)
        scale = (scale * parts["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    if form == "mxfp4-pack-quantized":
        scale = 2 ** scale.log2().ceil()
    parts["weight_scale"] = scale.view(1) if args["strategy"] == "tensor" else scale
    stored = compressor.compress(parts, scheme)
    if form != "nvfp4-pack-quantized":
        return stored, compressor.decompress(stored, scheme)["weight"].float()
    codes = unpack_fp4_from_uint8(stored["weight_packed"], N, K, torch.float32)      # decompress would take bfloat16
    return stored, dequantize(codes, stored["weight_scale"].float(), args=scheme.weights, dtype=torch.float32,
                              global_scale=stored["weight_global_scale"])


FORMATS = {
    "fp8 of a tensor": ("float-quantized", arguments(8, "float", "tensor")),
    "fp8 of rows": ("float-quantized", arguments(8, "float", "channel")),
    "fp8 of blocks": ("float-quantized", arguments(8, "float", "block", block=[24, 40])),
    "int8 of rows": ("int-quantized", arguments(8, "int", "channel")),
    "int8 of rows, with zeros": ("int-quantized", arguments(8, "int", "channel", symmetric=False)),
    "int8 of a tensor": ("naive-quantized", arguments(8, "int", "tensor")),
    "int4 in bytes": ("naive-quantized", arguments(4, "int", "group", 32)),
    "int3": ("pack-quantized", arguments(3, "int", "group", 32)),
    "int6, with zeros": ("pack-quantized", arguments(6, "int", "channel", symmetric=False)),
    "int2 in groups, with zeros": ("pack-quantized", arguments(2, "int", "group", 32, symmetric=False)),
    "nvfp4": ("nvfp4-pack-quantized", arguments(4, "float", "tensor_group", 16)),
    "mxfp4": ("mxfp4-pack-quantized", arguments(4, "float", "group", 32)),
}
OF_ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def said(form, groups):
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {"format": "dense"},
            "config_groups": groups}


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install -e .[test]")


@quiet
@pytest.mark.parametrize("case", FORMATS)
def test_compressed_tensors_unpacks_what_is_read(case, llama, package):
    form, args = FORMATS[case]
    group = {"targets": ["Linear"], "weights": args, "input_activations": OF_ACTIVATIONS, "output_activations": None}
    agree(*llama(said(form, {"group_0": group}), lambda name, weight: by_package(name, weight, args, form)))


@quiet
def test_each_weight_of_several_groups_is_in_one_of_them(llama, package):
    """8 bits of 64 inputs look as 4 bits of 128 do: weight_shape tells."""
    kinds = {"q_proj": ("pack-quantized", arguments(4, "int", "channel")),
             "mlp": ("pack-quantized", arguments(8, "int", "channel")),
             "v_proj": ("float-quantized", arguments(8, "float", "channel")),
             "": ("pack-quantized", arguments(4, "int", "group", 32, symmetric=False))}
    groups = {f"group_{i}": {"targets": [f"re:.*{name}.*"], "weights": args, "format": form}
              for i, (name, (form, args)) in enumerate(kinds.items())}

    def pack(name, weight):
        form, args = next(kinds[part] for part in kinds if part in name)
        return by_package(name, weight, args, form)

    folder, model = llama(said("mixed-precision", groups), pack)
    agree(folder, model)
    assert ("4 bits with a scale a row and 8 bits with a scale a row and fp8, a scale a channel and 4 bits in groups "
            "of 32, with zero points") in describe(look(folder))
    found = checkpoints.load(folder)
    assert sum(isinstance(module, QuantizedLinear) for module in found.modules()) == 2 * (LINEARS - 1)


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


# ---- fp8

def of_all(weight):
    return weight.abs().max() / 448


def of_rows(weight):
    return weight.abs().amax(1, keepdim=True) / 448


@quiet
@pytest.mark.parametrize("config, scales", [
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, of_all),
    ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, of_all),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, of_rows),
    ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "quant_method": "modelopt"}, of_rows),
])
def test_fp8_with_a_scale_for_a_weight_or_a_row(config, scales, llama):
    def pack(name, weight):
        codes = (weight / scales(weight)).to(torch.float8_e4m3fn)
        static = {"input_scale": torch.ones(1)} if config.get("activation_scheme") == "static" else {}
        return {"weight": codes, "weight_scale": scales(weight), **static}, codes.float() * scales(weight)

    agree(*llama(config, pack))


def test_scales_may_be_powers_of_two_in_a_byte(llama):
    def pack(name, weight):
        scale = of_rows(weight).to(torch.float8_e8m0fnu)
        codes = (weight / scale.float()).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * scale.float()

    agree(*llama({"quant_method": "fp8", "scale_fmt": "ue8m0"}, pack))


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
