"""Links that the user or the hub's client made are followed, to regular files that hold what they should; names inside
an index never leave the folder."""

import json
import os
import shutil

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.file_download import _create_symlink, repo_folder_name
from huggingface_hub.utils._shared_blobs import shared_blob_path
from safetensors.torch import load_file

import checkpoints
from checkpoints.inspect import look
from checkpoints.source import open_source
from nanollm.errors import CheckpointError
from tests.fixtures import FIXTURES
from tests.oracles import difference, reference_logits, tokens, write
from tests.test_convert import meta_folder

FIXTURE = FIXTURES["llama-3"]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Llama in shards, as transformers writes it, and its logits."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    model = write(FIXTURE, folder, max_shard_size="60KB")
    return folder, reference_logits(FIXTURE, model, tokens(FIXTURE))


def need_the_model(folder, plain):
    assert difference(checkpoints.load(folder)(tokens(FIXTURE)), plain[1]) < 1e-5
    assert look(folder).reason is None


def cached(cache, plain, below="", shared=True):
    """The cache of huggingface_hub after a download, made by its own functions: blobs that Xet files share lie in
    <cache>/blobs, and the repository's own blobs/ has links to them."""
    storage = cache / repo_folder_name(repo_id="owner/name", repo_type="model")
    for number, path in enumerate(sorted(plain[0].iterdir())):
        blob, etag = storage / "blobs" / f"etag{number}", f"{number:02x}" * 32
        blob.parent.mkdir(parents=True, exist_ok=True)
        if shared and path.suffix == ".safetensors":
            store = shared_blob_path(cache, etag)                       # <cache>/blobs/xx/<hash>
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, store)
            _create_symlink(str(store), str(blob))
        else:
            shutil.copyfile(path, blob)
        pointer = storage / "snapshots" / REVISION / below / path.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        _create_symlink(str(blob), str(pointer))
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(REVISION)
    return storage / "snapshots" / REVISION / below


@pytest.mark.parametrize("shared", [False, True])
def test_the_cache_of_the_hub(plain, tmp_path, shared, monkeypatch):
    """By its folder, and offline by its name, which huggingface_hub itself resolves."""
    snapshot = cached(tmp_path, plain, shared=shared)
    need_the_model(snapshot, plain)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot_download("owner/name", local_files_only=True, allow_patterns=[]) == str(snapshot)
    assert difference(checkpoints.load("owner/name")(tokens(FIXTURE)), plain[1]) < 1e-5
    assert checkpoints.config("owner/name") == checkpoints.config(snapshot)


def test_blobs_that_are_a_link_and_a_folder_in_the_snapshot(plain, tmp_path):
    snapshot = cached(tmp_path / "cache", plain, below="original")
    blobs, elsewhere = snapshot.parents[2] / "blobs", tmp_path / "cache" / "elsewhere" / "blobs"
    elsewhere.parent.mkdir()
    blobs.rename(elsewhere)
    blobs.symlink_to(elsewhere)
    need_the_model(snapshot, plain)


def test_shards_on_another_disk(plain, tmp_path):
    folder = shutil.copytree(plain[0], tmp_path / "model")
    (tmp_path / "disk").mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(tmp_path / "disk" / path.name)
        path.symlink_to(tmp_path / "disk" / path.name)
    need_the_model(folder, plain)
    (tmp_path / "model-link").symlink_to(folder)
    need_the_model(tmp_path / "model-link", plain)
    (folder / "config.json").rename(tmp_path / "disk" / "config.json")
    (folder / "config.json").symlink_to("../disk/config.json")
    need_the_model(folder, plain)


def test_a_rank_of_meta_that_is_a_link(tmp_path):
    fixture, model, _ = meta_folder("llama-2-70b", tmp_path, ranks=2)
    far = tmp_path / "far.pth"
    (tmp_path / "meta/consolidated.01.pth").rename(far)
    (tmp_path / "meta/consolidated.01.pth").symlink_to(far)
    ours = open_source(tmp_path / "meta", allow_pickle=True).fill(None)
    x = tokens(fixture)
    assert difference(ours(x), reference_logits(fixture, model, x)) < 1e-5


BAD = {
    "nothing": (lambda path: path.symlink_to("nowhere"), "a link to nowhere, where there is nothing"),
    "a loop": (lambda path: path.symlink_to(path.name), "a link that leads back to itself"),
    "a folder": (lambda path: path.symlink_to("."), "a link to a folder, where a file is expected"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a link to a device, where a file is expected"),
    "a pipe": (lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to("pipe")),
               "a link to a pipe, where a file is expected"),
    "text": (lambda path: path.symlink_to("config.json"), "not safetensors|header"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("which", ["shard", "single"])
def test_what_does_not_lead_to_weights(name, which, plain, tmp_path):
    harm, cause = BAD[name]
    folder = shutil.copytree(plain[0], tmp_path / "model")
    if which == "single":
        shards = list(folder.glob("model*"))
        for path in shards:
            path.unlink()
        path = folder / "model.safetensors"
    else:
        path = next(folder.glob("model-00002*"))
        path.unlink()
    harm(path)
    with pytest.raises(CheckpointError, match=f"{path.name}.*({cause})") as error:
        checkpoints.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", ["../outside.safetensors", "/etc/passwd", "below/model.safetensors", ".."])
def test_names_inside_an_index_stay_in_the_folder(named, plain, tmp_path):
    folder = shutil.copytree(plain[0], tmp_path / "model")
    shutil.copyfile(next(folder.glob("model-00001*")), tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = next(iter(load_file(tmp_path / "outside.safetensors")))
    values["weight_map"][first] = named
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="plain file name ending in .safetensors expected"):
        checkpoints.load(folder)
