"""What is fetched of a repository on the hub: the files that its index names, or that its layout has, and no code. The
hub is a fake one; the lists of files are those of published repositories."""

import json
import shutil
from types import SimpleNamespace

import pytest

import checkpoints
from checkpoints.layouts import hub
from nanollm.errors import CheckpointError
from tests.fixtures import FIXTURES
from tests.oracles import write


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(files, index): a hub with these files. `fetched` are the files that were asked for."""
    def start(files, index=None, offline=False):
        asked = SimpleNamespace(fetched=None, folder=tmp_path)
        shards = {f"t{number}": name for number, name in enumerate(index or [])}

        def model_info(self, name):
            if offline:
                raise ConnectionError("offline mode is enabled\nmore")
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=one) for one in files])

        def download(name, file):
            assert file.endswith(".index.json") and not offline
            (tmp_path / file).write_text(json.dumps({"weight_map": shards}))
            return str(tmp_path / file)

        def snapshot(name, allow_patterns, local_files_only=False):
            asked.name = name
            if local_files_only:
                assert allow_patterns == []
                if not files:
                    raise FileNotFoundError("nothing is cached")
            asked.fetched = allow_patterns
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        return asked
    return start


TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
CODE = ["README.md", "modeling_x.py", "configuration_x.py", "pytorch_model.py", "flax_model.msgpack", "onnx/model.onnx"]
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def numbered(pattern, count):
    return [pattern.format(number, count) for number in range(1, count + 1)]


SHARDED = {  # the shards' names in published repositories
    "usual": numbered("model-{:05d}-of-{:05d}.safetensors", 4),
    "bloom": numbered("model_{:05d}-of-{:05d}.safetensors", 72),
    "named twice": numbered("model.safetensors-{:05d}-of-{:05d}.safetensors", 3),
    "pytorch_model": numbered("pytorch_model-{:05d}-of-{:05d}.safetensors", 2),
    "ft-model": numbered("ft-model-{:05d}-of-{:05d}.safetensors", 3),
}


@pytest.mark.parametrize("shards", SHARDED)
def test_the_index_says_which_shards(fake, shards):
    named = SHARDED[shards]
    other = ["consolidated.safetensors", "params.json", "model.gguf", "pytorch_model.bin", "adapter.safetensors"]
    asked = fake([*CODE, "config.json", INDEX, *named, *TOKENIZER, *other], named)
    assert hub.local_folder("owner/name-1.5") == asked.folder and asked.name == "owner/name-1.5"
    assert set(asked.fetched) == {"config.json", "params.json", INDEX, *named, *TOKENIZER}


def test_a_single_file_and_what_belongs_to_it(fake):
    more = ["additional_chat_templates/tool_use.jinja", "chat_template.jinja", "qwen.tiktoken", "merges.txt"]
    asked = fake([*CODE, "config.json", "model.safetensors", *TOKENIZER, *more, "below/x.tiktoken", "model.fp16.bin"])
    hub.local_path("o/n")
    assert set(asked.fetched) == {"config.json", "model.safetensors", *TOKENIZER, *more}


def test_pickles_only_where_they_are_allowed(fake):
    named = numbered("pytorch_model_{:05d}-of-{:05d}.bin", 3)
    asked = fake(["config.json", BIN_INDEX, *named], named)
    with pytest.raises(CheckpointError, match=r"o/n: only pickled weights \(pytorch_model.bin.index.json\)"):
        hub.local_path("o/n")
    assert asked.fetched is None
    hub.local_path("o/n", allow_pickle=True)
    assert set(asked.fetched) == {"config.json", BIN_INDEX, *named}
    asked = fake(["config.json", "pytorch_model.bin"])
    hub.local_path("o/n", allow_pickle=True)
    assert set(asked.fetched) == {"config.json", "pytorch_model.bin"}


def test_an_index_that_leads_astray(fake):
    asked = fake(["config.json", INDEX, "model-1.safetensors", "evil.py"], ["model-1.safetensors", "evil.py", "../x"])
    hub.local_path("o/n")
    assert set(asked.fetched) == {"config.json", INDEX, "model-1.safetensors"}


def test_the_layouts_of_mistral_and_meta(fake):
    asked = fake(["params.json", "consolidated.safetensors", "tekken.json", "README.md"])
    hub.local_path("o/n")
    assert set(asked.fetched) == {"params.json", "consolidated.safetensors", "tekken.json"}
    named = numbered("consolidated-{:05d}-of-{:05d}.safetensors", 3)
    index = "consolidated.safetensors.index.json"
    asked = fake(["params.json", index, *named], named)
    hub.local_path("o/n")
    assert set(asked.fetched) == {"params.json", index, *named}
    asked = fake(["params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"])
    with pytest.raises(CheckpointError, match="only pickled weights"):
        hub.local_path("o/n")
    hub.local_path("o/n", allow_pickle=True)
    assert set(asked.fetched) == {"params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"}


def test_gguf(fake):
    asked = fake(["README.md", "x-Q4_K_M.gguf"])
    assert hub.local_path("o/n") == asked.folder / "x-Q4_K_M.gguf" and asked.fetched == ["x-Q4_K_M.gguf"]
    asked = fake(["x-Q4_K_M.gguf", "x-Q8_0.gguf", *(pieces := numbered("big/x-{:05d}-of-{:05d}.gguf", 3))])
    with pytest.raises(CheckpointError, match="o/n: 3 GGUF files, each a model: say which, as o/n/.*x-Q8_0.gguf"):
        hub.local_path("o/n")
    assert hub.local_path("o/n/x-Q8_0.gguf") == asked.folder / "x-Q8_0.gguf" and asked.fetched == ["x-Q8_0.gguf"]
    assert hub.local_path(f"o/n/{pieces[0]}") == asked.folder / pieces[0] and asked.fetched == pieces
    with pytest.raises(CheckpointError, match="o/n: no x-Q2_K.gguf; there are big/x-00001-of-00003.gguf, x-Q4_K_M"):
        hub.local_path("o/n/x-Q2_K.gguf")


def test_no_weights_that_are_read(fake):
    fake(["config.json", "rust_model.ot", "weights.safetensors", "model.fp16.safetensors"])
    with pytest.raises(CheckpointError, match="o/n: no weights that are read; .*there are weights.safetensors"):
        hub.local_path("o/n")


def test_a_config_alone(fake):
    asked = fake(["config.json", "model.safetensors"])
    hub.local_path("o/n", weights=False)
    assert asked.fetched == ["config.json"]


def test_without_a_network(fake, tmp_path):
    """What an earlier call has fetched is used; where there is nothing, the first reason is given in one line."""
    model = write(FIXTURES["llama-3"], tmp_path / "written")
    files = [path.name for path in (tmp_path / "written").iterdir()]
    for name in files:
        shutil.move(tmp_path / "written" / name, tmp_path / name)
    (tmp_path / "written").rmdir()
    fake(files, offline=True)
    assert checkpoints.load("owner/name").config.dim == model.config.hidden_size
    fake([], offline=True)
    with pytest.raises(CheckpointError, match="owner/name: no such folder, and the hub does not .* mode is enabled$"):
        hub.local_folder("owner/name")
    (tmp_path / "model.safetensors").unlink()
    fake(["x"], offline=True)
    with pytest.raises(CheckpointError, match=r"\(the hub: offline mode is enabled\): no weights that are read"):
        hub.local_folder("owner/name")


def test_names_and_paths(fake, tmp_path, monkeypatch):
    fake(["config.json"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.local_folder(tmp_path) == tmp_path == hub.local_path("~")
    (tmp_path / "model").mkdir()
    assert hub.local_path("~/model") == tmp_path / "model"
    for name in ("models/of/mine", "name", "../x", "~nobody-of-this-name/x", "a" * 300):
        cause = "no such folder or file; .* has|no such folder, and not a hub name|File name too long"
        with pytest.raises(CheckpointError, match=cause):
            hub.local_folder(name)
