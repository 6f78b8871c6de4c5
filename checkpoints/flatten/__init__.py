"""One file a model: the decoder of one config as a standalone Python file, every branch that it does not take removed.

    python -m checkpoints.flatten llama-8b --out llama.py       a preset, a folder, a config.json, or owner/name
    python llama.py FOLDER "Once upon a time"                   imports torch and safetensors, nothing of nanollm

The file is made from the sources of the library, so it cannot drift from them, and its logits are bit-equal. How:

    1. sources.py       A function is a tree of nodes, each with the characters that it was written in.
    2. values.py        A *world* is one way in which a function is called: what is known of each argument before the
                        model runs. build.py makes the decoder on the meta device, so a method has a world for each
                        module of its class, and `self.config.window` is a number, or None, in each.
    3. program.py       From Decoder.forward on, each call adds worlds to what it calls, until none is new.
    4. expressions.py, calls.py, rewrite.py     Each function is written anew for all its worlds. What is the same in
                        all becomes a literal, or a constant of the config by its name (constants.py). A branch that no
                        world takes goes. An argument that is the same everywhere, or that nobody reads, goes from the
                        function and from its calls. What differs between layers stays, as an argument of the module's
                        class. All else stays as it was written, comments and line breaks included. Short functions, and
                        methods that one place calls, are written where they are called. special.py has the exceptions.
    5. cleanup.py, prose.py     Values that nobody reads go, and sentences that speak of what is gone.
    6. write.py, heads.py, assemble.py      Classes, constants and functions in the order of reading.
    7. naming.py, arrange.py, plain.py, training.py     The names of stored tensors; load, generate, the command.

Two things are not from the library's sources: the cache and what layers share (frame.py), as a file has plain rows
where the library has padding and packed documents, and the last step. Neither has an equation in it.
"""

from pathlib import Path

from checkpoints import layouts
from checkpoints.families import Family, write_config
from checkpoints.flatten.assemble import File
from checkpoints.flatten.build import prepared
from checkpoints.layouts import Asked, hub
from checkpoints.names.table import Table
from checkpoints.source import config_of, open_source
from nanollm import presets
from nanollm.config import ModelConfig
from nanollm.errors import ConfigError

__all__ = ["flatten"]


def flatten(source: str | Path, train: bool = False) -> str:
    """The file for a folder, a config.json, a model on the hub, or a preset. Raises ConfigError or CheckpointError."""
    config, family, names = find(str(source))
    writer = prepared(config)
    return File(writer).text(title(str(source), config, family), names, train)


def find(source: str) -> tuple[ModelConfig, Family, Table]:
    """What is to be flattened, its family, and its names of tensors."""
    if "/" not in source and not Path(source).exists():
        config = presets.preset(source)
        family = write_config(config)[0]
        return config, family, family.tables(config)[0]
    path = hub.local_path(source, weights=False)
    found = layouts.describe(path, Asked())
    if found.layout != "hf":
        raise ConfigError(f"{source}: its layout is {found.layout}, and a flattened file reads Hugging Face folders; "
                          "python -m checkpoints.convert makes one")
    if found.stored:
        whole = open_source(path)
        return whole.config, whole.family, whole.names
    family, config = config_of(found)
    return config, family, family.tables(config)[0]


def title(source: str, config: ModelConfig, family: Family) -> list[str]:
    """The docstring of the file."""
    name = Path(source).name
    return [f'"""{name}, a model of the family {family.name}, in one file.',
            f"Made by `python -m checkpoints.flatten {name}` from the sources of nanollm.", '"""', ""]
