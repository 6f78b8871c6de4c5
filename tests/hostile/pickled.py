"""Pickles that run code, lie about their tensors, fill the memory, or are damaged. None is run by anything but our
own machine."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import checkpoints
from tests.hostile import good
from tests.hostile.files import POINTER, mutated
from tests.hostile.good import Case, Group, Harm, put

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MARK = "evil"                                    # what evil code would leave, beside the folder


# ---- programs, an instruction at a time

def program(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    digits = pickle.encode_long(value)
    return b"\x8a" + bytes([len(digits)]) + digits


def function(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def shape(*sizes: int) -> bytes:
    return b"(" + b"".join(map(number, sizes)) + b"t"


def storage(key: str = "0", count: int = 128, kind: str = "FloatStorage", device: str = "cpu") -> bytes:
    return b"(" + text("storage") + function("torch", kind) + text(key) + text(device) + number(count) + b"tQ"


def tensor(of: bytes = storage(), first: int = 0, sizes: bytes = shape(16, 8), strides: bytes = shape(8, 1)) -> bytes:
    return (function("torch._utils", "_rebuild_tensor_v2") + b"(" + of + number(first) + sizes + strides + b"\x89"
            + function("collections", "OrderedDict") + b")RtR")


def named(value: bytes, name: bytes = text("w")) -> bytes:
    """{"w": value}"""
    return program(b"}" + name + value + b"s")


def doubled(times: int) -> bytes:
    """A tuple of two tuples of two tuples …, each made once: 2 ** times leaves. It is left in the memo, under its
    number."""
    return b")q\0" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(times))


# ---- archives

def rebuilt(change: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> Harm:
    """The archive with other entries, by their names inside it."""
    def harm(folder: Path) -> None:
        with zipfile.ZipFile(folder / BIN) as archive:
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        change(entries)
        with zipfile.ZipFile(folder / BIN, "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(f"archive/{name}", content)
    return harm


def running(code: bytes) -> Harm:
    """The archive with another program."""
    return rebuilt(lambda entries: entries.update({"data.pkl": code}))


def saved(value: Callable[[dict[str, torch.Tensor]], Any]) -> Harm:
    """What torch.save writes of something else."""
    return lambda folder: torch.save(value(good.tensors()), folder / BIN)


class Calls:
    """Pickled, it calls a function when it is read."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.reduced = called, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def evil(called: Any, *arguments: Any, protocol: int = 2) -> Harm:
    """A sound file but for one value. "MARK" in an argument is where the mark goes that says that it ran."""
    def harm(folder: Path) -> None:
        said = [one.replace("MARK", str(folder.parent / MARK)) if isinstance(one, str) else one for one in arguments]
        torch.save(good.tensors() | {"evil": Calls(called, *said)}, folder / BIN, pickle_protocol=protocol)
    return harm


def bare(folder: Path) -> None:
    """No archive at all."""
    (folder / BIN).write_bytes(pickle.dumps(Calls(os.system, f"touch {folder.parent / MARK}")))


def legacy(folder: Path) -> None:
    torch.save(good.tensors(), folder / BIN, _use_new_zipfile_serialization=False)


def first_twice(folder: Path) -> None:
    """Two entries of one name: readers differ in which they take."""
    with zipfile.ZipFile(folder / BIN, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        archive.filename, archive.NameToInfo = None, {}              # or it warns
        archive.writestr(name, named(tensor()))


def cut(share: float) -> Harm:
    return lambda folder: os.truncate(folder / BIN, int((folder / BIN).stat().st_size * share))


def of_three(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A view with strides of its own: every second column."""
    name = "model.layers.0.self_attn.q_proj.weight"
    return tensors | {name: torch.ones(8, 16)[:, ::2]}


CALLS = "the pickle calls {}, which is not how tensors are stored; not read"
DAMAGED, NOT_ALL, BY_NAME = "data.pkl is damaged", "bytes are not all in the file", "values by name expected"
ALLOWED: dict[str, Case] = {
    # programs that call what they should not
    "os.system": (evil(os.system, "touch MARK"), CALLS.format("posix.system")),
    "os.system, by protocol 4": (
        evil(os.system, "touch MARK", protocol=4), "the instruction STACK_GLOBAL|the instruction FRAME",
    ),
    "os.system, as text": (running(program(b"(S'touch x'\nios\nsystem\n")), "the instruction"),
    "eval": (evil(eval, "open('MARK', 'w')"), CALLS.format("builtins.eval|__builtin__.eval")),
    "exec": (evil(exec, "open('MARK', 'w')"), "the pickle calls .*exec"),
    "open": (evil(open, "MARK", "w"), "the pickle calls .*open"),
    "getattr": (evil(getattr, "x", "upper"), "the pickle calls .*getattr"),
    "torch.load": (evil(torch.load, "MARK"), "the pickle calls torch.serialization.load"),
    "no archive": (bare, "not tensors as torch.save writes them since 1.6: a Python pickle"),
    "a class of its own": (evil(Calls, 1), "the pickle calls tests.hostile.pickled.Calls"),
    "a function that writes into another": (
        running(
            program(function("torch._utils", "_rebuild_tensor_v2"), b"N}" + text("__defaults__") + b"K\x07\x85s\x86b")
        ),
        "tensors by name expected, found function",
    ),
    "a storage that is a tuple": (
        running(named(tensor(of=b"(" + text("x") + text("y") + b"t"))), r"\('x', 'y'\) is no storage",
    ),
    "a storage that is called": (running(named(function("torch", "FloatStorage") + number(10**9) + b"\x85R")), DAMAGED),
    "an instance": (running(named(function("collections", "OrderedDict") + b")\x81")), "the instruction NEWOBJ"),
    "an extension": (running(named(b"\x82\x01")), "the instruction EXT1"),
    # bombs
    "a bytearray of a terabyte": (evil(bytearray, 10**12), "the pickle calls .*bytearray"),
    "a list of a terabyte": (
        running(named(function("builtins", "range") + number(10**12) + b"\x85R")), "the pickle calls builtins.range",
    ),
    "a tensor of a petabyte": (
        running(named(tensor(storage(count=10**15), sizes=shape(10**15), strides=shape(1)))), NOT_ALL,
    ),
    "a number of two megabytes": (
        running(program(b"\x8b" + struct.pack("<i", 1_900_000) + b"\x01" * 1_900_000)), "the instruction LONG4",
    ),
    "2⁶⁰ leaves as a name": (running(program(doubled(60), b"}h\x3cK\x01s")), BY_NAME),
    "2⁶⁰ leaves as a storage": (
        running(program(doubled(60), b"(" + text("storage") + b"h\x3ch\x3ch\x3ch\x3ctQ")), DAMAGED,
    ),
    "2⁶⁰ leaves as a shape": (
        running(program(doubled(60), named(tensor(sizes=b"h\x3c"))[2:])), "a shape and strides of whole numbers",
    ),
    "a tuple as deep as it goes, as a name": (running(program(b"}" + b")" + b"\x85" * 110_000 + b"K\x01s")), BY_NAME),
    "marks without end": (running(program(b"(" * 110_000)), "values wait on the stack"),
    "dicts without end": (running(program(b"}" * 110_000)), "values wait on the stack"),
    "instructions that do nothing": (running(program(b"}" + b"Nb" * 59_000)), "tensors by name expected, found dict"),
    "two million instructions": (running(program(b"}" + b"Nb" * 990_000)), "more than 120000 instructions"),
    "a program of three megabytes": (running(program(b"N" * 3_000_000)), "data.pkl in the archive is too large"),
    "compressed": (rebuilt(lambda entries: None, zipfile.ZIP_DEFLATED), "is compressed"),
    "a compressed gigabyte": (
        rebuilt(lambda entries: entries.update({"data/0": bytes(10**7)}), zipfile.ZIP_DEFLATED), "is compressed",
    ),
    # tensors that lie
    "storage past the end": (running(named(tensor(sizes=shape(17, 8)))), NOT_ALL),
    "first element past the end": (running(named(tensor(first=1))), NOT_ALL),
    "first element below 0": (running(named(tensor(first=-1))), "whole numbers expected"),
    "a storage that is not there": (running(named(tensor(storage("99")))), NOT_ALL),
    "a storage outside the archive": (running(named(tensor(storage("../../etc/passwd")))), NOT_ALL),
    "a storage whose key is a list": (
        running(
            named(
                tensor(
                    b"(" + text("storage") + function("torch", "FloatStorage") + b"]" + text("cpu") + number(4) + b"tQ"
                )
            )
        ),
        "is no storage",
    ),
    "a storage that is none": (running(named(b"NQ")), DAMAGED),
    "a negative shape": (running(named(tensor(sizes=shape(-16, -8)))), "whole numbers expected"),
    "a shape of text": (running(named(tensor(sizes=b"(" + text("16") + text("8") + b"t"))), "whole numbers expected"),
    "a shape that is a number": (running(named(tensor(sizes=number(128)))), "whole numbers expected"),
    "a shape of a thousand": (
        running(named(tensor(sizes=shape(*[1] * 1000), strides=shape(*[1] * 1000)))), "whole numbers expected",
    ),
    "fewer strides than sizes": (running(named(tensor(strides=shape(1)))), "whole numbers expected"),
    "strides of 0": (running(named(tensor(strides=shape(0, 0)))), "stored with strides"),
    "strides out of the storage": (running(named(tensor(strides=shape(10**9, 1)))), "stored with strides"),
    "columns before rows": (
        saved(lambda tensors: tensors | {"lm_head.weight": torch.ones(8, 16).T}),
        r"lm_head.weight: stored with strides \(1, 16\)",
    ),
    "every second column": (saved(of_three), r"q_proj.weight: stored with strides \(16, 2\)"),
    "a NaN": (
        saved(lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].log()}),
        "lm_head.weight holds a NaN",
    ),
    # something else than tensors by name
    "a list": (saved(lambda tensors: [*tensors.values()]), "tensors by name expected, found list"),
    "a tensor": (saved(lambda tensors: torch.ones(3)), "tensors by name expected, found _Tensor"),
    "nothing": (saved(lambda tensors: {}), "tensors by name expected, found dict"),
    "names that are numbers": (saved(lambda tensors: dict(enumerate(tensors.values()))), f"{BY_NAME}, found 0"),
    "names that are tuples": (saved(lambda tensors: {("w", 1): torch.ones(2)}), BY_NAME),
    "a number among the tensors": (
        saved(lambda tensors: tensors | {"epoch": 3}), "epoch: a tensor expected, found int",
    ),
    "a name given twice": (
        running(program(b"}(" + text("w") + tensor() + text("w") + tensor() + b"u")), "a name appears twice",
    ),
    "a name without a value": (running(program(b"}(" + text("w") + b"u")), BY_NAME),
    "a name that is half a character": (
        running(named(b"N", b"X\x03\0\0\0\xed\xa0\x80")), r"\\ud800: a tensor expected",
    ),
    "an optimizer": (saved(lambda tensors: {"state": {0: {"step": 1}}, "param_groups": []}), "an optimizer's state"),
    "a whole module": (lambda folder: torch.save(torch.nn.Linear(2, 2), folder / BIN), "a whole module"),
    "quantised by torch": (
        running(named(function("torch._utils", "_rebuild_qtensor") + b")R")),
        CALLS.format("torch._utils._rebuild_qtensor"),
    ),
    "sparse": (
        saved(lambda tensors: tensors | {"s": torch.ones(2, 2).to_sparse()}),
        "the pickle calls .*_rebuild_sparse_tensor",
    ),
    # archives
    "of before torch 1.6": (legacy, "not tensors as torch.save writes them since 1.6"),
    "empty": (put(BIN, b""), "not tensors as torch.save writes them"),
    "git-lfs pointer": (put(BIN, POINTER), "a git-lfs pointer"),
    "web page": (put(BIN, "<!doctype html>"), "a web page"),
    "safetensors under another name": (
        put(BIN, good.raw({"a": good.entry(0, 4)}, bytes(4))), "not tensors as torch.save writes them",
    ),
    **{f"cut to {share:.0%}": (cut(share), "truncated or damaged zip archive") for share in (0.1, 0.5, 0.9, 0.99)},
    "an archive of nothing": (
        lambda folder: zipfile.ZipFile(folder / BIN, "w").close(), "data.pkl in the archive is missing",
    ),
    "no program": (rebuilt(lambda entries: entries.pop("data.pkl")), "data.pkl in the archive is missing"),
    "an empty program": (running(b""), DAMAGED),
    "a program without an end": (running(b"\x80\x02}"), DAMAGED),
    "a program that takes what is not there": (running(program(b"}ss")), DAMAGED),
    "big-endian": (rebuilt(lambda entries: entries.update(byteorder=b"big")), "big-endian"),
    "two programs": (first_twice, "an entry of the archive appears twice"),
    "a link to another kind of file": (
        lambda folder: [(folder / BIN).unlink(), (folder / BIN).symlink_to("config.json")],
        "not tensors as torch.save writes them",
    ),
    "an index that leads out of the folder": (
        lambda folder: [
            (folder / BIN).unlink(), good.write_json(folder / INDEX, {"weight_map": {"w": "../outside.bin"}}),
        ],
        "plain file name",
    ),
    # legal
    "one level around": (saved(lambda tensors: {"state_dict": tensors}), None),
    "an ordered dict with notes": (saved(lambda tensors: noted(tensors)), None),
    "parameters": (saved(lambda tensors: {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}), None),
    "views of one storage": (saved(lambda tensors: as_views(tensors)), None),
    "saved once more": (saved(lambda tensors: tensors), None),
}


def noted(tensors: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """As state_dict() gives it."""
    found = OrderedDict(tensors)
    found._metadata = OrderedDict({"": {"version": 1}})
    return found


def as_views(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
    return {
        name: part.view(tensors[name].shape)
        for name, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors.values()]), strict=True)
    }


NOT_ALLOWED: dict[str, Case] = {
    "a sound one": (
        lambda folder: None,
        "only pickled weights .pytorch_model.bin.; they can run code .*convert SRC DST --allow-pickle",
    ),
    "os.system": (evil(os.system, "touch MARK"), "only pickled weights"),
    "no archive": (bare, "only pickled weights"),
    "empty": (put(BIN, b""), "only pickled weights"),
    "shards": (
        lambda folder: [
            (folder / BIN).rename(folder / "pytorch_model-1.bin"),
            good.write_json(folder / INDEX, {"weight_map": {"w": "pytorch_model-1.bin"}}),
        ],
        "only pickled weights .pytorch_model.bin.index.json",
    ),
}


def beside_safetensors(folder: Path) -> None:
    """A folder with pickles too: they are passed over."""
    good.hugging_face(folder)
    bare(folder)


def mutated_programs(root: Path, count: int) -> Iterator[tuple[str, Path]]:
    """The folder with another damaged program each time, or with the archive itself damaged."""
    folder = root / "model"
    folder.mkdir()
    good.pickled(folder)
    content = (folder / BIN).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        code = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    for seed in range(count):
        bad = mutated(seed, code if seed % 4 else content, most=6)
        (folder / BIN).write_bytes(content if seed % 4 else bad)
        if seed % 4:
            running(bad)(folder)
        yield f"seed {seed}", folder


GROUPS = {
    "pickles": Group("pickles, where they are allowed", good.pickled, good.read_whole, ALLOWED, folder=True),
    "no pickles": Group(
        "pickles, where they are not", beside_safetensors, checkpoints.load,
        {
            name: (
                lambda folder, harm=harm: [
                    (folder / "model.safetensors").unlink(), (folder / BIN).unlink(), good.pickled(folder),
                    harm(folder),
                ],
                cause,
            )
            for name, (harm, cause) in NOT_ALLOWED.items()
        },
        folder=True,
    ),
}
