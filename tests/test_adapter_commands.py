"""Adapters in the commands: `checkpoints.convert --adapter FOLDER --merge`, and `generate.py --adapter FOLDER`."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft", reason="the extra `test` has peft")

import checkpoints  # noqa: E402
import generate as script  # noqa: E402
from checkpoints import convert as command  # noqa: E402
from nanollm.errors import NanollmError  # noqa: E402
from nanollm.training import lora  # noqa: E402
from nanollm.training.lora import LoRA  # noqa: E402
from tests import forked  # noqa: E402
from tests.oracles import difference  # noqa: E402
from tests.peft_models import ALL, EXPERTS, SAFE, base, bit_equal, make, quiet  # noqa: E402
from tests.terminals import scripted  # noqa: E402


@pytest.fixture
def convert(monkeypatch):
    """The command, in this process."""
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        command.run()

    return run


@pytest.mark.parametrize("fixture, config", [
    ("llama-3.1", dict(target_modules=["q_proj", "down_proj"], use_dora=True)),
    pytest.param("phi-4", dict(target_modules="all-linear"), marks=pytest.mark.slow),
    pytest.param("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"]),
                 marks=pytest.mark.slow),
    ("mixtral-8x22b", dict(target_modules=["q_proj"], target_parameters=EXPERTS))])
def test_convert_merges_into_a_folder_that_transformers_loads(fixture, config, tmp_path, convert):
    made = make(fixture, tmp_path, **config)
    convert(made.base, tmp_path / "out", "--adapter", made.adapter, "--merge", "--verify")
    with torch.no_grad():
        assert difference(base(tmp_path / "out")(made.x).logits, made.logits()) <= 1e-5
    before, after = load_file(made.base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and any(torch.equal(before[name], after[name]) for name in before)


def test_what_is_merged_is_rounded_once(tmp_path, convert):
    """W in bfloat16 + s B A, added in float32, and the sum rounded: not B A rounded before."""
    made = make("llama-3.1", tmp_path, torch.bfloat16, target_modules=["q_proj"])
    convert(made.base, tmp_path / "out", "--adapter", made.adapter, "--merge")
    name, parts = "model.layers.1.self_attn.q_proj", load_file(made.adapter / SAFE)
    W = load_file(made.base / "model.safetensors")[f"{name}.weight"]
    A, B = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(found, (W.float() + 2 * (B.float() @ A.float())).bfloat16())


def test_an_adapter_that_does_not_fit_writes_nothing(tmp_path, convert, capsys):
    made = make("llama-3.1", tmp_path / "one", target_modules=["q_proj"])
    other = make("phi-4", tmp_path / "other", target_modules=["qkv_proj"])
    with pytest.raises(NanollmError, match="layers.0.self_attn.q_proj: has an adapter, and the base no weight"):
        convert(other.base, tmp_path / "out", "--adapter", made.adapter, "--merge")
    with pytest.raises(SystemExit):
        convert(made.base, tmp_path / "out", "--merge")
    assert "--adapter FOLDER and --merge go together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["meta", "gguf", "nanollm"])
def test_a_base_in_another_layout_has_its_heads_in_another_order(to, tmp_path, convert):
    made = make({"meta": "llama-3", "gguf": "mistral-v0.2"}.get(to, "phi-4"), tmp_path, target_modules=ALL)
    with quiet():
        convert(made.base, tmp_path / to, "--to", to)
        convert(tmp_path / to, tmp_path / "out", "--adapter", made.adapter, "--merge", "--allow-pickle")
        if to != "meta":                         # which is a pickle
            model = checkpoints.load(tmp_path / to, adapter=made.adapter)
            assert difference(model(made.x).detach(), made.logits()) <= 1e-5
            checkpoints.save_adapter(model, tmp_path / "again")
            assert bit_equal(tmp_path / "again", made.adapter)
    with torch.no_grad():
        assert difference(checkpoints.load(tmp_path / "out")(made.x), made.logits()) <= 1e-5


def test_merging_into_quantised_weights_writes_16_bits_and_says_so(tmp_path, convert):
    made = make("llama-3.1", tmp_path, target_modules=["q_proj", "down_proj"])
    convert(made.base, tmp_path / "fewer", "--quantize", "int8")
    with pytest.warns(UserWarning, match="weights have .*; the adapter is merged into what they stand for"):
        convert(tmp_path / "fewer", tmp_path / "out", "--adapter", made.adapter, "--merge")
    with quiet():
        expected = lora.merge(checkpoints.load(tmp_path / "fewer", adapter=made.adapter, dtype=torch.float32))
    found, name = checkpoints.load(tmp_path / "out"), "layers.1.mixer.q.weight"
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert stored.dtype == torch.bfloat16
    assert difference(found.get_parameter(name), expected.get_parameter(name)) <= 2**-8


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A model with a tokenizer, an adapter that makes it say something else, and the two merged."""
    root = tmp_path_factory.mktemp("spoken")
    model = checkpoints.load(scripted(root / "scripted", ["Y", "e", "s"], context=64))
    for p in model.parameters():
        p.data = 0.3 * torch.randn_like(p)
    checkpoints.save(model, root / "model")
    model = lora.add(checkpoints.load(root / "model"), LoRA(2, 4, targets=("q", "v", "down")))
    for p in lora.adapters(model).values():
        p.data = torch.randn_like(p)
    checkpoints.save_adapter(model, root / "adapter")
    checkpoints.save(lora.merge(model), root / "merged")
    return root / "model", root / "adapter", root / "merged"


def said(*arguments: object) -> str:
    done = forked.start(1, script.run, *arguments, "--max-new-tokens", 12).end()
    assert done.codes == [0], done.said
    return done.out


@pytest.mark.slow
@pytest.mark.parametrize("ask", [("--prompt", "ab"), ("--ask", "really?"), ("--prompt", "ab", "--prompt", "c")],
                         ids=["a prompt", "a question", "a batch"])
def test_generate_takes_an_adapter(ask, spoken):
    folder, adapter, merged = spoken
    found = said("--model", folder, "--adapter", adapter, *ask)
    assert found == said("--model", merged, *ask) != said("--model", folder, *ask)


@pytest.mark.slow
def test_generate_keeps_it_beside_quantised_weights(spoken):
    folder, adapter, _ = spoken
    found = said("--model", folder, "--adapter", adapter, "--prompt", "ab", "--quantize", "int8")
    assert found != said("--model", folder, "--prompt", "ab", "--quantize", "int8")
    refused = forked.start(1, script.run, "--model", folder, "--adapter", adapter, "--prompt", "ab", "--quantize",
                           "int8", "--compile").end()
    assert refused.codes != [0] and "--compile is for an adapter that is merged" in refused.err


def test_an_adapter_that_was_trained_to_score_is_no_adapter_to_write_with(spoken, tmp_path):
    folder, adapter, _ = spoken
    shutil.copytree(adapter, tmp_path / "judge")
    (tmp_path / "judge/score.safetensors").touch()
    done = forked.start(1, script.run, "--model", folder, "--adapter", tmp_path / "judge", "--prompt", "ab",
                        "--max-new-tokens", 2).end()
    assert done.codes == [0] and f"warning: {tmp_path / 'judge'}: has a score.safetensors, so it was" in done.err


def test_a_model_that_is_an_adapter_is_told_of_the_option(spoken):
    refused = forked.start(1, script.run, "--model", spoken[1], "--prompt", "ab").end()
    assert refused.codes != [0] and "--adapter" in refused.err and "Traceback" not in refused.said
