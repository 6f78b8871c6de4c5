"""Which GGUF files are a model: one file, or the parts that a large one was split into.

    Llama-3.2-1B-Q4_K_M.gguf                     one file
    Mixtral-8x22B-Q4_K_M-00001-of-00002.gguf     the first of two: it has the keys; each has tensors of its own
    mmproj-….gguf                                the vision tower of a multimodal model, which is left out

The keys split.count and split.no say the same as the names. Any part may be given; a file is known by its first four
bytes, so it may have no suffix. What the keys and tensors mean: gguf_names.py. The tokenizer inside: gguf_tokens.py.
"""

import dataclasses
import re
import reprlib
import warnings
from pathlib import Path

from checkpoints.layouts import gguf_tokens
from checkpoints.layouts.found import Asked, Found
from checkpoints.layouts.gguf_names import ARCHITECTURES, SHARED_GATE, read_metadata
from checkpoints.storage import gguf
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError, ConfigError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
TOWER = "mmproj"                                 # in the name of a file with a vision tower


def find(path: Path, asked: Asked) -> Found | None:
    """The model of a GGUF file, or of a folder that has one. Raises ConfigError or CheckpointError."""
    if path.is_dir():
        path_inside = model_in(path)
        return find(path_inside, asked) if path_inside else None
    if path.suffix != ".gguf" and not gguf.is_gguf(path):
        return None
    gguf.package(path)
    parts = parts_of(path)
    first, head = next(iter(parts.items()))
    kind = head.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{first}: general.architecture is {reprlib.repr(kind)}; supported are {supported}")
    if head.metadata.get("general.type", "model") != "model":
        raise ConfigError(f"{first}: general.type is {reprlib.repr(head.metadata['general.type'])}; expected a model")
    architecture = ARCHITECTURES[kind]
    dtype = gguf.dtype_of(entry for each in parts.values() for entry in each.entries)
    stored: dict[str, Stored] = {}
    for part, header in parts.items():
        here = gguf.places(part, header, dtype, architecture.norm_offset)
        if twice := here.keys() & stored.keys():
            raise CheckpointError(f"{part}: {min(twice)} is in {stored[min(twice)].file.name} too")
        stored |= here
    for name, one in stored.items():             # some converters drop the 1 of (1, D)
        if name.endswith(SHARED_GATE) and len(one.shape) == 1:
            stored[name] = dataclasses.replace(one, shape=(1, *one.shape))
    values = read_metadata(head.metadata, kind, asked.family, stored, str(first), asked.ignore)
    values |= gguf_tokens.ids(head.metadata)
    return Found(first.parent, "gguf", values, str(first), stored, architecture.names, architecture.interleaved,
                 architecture.vectors, first)


def model_in(folder: Path) -> Path | None:
    """The one model of a folder: its file, or its first part. Raises CheckpointError if there are several."""
    models: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        part = PART.fullmatch(path.name)
        models.setdefault(f"{part[1]}-{part[3]}" if part else path.name, path)
    towers = [name for name in models if TOWER in name]
    if towers and len(towers) < len(models):
        warnings.warn(f"{folder}: the language model is loaded; left out: {', '.join(towers)}", stacklevel=2)
        models = {name: path for name, path in models.items() if name not in towers}
    if len(models) > 1:
        names = ", ".join(path.name for path in list(models.values())[:8])
        raise CheckpointError(f"{folder}: {len(models)} GGUF models; give one of them: {names}")
    return next(iter(models.values()), None)


def first_part(path: Path) -> Path:
    """The part of a split model that has its keys; of any other the file itself."""
    name = PART.fullmatch(path.name)
    first = path.with_name(f"{name[1]}-00001-of-{name[3]}.gguf") if name else path
    return first if first.exists() else path


def parts_of(path: Path) -> dict[Path, gguf.Header]:
    """The files of a model and what each says before its data, the first part first.

    Raises CheckpointError if one of them is not there, or is a part of something else."""
    header = gguf.read_header(path)
    count = header.metadata.get("split.count", 0)
    if count in (0, 1):
        return {path: header}
    name = PART.fullmatch(path.name)
    if type(count) is not int or name is None or int(name[3]) != count:
        raise CheckpointError(f"{path}: one of {reprlib.repr(count)} files of a model; "
                              "expected a name such as model-00001-of-00002.gguf, by which the others are found")
    paths = [path.with_name(f"{name[1]}-{number:05}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    if lacking := [one.name for one in paths if not one.exists()]:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CheckpointError(f"{path}: one of {count} files of a model; beside it there is no "
                              f"{', '.join(lacking[:3])}{more}")
    parts = {one: header if one == path else gguf.read_header(one) for one in paths}
    for number, (part, its) in enumerate(parts.items()):
        for key, expected in (("split.no", number), ("split.count", count)):
            if its.metadata.get(key) != expected:
                raise CheckpointError(f"{part}: {key} is {reprlib.repr(its.metadata.get(key))}; expected {expected}")
    total = sum(len(its.entries) for its in parts.values())
    said = parts[paths[0]].metadata.get("split.tensors.count", total)
    if said != total:
        found = f"split.tensors.count is {reprlib.repr(said)}; the {count} files have {total}"
        raise CheckpointError(f"{paths[0]}: {found}")
    return parts
