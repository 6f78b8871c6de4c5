"""Which files of a folder are the model, and what they say it is.

    layout     what describes it     where the tensors are                                           read by
    hf         config.json           model.safetensors, or the shards that its index names           storage/files.py
                                     pytorch_model.bin, likewise: pickles, only where allowed        storage/pickles.py
    meta       params.json           consolidated.00.pth …: pickles, one a model-parallel rank       layouts/original.py
    mistral    params.json           consolidated.safetensors                                        layouts/original.py
    gguf       itself                *.gguf                                                          storage/gguf.py

A folder may hold the same weights twice, or under a name of its own (model.pt). The layout further up is read, unless a
file of another one is given in place of the folder. A folder that train.py or convert.py wrote with our own names is an
hf folder whose model_type is nanollm.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.layouts import gguf_names, original
from checkpoints.names.table import Table
from checkpoints.storage import files, pickles
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError, ConfigError

LAYOUTS = ("hf", "meta", "mistral", "gguf")
LARGEST_CONFIG = 10_000_000                      # bytes


@dataclass(frozen=True)
class Found:
    """A model on disk, not yet understood."""
    folder: Path                                 # where its tokenizer would be too
    layout: str
    values: dict[str, Any]                       # config.json, or the same said of another layout
    where: str                                   # the file that says so
    stored: dict[str, Stored]
    tables: tuple[Table, ...] = ()               # the names in this layout; none: the family's own
    pairs: bool = False                          # RoPE turns neighbours, as stored in this layout
    ignorable: frozenset[str] = frozenset()      # tensors of this layout that are no weights


def find(path: Path, family: str | None = None, allow_pickle: bool = False, ignore: Collection[str] = ()) -> Found:
    """What is in a folder, or belongs to a file. Raises CheckpointError or ConfigError."""
    if path.is_file():
        return _of_file(path, family, allow_pickle, ignore)
    quantised = sorted(path.glob("*.gguf"))
    if not any((path / name).exists() for name in (files.SINGLE, files.INDEX, pickles.SINGLE, pickles.INDEX)):
        if (path / "params.json").exists():
            return _original(path, family, allow_pickle, ignore)
        if len(quantised) == 1:
            return _gguf(quantised[0], family, ignore)
        if quantised:
            names = ", ".join(one.name for one in quantised[:8])
            raise CheckpointError(f"{path}: {len(quantised)} GGUF files; give one of them: {names}")
    return _hf(path, family, allow_pickle)


def _of_file(path: Path, family: str | None, allow_pickle: bool, ignore: Collection[str]) -> Found:
    if path.suffix == ".gguf":
        return _gguf(path, family, ignore)
    if path.name == "params.json" or path.name.startswith("consolidated"):
        return _original(path.parent, family, allow_pickle, ignore)
    if path.name == "config.json" or path.name in (files.INDEX, pickles.INDEX):
        return _hf(path.parent, family, allow_pickle)
    if path.suffix == ".safetensors":
        return _hf(path.parent, family, allow_pickle, files.read_header(path))
    if path.suffix in (".bin", ".pt", ".pth"):
        return _hf(path.parent, family, allow_pickle, pickles.read_file(path, allow_pickle))
    raise CheckpointError(f"{path}: a model folder expected, or one of its files: config.json, params.json, *.gguf, "
                          "*.safetensors, *.bin, *.pt")


def _hf(folder: Path, family: str | None, allow_pickle: bool, stored: dict[str, Stored] | None = None) -> Found:
    """stored: the tensors of the one file that was given."""
    where = folder / "config.json"
    values = files.read_json(where, largest=LARGEST_CONFIG)
    if family is not None:
        values = {**values, "model_type": family}
    if stored is None:
        safe = any((folder / name).exists() for name in (files.SINGLE, files.INDEX)) or not pickles.there(folder)
        stored = files.read_folder(folder) if safe else pickles.read_folder(folder, allow_pickle)
    return Found(folder, "hf", values, str(where), stored)


def _original(folder: Path, family: str | None, allow_pickle: bool, ignore: Collection[str]) -> Found:
    where = folder / "params.json"
    params = files.read_json(where, largest=LARGEST_CONFIG)
    if (folder / original.SINGLE).exists():
        stored = files.read_header(files.inside(folder, original.SINGLE, "params.json"))
        layout = "mistral"
    else:
        stored, layout = original.merged(pickles.read_ranks(folder, allow_pickle), params, str(folder)), "meta"
    dialect = family or original.dialect(params, layout)
    if dialect not in original.DIALECTS:
        expected = ", ".join(original.DIALECTS)
        raise ConfigError(f"{where}: --family {dialect}: the original layout is read for {expected}")
    embed, head = (stored.get(f"{name}.weight") for name in ("tok_embeddings", "output"))
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(f"{folder}: no matrix tok_embeddings.weight")
    tied = head is None or files.equal_bytes(head, embed)
    values = original.read_params(params, str(where), dialect, embed.shape[0], tied, min(len(stored), 10_000), ignore)
    return Found(folder, layout, values, str(where), stored, (original.NAMES,), pairs=True,
                 ignorable=original.IGNORABLE)


def _gguf(path: Path, family: str | None, ignore: Collection[str]) -> Found:
    values, stored, names, pairs, ignorable = gguf_names.read(path, family, ignore)
    return Found(path.parent, "gguf", values, str(path), stored, (names,), pairs, ignorable)
