"""Prefixes before the names of tensors: what tools put there is taken off, what a base model lacks is put on.

    module.                  DataParallel, DistributedDataParallel, DeepSpeed      module.model.norm.weight
    _orig_mod.               torch.compile                                         _orig_mod.model.norm.weight
    _fsdp_wrapped_module.    FullyShardedDataParallel                              _fsdp_wrapped_module.lm_head.weight
    base_model.model.        PEFT                                                  base_model.model.model.norm.weight
    model.language_model.    the language model inside a multimodal one            model.language_model.norm.weight
    language_model.          the same, in older folders                            language_model.model.norm.weight

A prefix is taken off where *every* tensor has it and the family's own names do not begin with it. Inside a name
torch's own wrappers are taken out, where no two names become one. A model that was
saved without its head (transformers' AutoModel, embedding models) lacks the first part of every name: layers.0… in
place of model.layers.0…. One warning names what was done.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from checkpoints.names.table import Table
from nanollm.errors import CheckpointError, counted

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.",
            "model.language_model.", "language_model.")
# torch's wrappers of parts of a model: model.layers.0._orig_mod.mlp.up_proj.weight
INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
One = TypeVar("One")


def foreign(tables: Iterable[Table]) -> list[str]:
    """The prefixes that no name in these tables begins with."""
    names = {name for table in tables for rule in table.values() for name in rule.theirs}
    return [each for each in WRAPPERS if not any(name.startswith(each) for name in names)]


def unwrapped(stored: Mapping[str, One], tables: Collection[Table], where: str) -> dict[str, One]:
    """The tensors under names without the prefixes that all of them have."""
    found, off = dict(stored), ""
    while taken := next((each for each in foreign(tables) if all(name.startswith(each) for name in found)), None):
        found, off = {name.removeprefix(taken): one for name, one in found.items()}, off + taken
    if off:
        warnings.warn(f"{where}: {off} is taken off the names of all {counted(len(found), 'tensor')}", stacklevel=2)
    bare = {INNER.sub("", name): one for name, one in found.items()}
    if bare.keys() != found.keys() and len(bare) == len(found):
        changed = [name for name in found if INNER.search(name)]
        what = ", ".join(dict.fromkeys(part for name in changed for part in INNER.findall(name)))
        warnings.warn(f"{where}: {what} is taken out of {counted(len(changed), 'name')} of tensors ({changed[0]})",
                      stacklevel=2)
        return bare
    return found


def of_whole_model(stored: Mapping[str, One], needed: Collection[str], embed: str, where: str) -> dict[str, One]:
    """The tensors under the names of a whole model, where they have those of a base model: all lack the first part that
    the name of the embedding has. `needed` are the names that the table asks for."""
    first = embed.partition(".")[0] + "." if embed.count(".") > 1 else ""
    lacks = first and not any(name.startswith(first) for name in stored)
    if not lacks or not any(first + name in needed for name in stored):
        return dict(stored)
    warnings.warn(f"{where}: a base model that was saved alone; {first} is put before the names of its tensors",
                  stacklevel=2)
    return {name if name in needed else first + name: one for name, one in stored.items()}


def need_one_way(stored: Collection[str], needed: Collection[str], tables: Collection[Table], where: str) -> None:
    """Raises CheckpointError, with counts, where tensors that are needed stand behind a prefix that others lack."""
    for each in foreign(tables):
        behind = [name for name in stored if name.startswith(each)]
        if any(name.removeprefix(each) in needed and name.removeprefix(each) not in stored for name in behind):
            other = next(name for name in stored if not name.startswith(each))
            raise CheckpointError(f"{where}: {len(behind)} of {len(stored)} tensor names begin with {each} and the "
                                  f"others do not ({behind[0]}, {other}); save the model again without the prefix")
