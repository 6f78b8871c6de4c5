"""Folders in the layouts of other programs, written here: by bitsandbytes and compressed-tensors themselves, fp8 by its
formula. What is read is what the packages unpack.

What compares with a package is skipped, by name, where it is not installed: pip install -e ".[test]" does that.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.inspect import describe, look
from checkpoints.source import open_source
from checkpoints.storage import stream
from checkpoints.storage.files import read_folder
from checkpoints.storage.quantized import plain_config, plain_tensors
from nanollm.inference.quantize import QuantizedLinear
from tests.oracles import difference

quiet = pytest.mark.filterwarnings("ignore:.*passed over:UserWarning", "ignore:.*not kept so:UserWarning")
LINEARS = 7                                      # of a layer


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
