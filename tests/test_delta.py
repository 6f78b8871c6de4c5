"""Deltas of weights: python -m checkpoints.delta, against what FastChat and Alpaca do with transformers' models."""

import dataclasses
import sys

import pytest
import torch
import transformers

import checkpoints
from checkpoints import convert, delta
from checkpoints.source import open_source
from nanollm import cli
from nanollm.errors import CheckpointError
from tests import oracles
from tests.fixtures import FIXTURES

LLAMA = FIXTURES["llama-3"]


def command(*args, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["delta", *map(str, args)])
    cli.main(delta.run)


def pair(folder, dtype=torch.float16, more=0, name="llama-3"):
    """BASE and TUNED as transformers writes them; TUNED has `more` tokens."""
    fixture = FIXTURES[name]
    oracles.write(fixture, folder / "base", dtype)
    keys = fixture.keys | {"vocab_size": {**oracles.BASE, **fixture.keys}["vocab_size"] + more}
    tuned = transformers.AutoModelForCausalLM.from_config(oracles.hf_config(dataclasses.replace(fixture, keys=keys)))
    oracles.make_loud(tuned, seed=1)
    tuned.to(dtype).save_pretrained(folder / "tuned")
    (folder / "tuned" / "tokenizer_config.json").write_text('{"of": "tuned"}')
    return folder / "base", folder / "tuned"


def fastchat(what: str, base, other, rows: str = "zero") -> dict[str, torch.Tensor]:
    """make_delta and apply_delta: += and -= on half-precision state dicts. transformers resizes BASE; its new rows are
    then 0 (FastChat 0.1.9), or the mean of the old ones (Alpaca)."""
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (base, other))
    old, new = one.config.vocab_size, two.config.vocab_size
    if new > old:
        one.resize_token_embeddings(new, mean_resizing=False)
        for layer in (one.get_input_embeddings(), one.get_output_embeddings()):
            mean = layer.weight.data[:old].float().mean(0).to(layer.weight.dtype)
            layer.weight.data[old:] = 0 if rows == "zero" else mean
    with torch.no_grad():
        base_weights, found = one.state_dict(), two.state_dict()
        return {name: value + base_weights[name] if what == "apply" else value - base_weights[name]
                for name, value in found.items()}


def stored(folder) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("what", ["make", "apply"])
def test_the_sums_are_those_of_fastchat_to_the_bit(what, dtype, tmp_path, monkeypatch, capsys):
    base, other = pair(tmp_path, dtype)
    command(what, base, other, tmp_path / "out", monkeypatch=monkeypatch)
    expected, found = fastchat(what, base, other), stored(tmp_path / "out")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value), name
    said = capsys.readouterr().out
    assert f"summed in float32, stored in {str(dtype).removeprefix('torch.')}" in said
    assert (tmp_path / "out" / "tokenizer_config.json").read_text().startswith('{"of": "tuned"')


@pytest.mark.parametrize("rows", ["zero", "mean"])
@pytest.mark.parametrize("what", ["make", "apply"])
def test_new_rows(what, rows, tmp_path, monkeypatch):
    base, other = pair(tmp_path, torch.float32, more=2)
    command(what, base, other, tmp_path / "out", "--new-rows", rows, monkeypatch=monkeypatch)
    expected, found = fastchat(what, base, other, rows), stored(tmp_path / "out")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-7), name
        assert torch.equal(found[name][:131], value[:131]) or value.shape[0] != 133


def equal_share(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    same = sum((one[name] == value).sum().item() for name, value in other.items())
    return same / sum(value.numel() for value in other.values())


@pytest.mark.parametrize("name", ["llama-3", "mixtral-8x22b", "gemma-7b"])     # experts in pieces; a tied head
def test_what_is_made_is_undone(name, tmp_path, monkeypatch):
    base, tuned = pair(tmp_path, torch.float32, name=name)
    command("make", base, tuned, tmp_path / "delta", monkeypatch=monkeypatch)
    command("apply", base, tmp_path / "delta", tmp_path / "again", monkeypatch=monkeypatch)
    before, again, whole = (stored(path) for path in (base, tmp_path / "again", tuned))
    for name, value in whole.items():
        larger = torch.maximum(before[name].abs(), value.abs())
        assert ((again[name] - value).abs() <= 2**-23 * larger).all(), name
    assert equal_share(stored(tmp_path / "delta"), whole) < 0.01


def test_a_delta_in_float32_keeps_nearly_all_bits_of_16(tmp_path, monkeypatch):
    base, tuned = pair(tmp_path, torch.bfloat16)
    shares = {}
    for dtype in ("float32", "bfloat16"):
        command("make", base, tuned, tmp_path / f"delta-{dtype}", "--dtype", dtype, monkeypatch=monkeypatch)
        command("apply", base, tmp_path / f"delta-{dtype}", tmp_path / dtype, "--dtype", "bfloat16",
                monkeypatch=monkeypatch)
        shares[dtype] = equal_share(stored(tmp_path / dtype), stored(tuned))
    assert shares["float32"] > 0.999 and shares["bfloat16"] < 0.9


def refused(base, other, folder) -> str:
    with pytest.raises(CheckpointError) as error:
        delta.combine(open_source(base), open_source(other), 1, folder / "out")
    assert not (folder / "out").exists() and not list(folder.glob(".out.*"))
    return str(error.value)


def test_models_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path):
    base, wider = pair(tmp_path, more=2)
    assert "embed.weight has 131 rows" in refused(wider, base, tmp_path)
    oracles.write(dataclasses.replace(LLAMA, keys=LLAMA.keys | {"attention_bias": True}), tmp_path / "biased")
    assert f"{base}: has no layers.0.mixer.k.bias, which" in refused(base, tmp_path / "biased", tmp_path)
    changed = dataclasses.replace(LLAMA, keys=LLAMA.keys | {"intermediate_size": 80})
    oracles.write(changed, tmp_path / "narrow")
    assert "layers.0.ffn.gate.weight has the shape (80, 64), in" in refused(base, tmp_path / "narrow", tmp_path)
    with torch.no_grad():
        broken = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        broken.model.norm.weight[3] = 65504.0
        broken.save_pretrained(tmp_path / "large")
    assert "holds a NaN or an infinity as float16" in refused(tmp_path / "large", tmp_path / "large", tmp_path)


def test_another_config_is_warned_of(tmp_path):
    base, _ = pair(tmp_path)
    oracles.write(dataclasses.replace(LLAMA, keys=LLAMA.keys | {"rms_norm_eps": 1e-3}), tmp_path / "eps")
    with pytest.warns(UserWarning, match=r"pre_mixer\.eps is 0\.01, and is 0\.001 in .*eps, which is what the new"):
        delta.combine(open_source(base), open_source(tmp_path / "eps"), 1, tmp_path / "out")
    assert checkpoints.config(tmp_path / "out").final_norm.eps == 1e-3


def test_a_base_in_metas_layout_is_refused_and_out_inside_a_source_too(tmp_path, monkeypatch):
    base, other = pair(tmp_path, torch.float32, name="llama-2")
    with pytest.warns(UserWarning, match="no key for the context"):
        convert.convert(convert.plan(open_source(base), "meta"), tmp_path / "meta")
    with pytest.raises(CheckpointError, match="its RoPE turns other pairs of channels"):
        delta.check(open_source(tmp_path / "meta", allow_pickle=True), open_source(other))
    with pytest.raises(SystemExit, match="is inside"):
        command("apply", base, other, other / "out", monkeypatch=monkeypatch)
