"""Folders of other programs (tests/hostile/foreign.py has each by its message): what is advised works, and is true of
the libraries that are installed."""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as QUANTIZERS
from transformers.quantizers.base import HfQuantizer

import checkpoints
from checkpoints.families import FAMILIES, read_config
from checkpoints.families.elsewhere import BOTH, ELSEWHERE, ENCODER
from checkpoints.names.reader import DEFAULTS, IRRELEVANT
from checkpoints.source import open_source
from checkpoints.storage import quantized
from nanollm import cli
from nanollm.errors import CheckpointError, ConfigError, did_you_mean
from tests.hostile import good


def advised(error: pytest.ExceptionInfo, start: str) -> str:
    """The command in a message, from `start` up to what is set off from it."""
    text = str(error.value).partition(start)[2]
    return start + text.partition(" (or")[0].partition(";")[0]


def test_shards_of_fsdp_become_a_folder_by_the_command_that_is_advised(tmp_path):
    """torch.distributed.checkpoint writes them here in one process; its own command puts them together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # torch's: that there is one process
        torch.distributed.checkpoint.save({"model": good.tensors()}, checkpoint_id=tmp_path / "shards")
    with pytest.raises(CheckpointError, match="shards them among ranks") as error:
        checkpoints.load(tmp_path / "shards")
    command, out = advised(error, "mkdir"), tmp_path / "OUT"
    subprocess.run(command.replace("python", sys.executable), shell=True, cwd=tmp_path, check=True, capture_output=True)
    good.write_json(out / "config.json", good.CONFIG)
    found = good.read_whole(out).stored
    assert {name: one.shape for name, one in found.items()} == {
        name: tensor.shape for name, tensor in good.tensors().items()}


def test_what_is_advised_of_quantised_folders_is_what_transformers_can_undo():
    """`dequantize` of the model is there for bitsandbytes, and an option at loading for compressed-tensors; the methods
    for which an unquantised upload alone is advised have neither. (save_original_format=False: a model that was
    dequantised cannot be written in the form that it was read in.)"""
    def undone(kind: str) -> bool:
        return QUANTIZERS[kind]._dequantize is not HfQuantizer._dequantize

    assert undone("bitsandbytes_4bit") and undone("bitsandbytes_8bit")
    assert not any(undone(kind) for kind in ("gptq", "awq", "auto-round", "fbgemm_fp8", "compressed-tensors"))
    assert "modelopt" not in QUANTIZERS
    assert "save_original_format" in inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    assert "dequantize" in inspect.signature(transformers.CompressedTensorsConfig.__init__).parameters
    assert quantized.UNDO.keys() == {"bitsandbytes", "compressed-tensors", "mlx"}
    assert all(undo.endswith("upload") for undo in quantized.UNDO.values())


def test_no_decoder_is_called_something_else():
    """transformers' own lists of encoders, and of encoders with a decoder."""
    kinds = {what: {kind for kind, said in ELSEWHERE.items() if said == what} for what in (ENCODER, BOTH)}
    assert kinds[ENCODER] <= modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() | {"jina_embeddings_v3"}
    assert kinds[BOTH] <= modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
    assert not ELSEWHERE.keys() & FAMILIES.keys()


def test_an_unknown_family_is_told_the_nearest_and_where_the_list_is():
    with pytest.raises(ConfigError) as error:
        read_config({"model_type": "qwen4"})
    assert str(error.value) == (
        "config.json: model_type is 'qwen4'; near it are qwen, qwen3, qwen2; "
        f"python -m checkpoints.families lists the {len(FAMILIES)} that are read")


@pytest.mark.parametrize("kind, reason", [
    ("llava", "reads pictures or sound beside text"), ("qwen3_asr", "reads pictures or sound beside text"),
    ("mllama", "cross attention"), ("deepseek_v4", "several residual streams"),
    ("phi3small", "block-sparse"), ("sparsellama", "FATReLU"),
    ("step3p7", "nothing could be compared"), (None, "no class in architectures .*--family MODEL_TYPE"),
])
def test_what_is_no_relative_of_its_name_is_told_the_reason(kind, reason):
    """No family is near `mllama` but by its letters: to call it llama does not help."""
    with pytest.raises(ConfigError, match=reason) as error:
        read_config({"model_type": kind})
    assert "near it" not in str(error.value)


def test_a_text_model_that_has_a_text_config_is_told_so():
    """As MLC's copy of Ministral 3 has it; the folder itself says mistral3."""
    text = {"model_type": "ministral3", "hidden_size": 64, "num_hidden_layers": 2}
    with pytest.raises(ConfigError, match="is missing; expected a value. A ministral3 is a text model.* a text_config"):
        read_config({"model_type": "ministral3", "text_config": text})


def test_what_every_config_of_transformers_has_is_known():
    fields = transformers.PretrainedConfig().to_dict().keys()
    assert fields <= IRRELEVANT | DEFAULTS.keys()


def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    good.hugging_face(tmp_path)

    def denied(path: Path, *more: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    said = f"{tmp_path}: cannot be read: Permission denied"
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=said):
        patch.setattr(Path, "is_dir", denied)
        checkpoints.load(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: denied(tmp_path))
    assert end.value.code == f"error: {tmp_path}: Permission denied"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
def test_a_full_disk_is_one_line(monkeypatch):
    """Where text waits for standard output, it was that; else the system does not say what it was."""
    with open("/dev/full", "w") as full, monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "stdout", full)
        cli.main(lambda: print("met at the end"))
    assert end.value.code == "error: standard output: No space left on device"
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: Path("/dev/full").write_text("x") and None)
    assert end.value.code == "error: standard output or a file: No space left on device"


def test_suggestions():
    """What begins with the word comes first; of two words that are merely alike none is suggested."""
    options = ["--temperature", "--template", "--seed", "--steps", "--shard-tokens", "--prompts"]
    for typed, expected in (("--temp", "--temperature or --template"), ("--step", "--steps"), ("--promts", "--prompts"),
                            ("--shards", "--shard-tokens")):
        assert did_you_mean(typed, options) == f"; did you mean {expected}?"
    assert did_you_mean("--serve", options) == did_you_mean("/nope", ["/undo", "/save"]) == ""


def test_a_warning_is_one_line_of_a_command(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        cli.main(lambda: warnings.warn("passed over: x", stacklevel=2))
    assert capsys.readouterr().err == "warning: passed over: x\n"


def test_a_reader_of_pickles_still_reads_weights_that_hold_such_words(tmp_path):
    """A word of another program's that is a tensor's name does not make a sound file foreign."""
    good.pickled(tmp_path)
    tensors = good.tensors() | {"iter_num": torch.ones(1), "model_args": torch.ones(1)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert open_source(tmp_path, ["iter_num", "model_args"], allow_pickle=True).steps
