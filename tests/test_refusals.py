"""A folder that is not a whole, sound model is refused before any memory is taken for it; what may be passed over,
and what is untied.

The many ways in which a folder can be bad are in tests/hostile/; here are those that a caller has a word in."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.storage import files
from nanollm.errors import CheckpointError, ConfigError, InputError, NanollmError
from tests.clock import within
from tests.fixtures import FIXTURES
from tests.oracles import write


@pytest.fixture(scope="module", params=["llama-3", "mixtral-8x22b", "mamba-130m"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write(FIXTURES[request.param], folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


@pytest.fixture
def no_memory(monkeypatch):
    """From here on, whoever takes memory for a parameter or reads a tensor fails the test."""
    real = torch.empty

    def refuse(*args, **more):
        pytest.fail("memory was taken before the plan held")

    monkeypatch.setattr(
        torch, "empty", lambda *args, **more: refuse() if more.get("device") is not None else real(*args, **more)
    )  # on the meta device by context
    monkeypatch.setattr(files.Stored, "read_run", refuse)


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(folder, change) -> str:
    """Apply `change(tensors, name)` to the largest tensor; return its name."""
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors, key=lambda one: tensors[one].numel())
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return name


def expect_refusal(folder, cause: str, kind=CheckpointError, **more) -> str:
    def refused() -> str:
        with pytest.raises(kind, match=cause) as error:
            checkpoints.load(folder, **more)
        return str(error.value)

    return within(1, refused, time.process_time)


def test_the_folder_itself_loads(folder):
    model = checkpoints.load(folder)
    assert not model.training and model.origin.folder == folder
    assert not list(model.buffers()) and not any(parameter.is_meta for parameter in model.parameters())


def test_unexpected_tensor_and_then_ignored(folder, no_memory, monkeypatch):
    edit_tensors(folder, lambda tensors, name: tensors.update({"extra.one": torch.ones(2), "extra.two": torch.ones(2)}))
    expect_refusal(folder, r"2 unexpected .*:\n    extra.one\n    extra.two")
    text = expect_refusal(folder, r"1 unexpected .*:\n    extra.two", ignore=["extra.one"])  # exactly that one passes
    assert "extra.one" not in text
    monkeypatch.undo()
    checkpoints.load(folder, ignore=["extra.one", "extra.two"])


def test_ignore_fills_no_hole(folder, no_memory):
    name = edit_tensors(folder, lambda tensors, name: tensors.pop(name))
    expect_refusal(folder, f"1 missing:\n    {name}", ignore=[name])


def test_everything_at_once(folder, no_memory):
    def change(tensors, name):
        tensors["extra"] = tensors.pop(name)
        other = next(one for one in tensors if one.endswith("norm.weight"))
        tensors[other] = torch.ones(3, dtype=torch.int32)
    edit_tensors(folder, change)
    text = expect_refusal(folder, "1 missing")
    assert all(kind in text for kind in ("1 missing", "1 unexpected", "1 of another shape", "1 of another type"))


def test_ignore_takes_whole_names(folder, no_memory):
    edit_config(folder, clip=1)
    expect_refusal(
        folder, "clip = 1", ConfigError, ignore="clip_qkv"
    )  # a lone string is one name, not a set of letters
    expect_refusal(folder, "clip = 1", ConfigError, ignore=["clip*"])


def test_unreadable_file(folder, monkeypatch):
    def denied(path, *more):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(files, "open", denied, raising=False)
    expect_refusal(folder, "config.json: cannot be read: Permission denied")


def test_unread_key_and_then_ignored(folder, no_memory, monkeypatch):
    edit_config(folder, clip_qkv=8.0, mystery="b c")
    expect_refusal(folder, r"clip_qkv = 8.0, mystery = 'b c'.*: --ignore clip_qkv --ignore mystery$", ConfigError)
    assert "clip_qkv" not in expect_refusal(folder, "mystery = 'b c'", ConfigError, ignore=["clip_qkv"])
    monkeypatch.undo()
    checkpoints.load(folder, ignore=["clip_qkv", "mystery"])


SIZES = [
    ("num_hidden_layers", 4, "missing"), ("num_hidden_layers", 2, "unexpected"),
    ("num_hidden_layers", 10**9, "from 1 to"), ("num_hidden_layers", 0, "from 1 to"),
    ("vocab_size", 132, "of another shape"), ("vocab_size", 2**31, "of another shape"),
    ("vocab_size", 10**12, "from 1 to"), ("hidden_size", 80, "of another shape"), ("hidden_size", -1, "from 1 to"),
]


@pytest.mark.parametrize("key, value, cause", SIZES)
def test_sizes_that_the_files_do_not_have(folder, key, value, cause, no_memory):
    edit_config(folder, **{key: value})
    if "mamba" in (folder / "config.json").read_text():
        edit_config(folder, intermediate_size=...)       # which would contradict it first
    expect_refusal(folder, cause, NanollmError)


def test_sizes_that_overflow(folder, no_memory):
    """A tensor that 64 bits cannot count, even on the meta device."""
    edit_config(folder, vocab_size=2**31, hidden_size=2**31 - 64)
    if "mamba" in (folder / "config.json").read_text():
        edit_config(folder, intermediate_size=...)
    expect_refusal(folder, "a tensor beyond any memory", ConfigError)


def test_a_value_that_the_wanted_dtype_cannot_hold(folder):
    def change(tensors, name):
        tensors[name].view(-1)[0] = 70_000.0
    name = edit_tensors(folder, change)
    expect_refusal(folder, f"{name} holds a NaN or an infinity as float16", dtype=torch.float16)
    checkpoints.load(folder)


def test_a_dtype_that_weights_cannot_have(folder, no_memory):
    expect_refusal(folder, "dtype is torch.int8; expected one of float32, bfloat16", InputError, dtype=torch.int8)


def test_a_missing_head(folder):
    """Tied: the embedding is the head. Untied: transformers would draw a random one; here it is missing."""
    edit_tensors(folder, lambda tensors, _: tensors.pop("lm_head.weight", None))
    edit_config(folder, tie_word_embeddings=False)
    expect_refusal(folder, "1 missing:\n    lm_head.weight")
    edit_config(folder, tie_word_embeddings=True)
    model = checkpoints.load(folder)
    assert model.head.weight is model.embed.weight


def test_a_head_stored_although_tied(folder):
    """A copy of the embedding is passed over. Another tensor is kept, as transformers 5 does, and the model is
    untied."""
    embed = next(name for name in load_file(folder / "model.safetensors") if "embed" in name)
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors, _: tensors.update({"lm_head.weight": tensors[embed].clone()}))
    model = checkpoints.load(folder)
    assert model.head.weight is model.embed.weight
    other = torch.randn(131, load_file(folder / "model.safetensors")[embed].shape[1])
    edit_tensors(folder, lambda tensors, _: tensors.update({"lm_head.weight": other}))
    with pytest.warns(UserWarning, match="lm_head.weight is not the embedding"):
        model = checkpoints.load(folder)
    assert torch.equal(model.head.weight, other) and not model.config.tied
    checkpoints.save(model, folder / "out")
    assert json.loads((folder / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(checkpoints.load(folder / "out").head.weight, other)


def test_save_refuses(folder, tmp_path):
    model = checkpoints.load(folder)
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        checkpoints.save(model, folder)
    model.extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match="1 parameter that its config does not describe, the first is extra"):
        checkpoints.save(model, tmp_path / "out")
    del model.extra
    with torch.no_grad():
        model.embed.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="embed.*weight holds a NaN"):
        checkpoints.save(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
