"""Damaged and hostile files: each is refused, quickly, with its cause named. What is written is whole, or not there."""

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import files, hub, pickles, stream, writing
from nanollm.errors import CheckpointError, NanollmError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 3), "d": torch.tensor(7.0)}


def raw(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def write_folder(folder, tensors, shard_bytes) -> None:
    stored = writing.lay_out(folder, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, shard_bytes)
    for name, tensor in tensors.items():
        stream.write(stored[name], 0, tensor, name)


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    stored = files.read_header(tmp_path / "x.safetensors")
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        straight, cast = torch.empty_like(tensor), torch.empty_like(tensor, dtype=torch.float64)
        stream.read(stored[name], 0, straight, name)
        stream.read(stored[name], 0, cast, name)
        assert torch.equal(straight, tensor) and torch.equal(cast, tensor.double())


def test_writes_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "theirs", {"format": "pt"})
    write_folder(tmp_path, TENSORS, 10**9)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_and_their_index(tmp_path):
    tensors = {f"t{n}": torch.full((n + 1,), float(n)) for n in range(8)}
    write_folder(tmp_path, tensors, 40)
    index = json.loads((tmp_path / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(range(1, 9)) and index["weight_map"].keys() == tensors.keys()
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)] and len(shards) == 5
    found = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert files.read_folder(tmp_path).keys() == tensors.keys()


HOSTILE = {
    "empty": (b"", "empty"),
    "seven bytes": (b"1234567", "truncated: 7 bytes"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
    "web page": (b"\n<!DOCTYPE html><html><body>401</body></html>", "web page"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(60), "GGUF"),
    "huge header": (raw(b"{}", length=2**63), "too large"),
    "cut in the header": (raw({"a": entry(0, 8)}, bytes(8))[:30], "truncated in the header"),
    "cut in the data": (raw({"a": entry(0, 8)}, bytes(5)), r"truncated: expected \d+ bytes, found \d+"),
    "longer than said": (raw({"a": entry(0, 8)}, bytes(9)), "bytes after the last tensor"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "b starts at byte .* inside the one before"),
    "gap": (raw({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "b starts at byte .* gap"),
    "backwards": (raw({"a": entry(8, 0, [2])}, bytes(8)), "a: offsets 8 bytes apart"),
    "negative": (raw({"a": entry(-8, 0, [2])}, bytes(8)), "a: two offsets"),
    "out of range": (raw({"a": entry(0, 2**60)}, bytes(8)), "truncated"),
    "duplicate key": (raw(b'{"a":1,"a":2}'), "'a' appears twice"),
    "unknown dtype": (raw({"a": entry(0, 8, [2], "F7")}, bytes(8)), "a: a dtype among"),
    "dtype is a list": (raw({"a": entry(0, 8, [2], ["F32"])}, bytes(8)), "a: a dtype among"),
    "shape lies": (raw({"a": entry(0, 8, [3])}, bytes(8)), "a: offsets 12 bytes apart"),
    "negative shape": (raw({"a": entry(0, 8, [-1, -2])}, bytes(8)), "a: a shape"),
    "shape of booleans": (raw({"a": entry(0, 4, [True])}, bytes(4)), "a: a shape"),
    "shape of floats": (raw({"a": entry(0, 8, [2.0])}, bytes(8)), "a: a shape"),
    "shape of ten thousand": (raw({"a": entry(0, 8, [1] * 10_000)}, bytes(8)), "a: a shape"),
    "extra key": (raw({"a": entry(0, 8) | {"x": 1}}, bytes(8)), "a: dtype, shape and data_offsets"),
    "entry is a string": (raw({"a": "F32"}), "a: dtype, shape and data_offsets"),
    "header is a list": (raw(b"[1, 2]"), "does not start with {"),
    "header is no JSON": (raw(b'{"a": '), "not JSON"),
    "header is not UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "a number of 10000 digits": (raw(b'{"a": ' + b"9" * 10_000 + b"}"), "not JSON"),
    "deeply nested": (raw(b'{"a":' * 100_000), "nested too deeply"),
    "metadata of numbers": (raw({"__metadata__": {"format": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, tmp_path):
    content, cause = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=cause) as error:
        files.read_header(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


def test_mutated_files_are_refused_or_read(tmp_path):
    """500 damaged copies: a NanollmError, or all tensors of the size that the header says. Never anything else."""
    rng = random.Random(0)
    save_file(TENSORS, tmp_path / "good")
    good, path, refused = (tmp_path / "good").read_bytes(), tmp_path / "bad", 0
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(bad))
            match rng.randrange(4):
                case 0: bad[place] ^= 1 << rng.randrange(8)
                case 1: bad.insert(place, rng.randrange(256))
                case 2: del bad[place : place + rng.randint(1, 20)]
                case 3: bad[place] = rng.choice(b'0123456789-[]{}",:')
        path.write_bytes(bad)
        try:
            for stored in files.read_header(path).values():
                stored.read_run(0, torch.empty(stored.shape, dtype=stored.dtype))
        except NanollmError:
            refused += 1
    assert 300 < refused < 500


def test_a_file_cut_while_it_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    stored = files.read_header(tmp_path / "x")
    os.truncate(tmp_path / "x", stored["a"].start + 4)
    with pytest.raises(CheckpointError, match="truncated while it was read: expected 24 bytes, found 4"):
        stored["a"].read_run(0, torch.empty(2, 3))


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-2.safetensors")
    save_file({"outside": torch.ones(2)}, tmp_path / "outside.safetensors")
    return folder


GOOD = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
INDEXES = {
    "parent folder": ({"a": "../outside.safetensors"}, "plain file name"),
    "absolute": ({"a": "/etc/passwd"}, "plain file name"),
    "not safetensors": ({"a": "model-1.bin"}, "plain file name"),
    "nul": ({"a": "model\0.safetensors"}, "plain file name"),
    "a number": ({"a": 3}, "plain file name"),
    "missing shard": (GOOD | {"c": "model-3.safetensors"}, "model-3.safetensors: missing"),
    "absent from its shard": (GOOD | {"c": "model-1.safetensors"}, "1 tensors are not in the shard.*c, in model-1"),
    "in the other shard": ({"a": "model-2.safetensors", "b": "model-1.safetensors"}, "2 tensors are not in the shard"),
    "empty": ({}, "weight_map"),
    "a list": (["a"], "weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_index(case, sharded):
    weight_map, cause = INDEXES[case]
    (sharded / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=cause):
        files.read_folder(sharded)


def test_index_good_and_in_other_ways_bad(sharded):
    index = sharded / files.INDEX
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": GOOD}))      # no one relies on total_size
    assert files.read_folder(sharded).keys() == {"a", "b"}
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, sharded / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="a is in two shards"):
        files.read_folder(sharded)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON object expected, found list"):
        files.read_folder(sharded)


def test_links_stay_inside(sharded):
    (sharded / files.INDEX).write_text(json.dumps({"weight_map": {"outside": "link.safetensors"}}))
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        files.read_folder(sharded)


def test_links_of_the_hub_cache_are_read(tmp_path):
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "0abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "sha")
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha")
    assert files.read_folder(snapshot).keys() == {"a"}


def test_other_layouts_are_not_guessed_at(tmp_path):
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        files.read_folder(tmp_path)
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="consolidated.safetensors follow another layout"):
        files.read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="only pickled weights .*convert SRC DST --allow-pickle"):
        pickles.read_folder(tmp_path, allowed=False)


def test_equal_bytes(tmp_path):
    save_file({"a": torch.ones(9), "b": torch.ones(9), "c": torch.tensor([1.0] * 8 + [2.0]), "d": torch.ones(3, 3)}, tmp_path / "x")
    stored = files.read_header(tmp_path / "x")
    assert [files.equal_bytes(stored["a"], stored[name], most=5) for name in "abcd"] == [True, True, False, False]


def test_hub_names(tmp_path, monkeypatch):
    assert hub.local_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="no such folder, and not a hub name"):
        hub.local_folder("models/of/mine")
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **more: asked.update(more, name=name) or str(tmp_path))
    assert hub.local_folder("owner/name-1.5") == tmp_path
    assert asked["name"] == "owner/name-1.5" and not any("bin" in one or one == "*.safetensors" for one in asked["allow_patterns"])

    def offline(name, **more):
        raise ConnectionError("offline mode is enabled\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="owner/name: no such folder, and the hub does not .* offline mode is enabled$"):
        hub.local_folder("owner/name")


# ---- writing

def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="nothing is overwritten"), writing.new_folder(tmp_path / name):
            pytest.fail("the block ran")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/er"):
        with writing.new_folder(tmp_path / name) as draft:
            (draft / "x").write_text("1")
        assert [path.name for path in (tmp_path / name).iterdir()] == ["x"]
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty", "file", "full", "new"]


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("failure, seen", [(KeyboardInterrupt(), KeyboardInterrupt), (FULL, CheckpointError)])
def test_a_failure_leaves_nothing(tmp_path, failure, seen):
    with pytest.raises(seen), writing.new_folder(tmp_path / "out") as draft:
        (draft / "half").write_text("x")
        raise failure
    assert os.listdir(tmp_path) == []
