"""Folders in compressed-tensors' layout: written, read back, and loaded by transformers, which has the package do it.

What compares with the package is skipped, by name, where it is not installed: pip install -e ".[test]" does that.
"""

import json
import re
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
import train
from checkpoints import convert
from checkpoints.inspect import describe, look
from checkpoints.show import find
from checkpoints.source import open_source
from checkpoints.storage.quantized.compressed import packed_down
from nanollm import cli
from nanollm.errors import CheckpointError, ConfigError, InputError, RunError
from nanollm.inference.quantize import QuantizedExperts, QuantizedLinear, dequantize
from nanollm.training.options import parse
from tests.fixtures import FIXTURES, ONE_OF_EACH, slow_but
from tests.oracles import difference, write
from tests.test_quantized_load import same_state
from tests.test_roundtrip import ARRANGED, all_tensors

pytestmark = pytest.mark.filterwarnings("ignore:of this layout transformers reads experts:UserWarning",
                                        "ignore:You passed `quantization_config`:UserWarning")
SHAPE = dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=None)
MADE = {
    "llama": lambda: transformers.LlamaConfig(intermediate_size=160, **SHAPE),
    "tied": lambda: transformers.LlamaConfig(intermediate_size=160, tie_word_embeddings=True, **SHAPE),
    "phi3": lambda: transformers.Phi3Config(intermediate_size=160, **SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(
        intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, **SHAPE),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        intermediate_size=96, moe_intermediate_size=64, shared_expert_intermediate_size=96, num_experts=4,
        num_experts_per_tok=2, **SHAPE),
}
OF_ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
IN_GROUPS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}


@pytest.fixture
def made(tmp_path):
    """A small model of this name, as transformers writes it."""
    def make(name: str, dtype: torch.dtype = torch.float32):
        model = transformers.AutoModelForCausalLM.from_config(MADE[name]()).eval().to(dtype)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name
    return make


def compressed(source, folder, kind, group=None, dtype=None):
    convert.convert(convert.plan(open_source(source), "hf", dtype, None, kind, group), folder, verify=True)
    return folder


def theirs(folder, x, **options):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(x).logits


# ---- what is written is what is loaded

@pytest.mark.filterwarnings("ignore:.*not quantised, as this layout has no place:UserWarning")
@pytest.mark.parametrize("name", slow_but(ARRANGED, [name for name in ONE_OF_EACH if name != "gpt2-stanford"]))
def test_every_family_is_what_load_makes_of_its_source(name, tmp_path):
    """But for weights that stay whole in this layout, which are what they were."""
    write(FIXTURES[name], tmp_path / "in", torch.bfloat16)
    compressed(tmp_path / "in", tmp_path / "out", "int8")
    expected, found = checkpoints.load(tmp_path / "in", quantize="int8"), checkpoints.load(tmp_path / "out")
    plain = checkpoints.load(tmp_path / "in").state_dict()
    ours, there = found.state_dict(), expected.state_dict()
    assert any(isinstance(module, QuantizedLinear) for module in found.modules())
    assert all(torch.equal(value, there[key] if key in there else plain[key]) for key, value in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 32), ("int4", None)])
@pytest.mark.parametrize("name", MADE)
def test_the_bits_are_those_of_loading_the_source_so(name, kind, group, dtype, made, tmp_path):
    source = made(name, dtype)
    compressed(source, tmp_path / "out", kind, group)
    found = checkpoints.load(tmp_path / "out")
    assert same_state(found, checkpoints.load(source, quantize=kind, group=group))
    if name in ("mixtral", "qwen2-moe"):
        assert isinstance(found.layers[0].ffn.experts, QuantizedExperts)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_and_back_to_a_plain_folder(kind, made, tmp_path):
    """Each weight is s (q − z), rounded once; what was not quantised is what it was."""
    source = made("mixtral")
    folder = compressed(source, tmp_path / "out", kind)
    convert.convert(convert.plan(open_source(folder), "hf", torch.bfloat16), tmp_path / "plain", verify=True)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    plain, packed = checkpoints.load(tmp_path / "plain"), checkpoints.load(folder)
    names = {name for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)}
    for name, parameter in plain.named_parameters():
        module = name.removesuffix(".weight")
        if module in names:
            one = packed.get_submodule(module)
            assert torch.equal(parameter, dequantize(one.packed, one.scale, one.zero).bfloat16())
            names.remove(module)
        else:
            assert torch.equal(parameter, packed.get_parameter(name).bfloat16())
    assert not names


# ---- the package itself

@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install -e .[test]")


@pytest.mark.parametrize("kind, weights", [("int8", OF_ROWS), ("int4", IN_GROUPS)])
def test_the_package_packs_and_unpacks_the_same(kind, weights, made, tmp_path, package):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Package
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    folder = compressed(made("llama"), tmp_path / "out", kind, 32 if kind == "int4" else None)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    stored, model = all_tensors(folder), checkpoints.load(folder)
    for theirs_, ours in (("model.layers.0.self_attn.k_proj", "layers.0.mixer.k"),
                          ("model.layers.1.mlp.down_proj", "layers.1.ffn.down")):
        parts = {name.removeprefix(f"{theirs_}."): one for name, one in stored.items() if name.startswith(theirs_)}
        module = model.get_submodule(ours)
        weight = dequantize(module.packed, module.scale, module.zero)
        assert torch.equal(Package.decompress(parts, scheme)["weight"], weight)
        zero = {} if module.zero is None else {"weight_zero_point": module.zero - 8}
        again = Package.compress({"weight": weight, "weight_scale": module.scale, **zero}, scheme)
        assert again.keys() == parts.keys() and all(torch.equal(again[name].to(one.dtype), one)
                                                    for name, one in parts.items())


@pytest.mark.parametrize("name", MADE)
def test_transformers_has_the_same_logits_of_eight_bits(name, made, tmp_path, package):
    folder, x = compressed(made(name), tmp_path / "out", "int8"), torch.randint(0, 100, (2, 17))
    ours = checkpoints.load(folder)(x)
    plain = checkpoints.load(tmp_path / name)(x)
    assert difference(ours, theirs(folder, x)) < 1e-5 < 1e-3 < difference(ours, plain)


@pytest.mark.parametrize("name", ["llama", "tied", "phi3"])
def test_transformers_has_the_same_logits_of_four_bits_when_it_dequantises(name, made, tmp_path, package):
    """Where it keeps zero points packed it has no room for them (compressed-tensors 0.20, transformers 5.23)."""
    folder, x = compressed(made(name), tmp_path / "out", "int4", 32), torch.randint(0, 100, (2, 17))
    ours = checkpoints.load(folder)(x)
    option = transformers.CompressedTensorsConfig(dequantize=True)
    assert difference(ours, theirs(folder, x, quantization_config=option)) < 1e-5
    assert difference(ours, checkpoints.load(tmp_path / name)(x)) > 0.01


# ---- what others write

def by_hand(folder, weights, change=lambda tensors: None, config=lambda found: None):
    """A Llama whose projections are whole numbers, packed here by numpy. The weights that they stand for, by name."""
    draw, bits, whole = np.random.default_rng(0), weights["num_bits"], {}
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        N, K = tensors.pop(name).shape
        G = K // weights["group_size"] if weights["strategy"] == "group" else 1
        q, z = draw.integers(0, 1 << bits, (N, K)), draw.integers(0, 1 << bits, (N, G))
        z = np.full_like(z, 1 << bits - 1) if weights["symmetric"] else z
        s = torch.from_numpy(draw.uniform(0.01, 0.1, (N, G))).bfloat16()
        each = 32 // bits
        words = sum(q[:, i::each].astype(np.uint32) << np.uint32(bits * i) for i in range(each))
        rows = np.pad(z, ((0, -N % each), (0, 0)))
        down = sum(rows[i::each].astype(np.uint32) << np.uint32(bits * i) for i in range(each))
        tensors |= {f"{name}_packed": torch.from_numpy(words.view(np.int32)), f"{name}_scale": s,
                    f"{name}_shape": torch.tensor([N, K])}
        if not weights["symmetric"]:
            tensors[f"{name}_zero_point"] = torch.from_numpy(down.view(np.int32))
        whole[name] = (torch.from_numpy(q.reshape(N, G, -1) - z[..., None]) * s.double()[..., None]).flatten(1).float()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": 1.5, "kv_cache_scheme": None, "sparsity_config": {}, "ignore": ["lm_head"],
        "version": "0.9.1", "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {"actorder": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}, **weights}}}}
    config(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))
    return whole


@pytest.mark.parametrize("kept, weights", [
    (True, OF_ROWS), (True, IN_GROUPS), (True, IN_GROUPS | {"symmetric": True}),
    (True, IN_GROUPS | {"group_size": 16}),
    (True, OF_ROWS | {"num_bits": 4}), (True, OF_ROWS | {"num_bits": 4, "symmetric": False}),
    (False, OF_ROWS | {"symmetric": False}), (False, IN_GROUPS | {"num_bits": 8}),
])
def test_whole_numbers_of_any_kind_are_read(kept, weights, made, tmp_path):
    """Packed where quantize.py has such weights, and as what they stand for where it does not, with a warning."""
    source, x = made("llama"), torch.randint(0, 100, (2, 17))
    whole = by_hand(source, weights)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = checkpoints.load(source)
    tensors = {name: one for name, one in load_file(source / "model.safetensors").items() if "_proj" not in name}
    save_file(tensors | whole, source / "model.safetensors", {"format": "pt"})
    values = json.loads((source / "config.json").read_text())
    del values["quantization_config"]
    (source / "config.json").write_text(json.dumps(values))
    expected = theirs(source, x)
    with torch.inference_mode():
        packed = found(x)
    assert difference(found(x), expected) < 1e-5 and difference(packed, expected) < 1e-4
    count = sum(isinstance(module, QuantizedLinear) for module in found.modules())
    assert count == (14 if kept else 0)
    said = [str(one.message) for one in told]
    assert said == [] if kept else len(said) == 1 and "14 weights are not kept so, but read as" in said[0]


def wrong(key, value, where=()):
    def change(found):
        for name in where:
            found = found[name]
        found[key] = value
    return change


GROUP = ("config_groups", "group_0")
WEIGHTS = (*GROUP, "weights")


@pytest.mark.parametrize("config, message", [
    (wrong("format", "marlin-24"), "quantization_config.format is 'marlin-24'; expected 'pack-quantized' or"),
    (wrong("format", "marlin-24", GROUP), "group_0.format is 'marlin-24'; expected"),
    (wrong("num_bits", 1, WEIGHTS), "group_0.weights.num_bits is 1; expected 2 or 3 or 4"),
    (wrong("type", "complex", WEIGHTS), "weights.type is 'complex'; expected 'int' or 'float'"),
    (wrong("strategy", "block", WEIGHTS), "weights.strategy is 'block'; expected 'group' or 'channel'"),
    (wrong("actorder", "random", WEIGHTS), "weights.actorder is 'random'; expected None or 'static' or 'weight'"),
    (wrong("dynamic", True, WEIGHTS), "weights.dynamic is True"),
    (wrong("group_size", None, WEIGHTS), "weights.group_size is None; expected a number of inputs"),
    (wrong("symmetric", "yes", WEIGHTS), "weights.symmetric is 'yes'; expected true or false"),
    (wrong("new_trick", 3, WEIGHTS), "nothing here knows what these mean: .*weights.new_trick = 3"),
    (wrong("transform_config", {"config_groups": {}}), "quantization_config.transform_config is"),
    (wrong("sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config.format is 'sparse-24-bitmask'"),
    (wrong("config_groups", []), "config_groups is .* expected an object of objects"),
    (wrong("config_groups", {"a": {}}), r"config_groups\.a\.weights is missing"),
])
def test_another_way_of_packing_is_refused_by_its_key(config, message, made):
    source = made("llama")
    by_hand(source, IN_GROUPS, config=config)
    with pytest.raises(ConfigError, match=message) as error:
        checkpoints.load(source)
    assert "Read of compressed-tensors are: pack-quantized, float-quantized" in str(error.value)
    assert "CompressedTensorsConfig(dequantize=True)" in str(error.value)


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(f"{NAME}_scale"), r"_scale is missing; expected floats \(160, 2\)"),
    (lambda t: t.pop(f"{NAME}_zero_point"), r"_zero_point is missing; expected int32 \(20, 2\)"),
    (lambda t: t.update({f"{NAME}_scale": torch.ones(160, 4)}), r"_scale is torch.float32 \(160, 4\); expected floats"),
    (lambda t: t.update({f"{NAME}_packed": torch.ones(160, 8)}), "_packed is torch.float32"),
    (lambda t: t.update({f"{NAME}_packed": torch.ones(160, 4, dtype=torch.int32)}), r"expected floats \(160, 1\)"),
    (lambda t: t[f"{NAME}_scale"].fill_(torch.nan), "holds a NaN or an infinity"),
])
def test_parts_that_do_not_fit_are_named(change, message, made):
    source = made("llama")
    by_hand(source, IN_GROUPS, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(source)


def test_without_a_word_in_config_json_packed_weights_are_named(made):
    source = made("llama")
    by_hand(source, IN_GROUPS)
    values = json.loads((source / "config.json").read_text())
    del values["quantization_config"]
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="weight_packed: weights quantised by compressed-tensors"):
        checkpoints.load(source)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 7, 8, 19])
def test_zero_points_are_packed_down_the_rows(rows, bits):
    zeros = torch.randint(0, 1 << bits, (rows, 3))
    words = packed_down(zeros, bits)
    each = 32 // bits
    assert words.shape == (-(-rows // each), 3) and words.dtype == torch.int32
    for row in range(rows):
        assert torch.equal((words[row // each] >> bits * (row % each)) & (1 << bits) - 1, zeros[row].int())


# ---- commands

@pytest.fixture
def command(monkeypatch, capfd):
    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        try:
            cli.main(convert.run)
        except SystemExit as end:
            return 1, f"{end.code}{capfd.readouterr().err}"
        return 0, capfd.readouterr().out
    return run


def test_the_command(made, tmp_path, command):
    source = made("llama", torch.bfloat16)
    code, said = command(source, tmp_path / "out", "--quantize", "int4", "--group", "32", "--dry-run")
    assert code == 0 and not (tmp_path / "out").exists()
    assert re.search(r"q_proj.weight_zero_point +int32 +8×2  ← bfloat16 model.layers.0.self_attn.q_proj.weight", said)
    code, said = command(source, tmp_path / "out", "--quantize", "int4", "--group", "32", "--verify")
    assert code == 0 and "read back equal" in said
    found = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert found["ignore"] == ["lm_head"]
    assert found["config_groups"]["group_0"]["weights"] == IN_GROUPS | {"dynamic": False}
    stored = all_tensors(tmp_path / "out")
    assert stored["model.layers.1.mlp.down_proj.weight_shape"].tolist() == [64, 160]
    report = look(tmp_path / "out")
    assert report.reason is None and "quantised by compressed-tensors: 4 bits in groups of 32, with zero points" in (
        described := describe(report)) and "weight_packed" in described
    assert find(str(tmp_path / "out")).weights.startswith("4 bits in groups of 32, with zero points: ")
    code, said = command(tmp_path / "out", tmp_path / "plain")
    assert code == 0 and checkpoints.load(tmp_path / "plain").embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("options, message", [
    (["--quantize", "int8", "--to", "nanollm"], "--quantize goes with --to hf"),
    (["--group", "32"], "--group goes with --quantize int4"),
    (["--quantize", "int8", "--group", "32"], "--group goes with --quantize int4"),
    (["--quantize", "int4", "--group", "128"], "layers.0.mixer.q: 64 inputs, expected a multiple of the group of 128"),
])
def test_options_that_do_not_go_together(options, message, made, tmp_path, command):
    code, said = command(made("llama"), tmp_path / "out", *options)
    assert code and message in said and not (tmp_path / "out").exists()


def test_a_quantised_folder_is_not_quantised_again_nor_trained(made, tmp_path):
    folder = compressed(made("llama"), tmp_path / "out", "int8")
    with pytest.raises(InputError, match="its weights have 8 bits with a scale a row already"):
        convert.plan(open_source(folder), fewer="int4")
    with pytest.raises(InputError, match="already; load it without quantize"):
        checkpoints.load(folder, quantize="int8")
    expected = r"quantised, and those are not trained; --lora-rank trains adapters .* python -m checkpoints\.convert"
    with pytest.raises(RunError, match=expected):
        train.initial(parse("", ["--init", str(folder)]))


def test_matrices_that_are_stored_turned_over_stay(tmp_path):
    write(FIXTURES["gpt2-stanford"], tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"no weight is stored so .*: layers\.0\.mixer\.q"):
        convert.plan(open_source(tmp_path / "gpt2"), fewer="int8")
    write(FIXTURES["gpt-oss-full-first"], tmp_path / "oss")
    with pytest.warns(UserWarning, match=r"not quantised, .* no place for them: layers\.0\.ffn\.experts"):
        compressed(tmp_path / "oss", tmp_path / "out", "int8")
    found, x = checkpoints.load(tmp_path / "out"), torch.randint(0, 100, (2, 17))
    assert not any(isinstance(module, QuantizedExperts) for module in found.modules())
    assert isinstance(found.layers[0].mixer.q, QuantizedLinear)
    assert 0 < difference(found(x), checkpoints.load(tmp_path / "oss")(x)) < 0.3


def test_four_bits_of_experts_are_warned_of(made, tmp_path):
    with pytest.warns(UserWarning, match="transformers reads experts in 8 bits only"):
        compressed(made("mixtral"), tmp_path / "out", "int4", 32)
