"""The door: what runs when, and what is said when it cannot."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import kernels
from kernels import common
from nanollm import ops
from nanollm.errors import InputError
from nanollm.layers.norm import rms_norm

ROOT = Path(__file__).parent.parent.parent
X, GAIN = torch.randn(2, 8), torch.ones(8)
WIDE = torch.randn(2, 20000), torch.ones(20000)


@pytest.fixture
def calls(monkeypatch) -> list:
    found = []

    def kernel(*args, **kwargs):
        found.append(args)
        return args[0]
    kernel.refuses, kernel.unchecked = kernels.rms_norm.refuses, kernel
    monkeypatch.setattr(kernels, "rms_norm", kernel)
    return found


def test_a_cpu_runs_the_definition(calls):
    assert not torch.equal(rms_norm(X, GAIN, 1e-5), X) and not calls


def test_a_gpu_runs_the_kernel_where_it_can(calls, monkeypatch):
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    assert rms_norm(X, GAIN, 1e-5) is X and len(calls) == 1
    assert rms_norm(*WIDE, 1e-5) is not WIDE[0] and len(calls) == 1             # too wide: the definition
    with ops.using("torch"):
        assert rms_norm(X, GAIN, 1e-5) is not X and len(calls) == 1


def test_the_switch_asks_for_the_kernel_whatever_the_device(calls):
    with ops.using("triton"):
        assert rms_norm(X, GAIN, 1e-5) is X
    assert rms_norm(X, GAIN, 1e-5) is not X                                     # as before


def test_the_kernel_says_what_it_does_not_support():
    refusal = "kernels.rms_norm: rows of 20000, supported are up to 16384"
    with ops.using("triton"), pytest.raises(ValueError, match=refusal):
        rms_norm(*WIDE, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_no_gpu_and_no_interpreter_is_said(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    refusal = "tensors on cpu; kernels run on an NVIDIA GPU, or with TRITON_INTERPRET=1"
    with ops.using("triton"), pytest.raises(ValueError, match=refusal):
        rms_norm(X, GAIN, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_bfloat16_in_an_interpreter_that_is_not_repaired_is_refused(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETS_BFLOAT16", False)
    with ops.using("triton"), pytest.raises(ValueError, match="wrong numbers in bfloat16"):
        rms_norm(X.bfloat16(), GAIN.bfloat16(), 1e-5)


def test_the_switch_is_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), ops.using("triton"):
        raise ZeroDivisionError
    assert ops._mode == "auto"


@pytest.mark.parametrize("mode", [None, "auto", "torch", "triton", "cuda"])
def test_the_environment_variable(mode, monkeypatch):
    """It is read when the module is imported, so that is done once more, beside the one that all others use."""
    if mode is None:
        monkeypatch.delenv("NANOLLM_KERNELS", raising=False)
    else:
        monkeypatch.setenv("NANOLLM_KERNELS", mode)
    found = importlib.util.spec_from_file_location("ops_once_more", ops.__file__)
    again = importlib.util.module_from_spec(found)
    if mode == "cuda":
        with pytest.raises(InputError, match="NANOLLM_KERNELS is 'cuda', expected one of auto, torch, triton"):
            found.loader.exec_module(again)
    else:
        found.loader.exec_module(again)
        assert again._mode == (mode or "auto")


def test_using_refuses_other_words():
    with pytest.raises(InputError, match="'fast', expected one of auto, torch, triton"), ops.using("fast"):
        pass


def test_a_foreign_package_named_kernels_is_reported(tmp_path):
    (tmp_path / "kernels.py").write_text("")
    code = ("import torch\nfrom nanollm import ops\nfrom nanollm.layers.norm import rms_norm\n"
            "with ops.using('triton'): rms_norm(torch.ones(1, 8), torch.ones(8), 1e-5)")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "is another package named kernels, which hides nanollm's" in done.stderr


def test_every_operation_is_a_definition_too():
    """Same name, same signature, and a way to say no."""
    import inspect

    homes = {
        "rms_norm": "layers.norm", "add_rms_norm": "layers.norm", "layer_norm": "layers.norm", "rotate": "layers.rope",
        "gated": "layers.mlp", "attend": "layers.attention", "expert_mlp": "layers.moe", "mamba_scan": "layers.scan",
        "causal_conv": "layers.mamba", "ssd": "layers.ssd", "delta_walk": "layers.delta",
        "linear_cross_entropy": "training.losses", "quantized_linear": "inference.quantize",
    }
    assert set(homes) == set(kernels.OPERATIONS)
    for name, home in homes.items():
        definition, kernel = getattr(importlib.import_module(f"nanollm.{home}"), name), getattr(kernels, name)
        mine, theirs = (inspect.signature(f).parameters for f in (kernel, definition))
        assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in theirs.values()], name
        assert callable(kernel.refuses) and callable(kernel.unchecked)
