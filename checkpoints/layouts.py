"""Which files of a folder are the model, and what they say it is.

    layout     what describes it     where the tensors are                                                  read by
    hf         config.json           model.safetensors, or the shards that its index names                  files.py
                                     pytorch_model.bin, likewise: pickles, only where they are allowed      pickles.py
    meta       params.json           consolidated.00.pth …: pickles, one for each model-parallel rank       families/original.py
    mistral    params.json           consolidated.safetensors                                               families/original.py
    gguf       itself                *.gguf                                                                 gguf.py

A folder may hold the same weights twice. Then the layout further up is read, unless a file of the other one is given in place of the
folder. A folder that train.py or convert.py wrote with our own names is an hf folder whose model_type is nanollm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import files, pickles
from checkpoints.families import original
from checkpoints.files import Stored
from checkpoints.table import Table
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


def find(path: Path, family: str | None = None, allow_pickle: bool = False) -> Found:
    """What is in a folder, or belongs to a file. Raises CheckpointError or ConfigError."""
    if path.is_file():
        return _of_file(path, family, allow_pickle)
    if (path / "config.json").exists() and not (_only_original(path)):
        return _hf(path, family, allow_pickle)
    if (path / "params.json").exists():
        return _original(path, family, allow_pickle)
    single = sorted(path.glob("*.gguf"))
    if len(single) == 1 and not (path / "config.json").exists():
        return _gguf(single[0], family)
    if len(single) > 1:
        raise CheckpointError(f"{path}: {len(single)} GGUF files, and no config.json; give one of them: {', '.join(one.name for one in single[:8])}")
    return _hf(path, family, allow_pickle)


def _only_original(folder: Path) -> bool:
    """params.json beside a config.json, and weights for the first alone."""
    weights = (files.SINGLE, files.INDEX, pickles.SINGLE, pickles.INDEX)
    return (folder / "params.json").exists() and not any((folder / name).exists() for name in weights)


def _of_file(path: Path, family: str | None, allow_pickle: bool) -> Found:
    if path.suffix == ".gguf":
        return _gguf(path, family)
    if path.name == "params.json" or path.name.startswith("consolidated"):
        return _original(path.parent, family, allow_pickle)
    if path.name in ("config.json", files.SINGLE, files.INDEX, pickles.SINGLE, pickles.INDEX):
        return _hf(path.parent, family, allow_pickle)
    raise CheckpointError(f"{path}: a model folder, a config.json, a params.json or a *.gguf expected")


def _hf(folder: Path, family: str | None, allow_pickle: bool) -> Found:
    where = folder / "config.json"
    values = files.read_json(where, largest=LARGEST_CONFIG)
    if family is not None:
        values = {**values, "model_type": family}
    if any((folder / name).exists() for name in (files.SINGLE, files.INDEX)) or not pickles.there(folder):
        return Found(folder, "hf", values, str(where), files.read_folder(folder))
    return Found(folder, "hf", values, str(where), pickles.read_folder(folder, allow_pickle))


def _original(folder: Path, family: str | None, allow_pickle: bool) -> Found:
    where = folder / "params.json"
    params = files.read_json(where, largest=LARGEST_CONFIG)
    if (folder / original.SINGLE).exists():
        stored = files.read_header(files.inside(folder, original.SINGLE, "params.json"))
        layout = "mistral"
    else:
        stored, layout = original.merged(pickles.read_ranks(folder, allow_pickle), params, str(folder)), "meta"
    dialect = family or original.dialect(params, layout)
    if dialect not in original.DIALECTS:
        raise ConfigError(f"{where}: --family {dialect}: the original layout is read for {', '.join(original.DIALECTS)}")
    embed, head = (stored.get(f"{name}.weight") for name in ("tok_embeddings", "output"))
    if embed is None:
        raise CheckpointError(f"{folder}: no tensor tok_embeddings.weight")
    tied = head is None or files.equal_bytes(head, embed)
    values = original.read_params(params, str(where), dialect, embed.shape[0], tied, most=min(len(stored), 10_000))
    return Found(folder, layout, values, str(where), stored, (original.NAMES,), pairs=True, ignorable=original.IGNORABLE)


def _gguf(path: Path, family: str | None) -> Found:
    from checkpoints import gguf                 # imported late: it needs a package of its own
    values, stored, names, pairs = gguf.read(path, family)
    return Found(path.parent, "gguf", values, str(path), stored, (names,), pairs)
