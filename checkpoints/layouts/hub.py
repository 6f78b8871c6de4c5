"""From a name to a folder: a folder is itself, `owner/name` is fetched from the Hugging Face hub, once.

Only what a model needs is fetched: no pickles, no second copy of the weights, no code.
"""

import re
from collections.abc import Collection
from pathlib import Path

from checkpoints.storage.files import INDEX, SINGLE
from nanollm.errors import CheckpointError

COMPANIONS = (                                   # what belongs to a model beside its weights and config.json
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "*.tiktoken", "tiktoken.model", "tekken.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "chat_template.json",
)
WANTED = ("config.json", SINGLE, INDEX, "model-*-of-*.safetensors", *COMPANIONS)
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


def wanted(allow_pickle: bool) -> Collection[str]:
    """What is fetched of a model: pickles only where they may be read."""
    return (*WANTED, *PICKLES) if allow_pickle else WANTED


def local_path(source: str | Path, patterns: Collection[str] = WANTED) -> Path:
    """The folder, or the file in it that describes a model. Of a name on the hub, the files that match are fetched.

    Raises CheckpointError if `source` is neither, nor a model that the hub, or its cache here, can give."""
    path = Path(source)
    if path.exists():
        return path
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source, re.ASCII):
        raise CheckpointError(f"{source}: no such folder, and not a hub name of the form owner/name")
    from huggingface_hub import snapshot_download  # imported late: a local folder needs neither it nor a network
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:                             # offline, absent, gated, misspelt: they have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{source}: no such folder, and the hub does not give a model of that name: "
                              f"{reason}") from error


def local_folder(source: str | Path, patterns: Collection[str] = WANTED) -> Path:
    """The same, and of a file the folder in which it lies."""
    path = local_path(source, patterns)
    return path.parent if path.is_file() else path
