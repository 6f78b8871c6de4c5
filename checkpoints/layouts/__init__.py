"""Which files of a folder are the model, and what they say it is.

    layout     what describes it     where the tensors are                                           found by
    hf         config.json           model.safetensors, or the shards that its index names           huggingface.py
                                     pytorch_model.bin, likewise: pickles, only where allowed
    meta       params.json           consolidated.00.pth …: pickles, one a model-parallel rank       original.py
    mistral    params.json           consolidated.safetensors, or the shards that its index names    original.py
    gguf       itself                *.gguf, or its parts *-00001-of-00002.gguf …                    gguf_files.py

A folder may hold the same weights twice, or under a name of its own (model.pt). The layout further up is read, unless a
file of another one is given in place of the folder. Each layout has one function, `find`, which hands over one thing: a
Found (found.py), or None where the path is not its own. hub.py fetches what is not here yet.
"""

from pathlib import Path

from checkpoints.layouts import gguf_files, gguf_tokens, huggingface, original
from checkpoints.layouts.found import Asked, Found
from checkpoints.storage import foreign, gguf
from checkpoints.storage.files import refused_in_words
from nanollm.errors import CheckpointError, TokenizerError
from nanollm.text import tokenizer
from nanollm.text.tokenizer import Tokenizer

__all__ = ["Asked", "Found", "describe", "find", "read_tokenizer"]

NOTHING_SPECIAL = Asked()


@refused_in_words()
def find(path: Path, asked: Asked = NOTHING_SPECIAL) -> Found:
    """What is in a folder, or belongs to a file. Raises CheckpointError or ConfigError."""
    if path.is_file() and (kind := foreign.file(path)):
        raise CheckpointError(f"{path}: {kind}")
    for layout in (huggingface, original, gguf_files):
        found = layout.find(path, asked)
        if found is not None:
            return found
    if path.is_file():
        raise CheckpointError(f"{path}: a model folder expected, or one of its files: config.json, params.json, "
                              "*.gguf, *.safetensors, *.bin, *.pt")
    if path.is_dir() and (kind := foreign.folder(path)):
        raise CheckpointError(f"{path}: {kind}")
    return huggingface.of_folder(path, asked)  # which says what the folder lacks


@refused_in_words()
def describe(path: Path, asked: Asked = NOTHING_SPECIAL) -> Found:
    """The same for who wants no weights: without tensors where a config.json is given, or stands beside pickles, which
    stay closed."""
    config = path / "config.json" if path.is_dir() else path
    weights = [path / name for name in (*huggingface.WEIGHTS, original.SINGLE, original.INDEX)]
    other = config.name == "params.json" or config.name.endswith(".index.json")
    if config.suffix == ".json" and not other and config.exists() and not any(each.exists() for each in weights):
        return huggingface.described(config, asked, {})
    return find(path, asked)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder, or of the folder of a file; of a GGUF the one inside it, if there is one.

    Raises TokenizerError; for a file that belongs to no model what `find` raises."""
    folder = path if path.is_dir() else path.parent
    own = path != folder and gguf.is_gguf(path)
    described = any((folder / name).exists() for name in ("config.json", "params.json"))
    file = path if own else gguf_files.model_in(folder) if path == folder and not described else None
    inside = gguf_tokens.load(gguf_files.first_part(file)) if file else None
    try:
        return inside or tokenizer.load(folder)
    except TokenizerError:
        if path.is_file() and not own or foreign.is_adapter(folder) or not described:
            find(path)                           # which says what the folder is, or lacks
        raise
