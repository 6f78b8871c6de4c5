"""Hugging Face's layout: config.json beside model.safetensors, or beside the shards that an index names.

pytorch_model.bin likewise: pickles, which are opened only where that is allowed. A folder that train.py or convert.py
wrote with our own names has this layout too; its model_type is nanollm.
"""

import dataclasses
import os
from pathlib import Path

from checkpoints.families import family_of
from checkpoints.layouts.found import LARGEST_CONFIG, Asked, Found
from checkpoints.storage import files, foreign, pickles, quantized
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError

WEIGHTS = (files.SINGLE, files.INDEX)
PICKLES = (pickles.SINGLE, pickles.INDEX)


def find(path: Path, asked: Asked) -> Found | None:
    """The model of a folder that has such weights, or that such a file belongs to. Raises CheckpointError."""
    if path.is_dir():
        return of_folder(path, asked) if any((path / name).exists() for name in (*WEIGHTS, *PICKLES)) else None
    if path.name in ("config.json", files.INDEX, pickles.INDEX):
        return of_folder(path.parent, asked)
    if path.suffix == ".safetensors":
        return described(path.with_name("config.json"), asked, files.read_header(path))
    if path.suffix in (".bin", ".pt", ".pth"):
        return described(path.with_name("config.json"), asked, pickles.read_file(path, asked.allow_pickle))
    return None


def of_folder(folder: Path, asked: Asked) -> Found:
    """The model of a folder. Raises CheckpointError with what it lacks."""
    found = described(folder / "config.json", asked, {})  # a config.json that cannot be read is said first
    pickled = pickles.there(folder)
    safe = any((folder / name).exists() for name in WEIGHTS) or not pickled
    if not pickled and not any(os.path.lexists(folder / name) for name in WEIGHTS):
        family_of(found.values, found.where)  # where there are no weights, a model that is not read is said first
    stored = files.read_folder(folder) if safe else pickles.read_folder(folder, asked.allow_pickle)
    return dataclasses.replace(found, stored=stored)


def described(where: Path, asked: Asked, stored: dict[str, Stored]) -> Found:
    """What a config.json says, for these tensors."""
    if not where.exists() and not where.is_symlink():
        raise CheckpointError(f"{where}: no such file; {foreign.no_config(where.parent)}")
    values = quantized.beside(where.parent, files.read_json(where, largest=LARGEST_CONFIG))
    kind = {} if asked.family is None else {"model_type": asked.family}
    return Found(where.parent, "hf", {**values, **kind}, str(where), stored)
