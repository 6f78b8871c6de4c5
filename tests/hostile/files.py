"""Safetensors files that are damaged, lie, or are something else; the same files with bytes changed at random;
indices that lead astray."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import checkpoints
from tests.hostile import good
from tests.hostile.good import Case, Group, Harm, edited, entry, gone, put, raw, taken_apart

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"


def of(*content: Any, **more: Any) -> Harm:
    """model.safetensors of this header and data."""
    return put(SAFE, raw(*content, **more))


def rewritten(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Harm:
    """The good file with another header, and other data."""
    def harm(folder: Path) -> None:
        (folder / SAFE).write_bytes(raw(*change(*taken_apart((folder / SAFE).read_bytes()))))
    return harm


def beside(name: str, shape: list[int], data: bytes = b"", dtype: str = "F32", **more: Any) -> Harm:
    """One tensor more, at the end of the file."""
    return rewritten(
        lambda header, old: (
            header | {name: {"dtype": dtype, "shape": shape, "data_offsets": [len(old), len(old) + len(data)]} | more},
            old + data,
        )
    )


def unsorted(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
    return dict(reversed(header.items())), data


def odd(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
    text = json.dumps(header).encode()
    return text + b" " * (1 - len(text) % 2), data


def of_another_kind(make: Callable[[Path], Any]) -> Harm:
    """Something that is no file in its place."""
    def harm(folder: Path) -> None:
        (folder / SAFE).unlink()
        make(folder / SAFE)
    return harm


def longer(folder: Path) -> None:
    """A terabyte, of which nothing is on the disk."""
    os.truncate(folder / SAFE, 1 << 40)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 499723\n"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"         # old folders have it; it is no weight, and passed over
FILES: dict[str, Case] = {
    # something else
    "empty": (put(SAFE, b""), "model.safetensors: empty"),
    "seven bytes": (put(SAFE, b"1234567"), "truncated: 7 bytes"),
    "git-lfs pointer": (put(SAFE, POINTER), "not safetensors, but a git-lfs pointer"),
    "web page": (put(SAFE, "\n<!DOCTYPE html><html><body>401</body></html>"), "not safetensors, but a web page"),
    "web page without a doctype": (put(SAFE, "<html><body>Log in</body></html>"), "not safetensors, but a web page"),
    "zip": (put(SAFE, b"PK\x03\x04" + bytes(60)), "zip archive"),
    "pickle": (put(SAFE, b"\x80\x02}q\x00." + bytes(60)), "pickle"),
    "gguf": (put(SAFE, b"GGUF\x03\x00\x00\x00" + bytes(60)), "GGUF"),
    "JSON": (put(SAFE, '{"error": "Repository not found"}'), "not safetensors"),
    "zeros": (put(SAFE, bytes(4096)), "the header does not start with {"),
    "a folder": (of_another_kind(os.mkdir), "model.safetensors: a folder, where a file is expected"),
    "a pipe that nobody writes to": (of_another_kind(os.mkfifo), "model.safetensors: a pipe, where a file is"),
    "a link to itself": (of_another_kind(lambda path: path.symlink_to(path)), "a link that leads back to itself"),
    "a link to another kind of file": (
        of_another_kind(lambda path: path.symlink_to("config.json")), "not safetensors|header",
    ),
    "a link to a device": (
        of_another_kind(lambda path: path.symlink_to("/dev/zero")), "a link to a device, where a file is expected",
    ),
    # the length of the header
    "huge header": (of(b"{}", length=2**63), "too large"),
    "header past the end": (of(b"{}", length=1000), "truncated in the header"),
    "no header": (of(b"", bytes(100)), "does not start with {"),
    "header cut short": (lambda folder: os.truncate(folder / SAFE, 30), "truncated in the header"),
    "data cut short": (lambda folder: os.truncate(folder / SAFE, 3000), r"truncated: expected \d+ bytes, found 3000"),
    "longer than said": (rewritten(lambda header, data: (header, data + b"\0")), "bytes after the last tensor"),
    "a terabyte longer": (longer, "bytes after the last tensor"),
    # the header as text
    "header is a list": (of(b"[1, 2]"), "does not start with {"),
    "header is a text": (of(b'"a"'), "does not start with {"),
    "header of spaces": (of(b" " * 64), "does not start with {"),
    "header after a byte order mark": (of(b"\xef\xbb\xbf{}"), "does not start with {"),
    "header in UTF-16": (of('{"a": 1}'.encode("utf-16-le")), "not JSON"),
    "header is no JSON": (of(b'{"a": '), "not JSON"),
    "two headers": (of(b"{} {}"), "not JSON"),
    "header is not UTF-8": (of(b'{"\xff": 1}'), "not JSON"),
    "a number of 10000 digits": (of(b'{"a": ' + b"9" * 10_000 + b"}"), "not JSON"),
    "deeply nested": (of(b'{"a":' * 100_000), "nested too deeply"),
    "no tensors": (of(b"{}"), "no tensors in any file"),
    # entries
    "a name given twice": (of(b'{"a":1,"a":2}'), "'a' appears twice"),
    "a long name given twice": (of(b'{"%s":1,"%s":2}' % (b"a" * 500_000, b"a" * 500_000)), "appears twice"),
    "entry is a text": (of({"a": "F32"}), "a: dtype, shape and data_offsets"),
    "entry is null": (of({"a": None}), "a: dtype, shape and data_offsets"),
    "entry is NaN": (of(b'{"a": NaN}'), "a: dtype, shape and data_offsets"),
    "entry lacks the shape": (
        of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "a: dtype, shape and data_offsets",
    ),
    "entry has a fourth key": (of({"a": entry(0, 8) | {"x": 1}}, bytes(8)), "a: dtype, shape and data_offsets"),
    "header has another key": (
        rewritten(lambda header, data: (header | {"comment": "hello"}, data)),
        "comment: dtype, shape and data_offsets",
    ),
    "metadata of numbers": (of({"__metadata__": {"format": 1}}), "__metadata__"),
    "metadata is a list": (of({"__metadata__": ["pt"]}), "__metadata__"),
    "unknown dtype": (of({"a": entry(0, 8, [2], "F7")}, bytes(8)), "a: a dtype among"),
    "dtype in small letters": (of({"a": entry(0, 8, [2], "f32")}, bytes(8)), "a: a dtype among"),
    "dtype is a list": (of({"a": entry(0, 8, [2], ["F32"])}, bytes(8)), "a: a dtype among"),
    "shape lies": (of({"a": entry(0, 8, [3])}, bytes(8)), "a: offsets 12 bytes apart"),
    "shape beyond 64 bits": (of({"a": entry(0, 8, [2**40, 2**40])}, bytes(8)), "a: offsets .* bytes apart"),
    "negative shape": (of({"a": entry(0, 8, [-1, -2])}, bytes(8)), "a: a shape"),
    "shape of booleans": (of({"a": entry(0, 4, [True])}, bytes(4)), "a: a shape"),
    "shape of floats": (of({"a": entry(0, 8, [2.0])}, bytes(8)), "a: a shape"),
    "shape of ten thousand": (of({"a": entry(0, 8, [1] * 10_000)}, bytes(8)), "a: a shape"),
    "shape is a number": (of({"a": entry(0, 8, 2)}, bytes(8)), "a: a shape"),
    "one offset": (of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, bytes(8)), "a: two offsets"),
    "offsets are texts": (of({"a": entry("0", "8", [2])}, bytes(8)), "a: two offsets"),
    "offsets are floats": (of({"a": entry(0.0, 8.0, [2])}, bytes(8)), "a: two offsets"),
    "negative offset": (of({"a": entry(-8, 0, [2])}, bytes(8)), "a: two offsets"),
    "backwards": (of({"a": entry(8, 0, [2])}, bytes(8)), "a: offsets 8 bytes apart"),
    "out of range": (of({"a": entry(0, 2**60)}, bytes(8)), "truncated"),
    "overlap": (of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "b starts at byte .* inside the one before"),
    "two tensors in one place": (
        of({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "b starts at byte .* inside the one before",
    ),
    "gap": (of({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "b starts at byte .* gap"),
    "gap at the start": (of({"a": entry(4, 8)}, bytes(8)), "a starts at byte .* gap"),
    # sound files, in which there is something that the model has not
    "a tensor without a name": (beside("", [1], bytes(4)), "1 unexpected .*:\n    $"),
    "a tensor named like a path": (beside("../../x", [1], bytes(4)), "1 unexpected .*:\n    ../../x"),
    "a tensor with a name of a megabyte": (beside("x" * 1_000_000, [1], bytes(4)), "1 unexpected .*:\n    xxx"),
    "a name that clears the terminal": (beside("\x1b[2Jx", [1], bytes(4)), r"1 unexpected .*:\n    \\x1b\[2Jx"),
    "a name that is half a character": (beside("\ud800", [1], bytes(4)), r"1 unexpected .*:\n    \\ud800"),
    # legal
    "a tensor of no dimension": (beside(BUFFER, [], bytes(4)), None),
    "a tensor of no element": (beside(BUFFER, [0, 3]), None),
    "a tensor of no element, and of 2¹²⁴ rows": (beside(BUFFER, [2**62, 2**62, 0]), None),
    "a NaN in what is no weight": (beside(BUFFER, [1], b"\0\0\xc0\x7f"), None),
    "tensors in another order than their names": (rewritten(unsorted), None),
    "data at an odd place": (rewritten(odd), None),
    "no metadata": (
        rewritten(lambda header, data: ({key: value for key, value in header.items() if key != "__metadata__"}, data)),
        None,
    ),
}

LETTERS = b'0123456789-[]{}",:'


def mutated(seed: int, content: bytes, most: int = 20) -> bytes:
    """One to three places changed: a bit turned, a byte more, up to `most` bytes fewer, a character of JSON."""
    rng, bad = random.Random(seed), bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(bad))
        match rng.randrange(4):
            case 0:
                bad[place] ^= 1 << rng.randrange(8)
            case 1:
                bad.insert(place, rng.randrange(256))
            case 2:
                del bad[place : place + rng.randint(1, most)]
            case 3:
                bad[place] = rng.choice(LETTERS)
    return bytes(bad)


def mutations(root: Path, count: int) -> Iterator[tuple[str, Path]]:
    """A folder at a time, each with another damaged copy of one file."""
    folder = root / "model"
    folder.mkdir()
    good.hugging_face(folder)
    content = (folder / SAFE).read_bytes()
    for seed in range(count):
        (folder / SAFE).write_bytes(mutated(seed, content))
        yield f"seed {seed}", folder


# ---- indices

def index(weight_map: Any) -> Harm:
    return put(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


def places(**changes: Any) -> Harm:
    """The good weight_map, with tensors in other files; ... takes one out."""
    def change(values: dict[str, Any]) -> None:
        for name, file in changes.items():
            name = name.replace("__", ".")
            values["weight_map"].pop(name, None) if file is ... else values["weight_map"].update({name: file})
    return edited(INDEX, change)


def link(target: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / "link.safetensors").symlink_to(target)
        places(extra="link.safetensors")(folder)
    return harm


def twice(folder: Path, more: float = 1.0) -> None:
    """Both shards have the first tensor, the second one with other values."""
    name, tensor = next(iter(good.tensors().items()))
    good.weights(lambda found: found.update({name: tensor + more}), "model-2.safetensors")(folder)


def twice_the_same(folder: Path) -> None:
    twice(folder, 0.0)


def pipe_outside(folder: Path) -> None:
    """Whoever opens it waits for ever."""
    os.mkfifo(folder.parent / "pipe.safetensors")
    places(extra="../pipe.safetensors")(folder)


def swapped(values: dict[str, Any]) -> None:
    other = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": "model-1.safetensors"}
    values["weight_map"] = {name: other[file] for name, file in values["weight_map"].items()}


def whole_and_sharded(folder: Path) -> None:
    """The file of the whole model beside shards: it is the one that is read."""
    save_file(good.tensors(), folder / SAFE, {"format": "pt"})


PLAIN, HEAD = "plain file name", "lm_head__weight"
INDICES: dict[str, Case] = {
    "a file of the parent folder": (places(extra="../outside.safetensors"), PLAIN),
    "a pipe of the parent folder": (pipe_outside, PLAIN),
    "a file below": (places(extra="below/model-1.safetensors"), PLAIN),
    "an absolute path": (places(extra="/etc/passwd"), PLAIN),
    "a path of Windows": (places(extra="..\\outside.safetensors"), PLAIN),
    "a URL": (places(extra="https://example.org/model.safetensors"), PLAIN),
    "a name with a NUL": (places(extra="model\0.safetensors"), PLAIN),
    "a name with a newline": (places(extra="model-1.safetensors\n"), PLAIN),
    "no name": (places(extra=""), PLAIN),
    "a name of a megabyte": (places(extra="x" * 1_000_000), PLAIN),
    "a name too long for a file": (places(extra="x" * 5_000 + ".safetensors"), PLAIN),
    "another suffix": (places(extra="model-1.bin"), PLAIN),
    "a number": (places(extra=3), PLAIN),
    "null": (places(extra=None), PLAIN),
    "a link to a folder": (link("."), "link.safetensors: a link to a folder, where a file is expected"),
    "a link to another kind of file": (link("config.json"), "link.safetensors: (not safetensors|truncated)"),
    "a link to nothing": (link("nothing"), "link.safetensors: a link to nothing, where there is nothing"),
    "a shard that is missing": (places(extra="model-3.safetensors"), "model-3.safetensors: missing"),
    "a shard that was not downloaded": (
        put("model-2.safetensors", POINTER), "model-2.safetensors: not safetensors, but a git-lfs pointer",
    ),
    "a shard cut short": (
        lambda folder: os.truncate(folder / "model-2.safetensors", 2000), "model-2.safetensors: truncated",
    ),
    "a tensor absent from its shard": (
        places(extra="model-1.safetensors"), "not in the shard it names: 1 tensor;.*extra, in model-1",
    ),
    "tensors in the other shard": (edited(INDEX, swapped), "not in the shard it names: 21 tensors"),
    "two tensors of one name": (twice, "model.embed_tokens.weight is in two shards, .* with other values"),
    "a shard that it does not name": (
        edited(
            INDEX,
            lambda values: values.update(
                weight_map={name: file for name, file in values["weight_map"].items() if file == "model-1.safetensors"}
            ),
        ),
        "11 missing",
    ),
    "no weight_map": (put(INDEX, "{}"), "weight_map"),
    "an empty weight_map": (index({}), "weight_map"),
    "weight_map is a list": (index(["model-1.safetensors"]), "weight_map"),
    "weight_map is null": (index(None), "weight_map"),
    "a list": (put(INDEX, "[]"), "index.json: a JSON object expected, found list"),
    "empty": (put(INDEX, b""), "index.json: not JSON"),
    "git-lfs pointer": (put(INDEX, POINTER), "index.json: a git-lfs pointer"),
    "web page": (put(INDEX, "<html></html>"), "index.json: a web page"),
    "a tensor named twice": (put(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'), "'a' appears twice"),
    "deeply nested": (put(INDEX, '{"weight_map":' * 100_000), "nested too deeply"),
    "neither index nor weights": (gone(INDEX), "neither model.safetensors nor"),
    # legal
    "a total_size that is wrong": (edited(INDEX, lambda values: values.update(metadata={"total_size": 1})), None),
    "a tensor that it does not list": (places(**{HEAD: ...}), None),
    "the whole model beside the shards": (whole_and_sharded, None),
    "a tensor in two shards": (twice_the_same, None),
}

GROUPS = {
    "safetensors": Group("safetensors files", good.hugging_face, checkpoints.load, FILES, folder=True),
    "indices": Group("model.safetensors.index.json", good.sharded, checkpoints.load, INDICES, folder=True),
}
