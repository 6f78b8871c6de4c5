"""From a name to a folder: a folder is itself, `owner/name` is fetched from the Hugging Face hub, once.

Only what a model needs is fetched: one copy of the weights, in one layout, and no code. Which files those are is asked
of the repository itself: the list of its files, and the index of the weights, if it has one, which names the shards.

    owner/name              the first of these that the repository has:
                            model.safetensors, or the shards that model.safetensors.index.json names
                            pytorch_model.bin, or the shards of its index                               pickles
                            consolidated.safetensors, or the shards of its index, with params.json      Mistral
                            consolidated.00.pth …, with params.json                                     Meta, pickles
                            the one *.gguf
    owner/name/FILE.gguf    that file, where there are several

A name that can only be meant as a path (./x, a/b/c, x.gguf, or x/y where x is a folder here) is never asked of the hub.

Pickles are fetched only where they may be read. Without a network, what an earlier call has fetched is used.
"""

import contextlib
import difflib
import glob
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path

from checkpoints.layouts import original
from checkpoints.storage import files, pickles
from checkpoints.storage.files import refused_in_words
from nanollm.errors import CheckpointError

COMPANIONS = (                                   # what belongs to a model beside its weights and config.json
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "*.tiktoken", "tiktoken.model", "tekken.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)
NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-][\w./-]*\.gguf))?", re.ASCII)     # owner/name, and a file of it
Fetch = Callable[[str], Path]                    # the name of a file in the repository → the file here


def local_path(source: str | Path, allow_pickle: bool = False, weights: bool = True) -> Path:
    """The folder, or the file in it that describes a model. Of a name on the hub, what a model needs is fetched;
    without `weights` config.json alone, if there is one.

    Raises CheckpointError if `source` is neither, nor a model that the hub, or its cache here, can give. Only what
    cannot be a path that someone mistyped is asked of the hub."""
    if not str(source).strip():
        raise CheckpointError(f"the name of the model is empty ({str(source)!r}); expected a folder, a file, or "
                              "owner/name on the hub")
    with refused_in_words():
        path = expanded(source)
        if path.is_dir():
            return path
        if path.exists():
            files.need_file(path)                # not a pipe: to open it would be to wait
            return path
        if looks_local(str(source)):
            raise CheckpointError(f"{source}: no such folder or file; {nearest(path)}")
    named = NAME.fullmatch(source) if isinstance(source, str) else None
    if named is None:
        raise CheckpointError(f"{source}: no such folder, and not a hub name of the form owner/name, such as "
                              "openai-community/gpt2")
    from huggingface_hub import (  # imported late: a local folder needs neither it nor a network
        HfApi,
        hf_hub_download,
        snapshot_download,
    )
    name, file = named.groups()

    def wanted(there: Collection[str], fetch: Fetch, where: str = name) -> list[str]:
        if file is not None:
            if file not in there:
                raise CheckpointError(f"{where}: no {file}; there are {', '.join(ggufs_of(there)) or 'no *.gguf'}")
            return split(file, there)
        return ["config.json"] if not weights and "config.json" in there else choose(there, fetch, allow_pickle, where)

    try:
        there = [one.rfilename for one in HfApi().model_info(name).siblings or ()]
        chosen = wanted(there, lambda one: Path(hf_hub_download(name, one)))
        folder = Path(snapshot_download(name, allow_patterns=[glob.escape(one) for one in chosen]))
    except CheckpointError:
        raise
    except Exception as error:                             # offline, absent, gated, misspelt: they have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        try:                                               # what is here already, whatever it is
            folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=[]))
        except Exception:
            raise CheckpointError(f"{source}: no such folder, and the hub does not give a model of that name: "
                                  f"{reason}") from error
        here = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
        chosen = wanted(here, folder.joinpath, f"{name}, as far as it is in {folder} (the hub: {reason})")
    alone = next((one for one in chosen if one.endswith(".gguf")), None)
    return folder if alone is None else folder / alone


def looks_local(source: str) -> bool:
    """Whether a name can only be meant as a path: by how it begins or ends, by its slashes, or because its first part
    is a folder here."""
    first, slash, rest = source.partition("/")
    of_hub = NAME.fullmatch(source)
    file = source.endswith((".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth")) and not (of_hub and of_hub[2])
    more = "/" in rest and not (of_hub and of_hub[2])
    return source.startswith((".", "/", "~")) or more or file or bool(slash) and Path(first).is_dir()


def nearest(path: Path) -> str:
    """What is where a path leads off, in words: the names that are like the missing one, or else the models there."""
    there = next(one for one in path.absolute().parents if one.is_dir())
    names = sorted(one.name for one in there.iterdir() if not one.name.startswith("."))
    missing = path.absolute().relative_to(there).parts[0]
    models = [name for name in names if is_model(there / name)]
    shown = difflib.get_close_matches(missing, names, 3) or models[:8]
    more = " …" if shown and len(names) > len(shown) else ""
    return f"{there} has {', '.join(shown) or f'nothing called {missing}, and no model'}{more}"


def is_model(path: Path) -> bool:
    """Whether it looks like a model: by the name of a file, or as a folder by what stands in it."""
    with contextlib.suppress(OSError):           # a folder that may not be read
        if path.is_dir():
            return (path / "config.json").is_file() or any(path.glob("*.gguf"))
    return path.suffix in (".gguf", ".safetensors") or path.name == "config.json"


def local_folder(source: str | Path, allow_pickle: bool = False) -> Path:
    """The same, and of a file the folder in which it lies."""
    path = local_path(source, allow_pickle)
    return path.parent if path.is_file() else path


def to_train(source: str) -> Path:
    """The same for training, which starts from a folder: a file is refused."""
    path = local_path(source)
    if path.is_file():
        raise CheckpointError(f"{source}: a file; fine-tuning starts from a folder: python -m checkpoints.convert "
                              f"{source} FOLDER")
    return path


def expanded(source: str | Path) -> Path:
    """The path, with a home folder in place of ~, which a shell leaves alone in --model=~/x."""
    try:
        return Path(source).expanduser()
    except RuntimeError:                         # no home folder of that name
        return Path(source)


def ggufs_of(there: Collection[str]) -> list[str]:
    """GGUF files that are a model each: of one that is split the first piece; no vision towers (mmproj)."""
    return sorted(one for one in there if one.endswith(".gguf") and split(one, there)[0] == one and "mmproj" not in one)


def split(file: str, there: Collection[str]) -> list[str]:
    """The pieces NAME-00001-of-00003.gguf … of a GGUF file that is split; of any other itself."""
    piece = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", file, re.ASCII)
    return [file] if piece is None else sorted(one for one in there if one.startswith(piece[1])
                                               and one.endswith(piece[2]) and len(one) == len(file))


def choose(there: Collection[str], fetch: Fetch, allow_pickle: bool, where: str) -> list[str]:
    """The files of a repository that a model needs, of those that are `there`; an index is fetched and read.

    Raises CheckpointError if there are no weights that may be read, or several models."""
    def whole(single: str, index: str) -> list[str]:
        if single in there or index not in there:
            return [single] if single in there else []
        shards = dict.fromkeys(files.shard_names(fetch(index)).values())
        return [index, *(one for one in shards if one in there and one.endswith(Path(single).suffix))]

    ranks = sorted(one for one in there if pickles.RANK.fullmatch(one))
    ggufs = ggufs_of(there)
    pickled = [one for one in (pickles.SINGLE, pickles.INDEX, *ranks) if one in there]
    weights = whole(files.SINGLE, files.INDEX)
    if not weights and allow_pickle:
        weights = whole(pickles.SINGLE, pickles.INDEX)
    if not weights:
        weights = whole(original.SINGLE, original.INDEX)
    if not weights and allow_pickle:
        weights = ranks
    if not weights and len(ggufs) > 1:
        raise CheckpointError(f"{where}: {len(ggufs)} GGUF files, each a model: say which, as {where}/{ggufs[0]}; "
                              f"there are {', '.join(ggufs)}")
    weights = weights or (split(ggufs[0], there) if ggufs else [])
    if not weights and pickled:
        pickles.need_allowed(where, pickled[0], allow_pickle)
    if not weights:
        others = [one for one in there if one.endswith((".safetensors", ".bin", ".pt", ".pth"))]
        found = f"there are {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else "there are none"
        raise CheckpointError(f"{where}: no weights that are read; expected {files.SINGLE}, {files.INDEX}, "
                              f"{pickles.SINGLE}, {original.SINGLE}, consolidated.00.pth or a *.gguf, and {found}")
    described = [one for one in ("config.json", "params.json") if one in there]
    return [*described, *weights, *(one for one in there if is_companion(one))]


def is_companion(name: str) -> bool:
    """Whether a file of a repository is fetched beside config and weights."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in COMPANIONS)
