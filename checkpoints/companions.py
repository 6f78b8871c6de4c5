"""What belongs to a model beside its weights and config.json: tokenizer, templates, generation config.

    copied        the files that hub.COMPANIONS lists; Meta's tokenizer.model also from one folder up
    written       generation_config.json, where the source has none but says the ids of BOS, EOS and PAD: in its own
                  description, or in its tokenizer (Meta's and Mistral's layouts, GGUF)
    left behind   code (*.py), and with it the key auto_map that names it; weights that were not read. One warning each
"""

import errno
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from checkpoints.families.family import TOKENS
from checkpoints.layouts import hub
from checkpoints.storage import files, writing
from nanollm.errors import CheckpointError, NanollmError

GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")


def found_in(folder: Path, layout: str) -> dict[str, Path]:
    """The files that go with the model, links to nothing among them: their names in the new folder, and where they are.
    """
    found = {path.relative_to(folder).as_posix(): path for pattern in hub.COMPANIONS
             for path in (sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern])
             if os.path.lexists(path)}           # glob itself passes over a link to nothing
    above = folder.absolute().parent / "tokenizer.model"
    if layout == "meta" and not {"tokenizer.model", "tokenizer.json"} & found.keys() and above.is_file():
        found["tokenizer.model"] = above         # Llama 1 and 2: one tokenizer beside the folders of all sizes
    return found


def need_readable(folder: Path, layout: str) -> None:
    """Raises CheckpointError if one of them is no file (a pipe, a folder, a link to nothing), or cannot be read."""
    for path in found_in(folder, layout).values():
        files.need_file(path)
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise CheckpointError(f"{path}: cannot be read: {os.strerror(errno.EACCES)}")


def token_ids(folder: Path, layout: str, values: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """bos_token_id, eos_token_id, pad_token_id of a layout that has no config.json: as its description says, or else as
    its tokenizer does."""
    said = {key: values[key] for key in TOKENS if values.get(key) is not None}
    tokenizer_file = found_in(folder, layout).get("tokenizer.model") or folder / "tekken.json"
    if said or not tokenizer_file.is_file():
        return said
    from nanollm.text import tokenizer  # imported late: a config.json that says the ids needs no tokenizer
    try:
        read = tokenizer.load(tokenizer_file.parent)
    except NanollmError as error:
        warnings.warn(f"{tokenizer_file}: not read, so the ids of BOS and EOS stay unsaid: {error}", stacklevel=2)
        return {}
    stops = [one for one in read.stop_ids if one < vocab]
    eos = {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    return ({"bos_token_id": read.bos_id} if read.bos_id is not None and read.bos_id < vocab else {}) | eos


def copy(folder: Path, layout: str, draft: Path, ids: Mapping[str, Any]) -> None:
    """Copy what goes with the model, and write the ids where no generation_config.json says them."""
    for name, path in found_in(folder, layout).items():
        (draft / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, draft / name)
    if ids and not (draft / GENERATION).exists():
        writing.write_json(draft / GENERATION, dict(ids))
    if (draft / TOKENIZER).exists():
        said = files.read_json(draft / TOKENIZER)
        if said.pop("auto_map", None) is not None:
            writing.write_json(draft / TOKENIZER, said)


def left_behind(folder: Path, used: Collection[str]) -> str:
    """What of a folder is not in the new one, in words: code, and weights beside the `used` files; "" if there is none.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    code = [name for name in names if name.endswith(".py")]
    weights = [name for name in names if name.endswith(WEIGHTS) and name not in used]
    told = [f"{what} ({', '.join(each[:3])}{' …' if len(each) > 3 else ''})"
            for what, each in (("code", code), ("other weights or states", weights)) if each]
    return " and ".join(told)
