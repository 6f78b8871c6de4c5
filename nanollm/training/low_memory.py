"""The options of the optimizers whose state takes less memory, and what they go with.

    --optimizer galore       matrices of the layers: state of rank r in the place of their size; AdamW has the rest
    --optimizer badam        state of one block of the model at a time
    --optimizer adamw8bit    state in 8 bits in the place of 32, by bitsandbytes

GaLore needs the singular vectors of whole matrices, BAdam's state belongs to no parameter, and bitsandbytes rounds 256
numbers together that lie side by side. Cut into shards they would compute something else, so they are for one device.
"""

import argparse
import os
from typing import Any

from nanollm.errors import InputError
from nanollm.training import adamw8bit

NAMES = ("galore", "badam", "adamw8bit")
RANK, SCALE = 128, 1.0                          # r and α of galore.py
EVERY = {"galore": 200, "badam": 100}           # T of one paper and K of the other
OWN = {"galore_rank": ("galore",), "galore_scale": ("galore",), "switch_every": (*EVERY,)}


def numbers(options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of these options, for optim.build."""
    return {"rank": options.galore_rank or RANK, "scale": options.galore_scale or SCALE,
            "every": options.switch_every or EVERY.get(options.optimizer, 1)}


def check(options: argparse.Namespace, adapters: bool) -> None:
    """Raise InputError for options that do not go together, before anything is read. --optimizer is settled by then."""
    name = f"--optimizer {options.optimizer}"
    for option, optimizers in OWN.items():
        if getattr(options, option) is not None and options.optimizer not in optimizers:
            raise InputError(f"--{option.replace('_', '-')} goes with --optimizer {' or '.join(optimizers)}; found "
                             f"{name}")
    if options.optimizer not in NAMES:
        return
    if options.plan:
        raise InputError(f"--plan with {name}: it counts the state of AdamW and of Muon")
    if (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1 or options.offload:
        found = "--offload" if ranks == 1 else f"{ranks} processes"
        raise InputError(f"{name} with {found}: it needs whole parameters, and these would be in shards; run one "
                         "process without --offload, or take --optimizer adamw or muon, whose state is in shards too")
    if options.optimizer == "galore" and adapters:
        raise InputError(f"{name} with adapters: it keeps the state of a matrix at a low rank, and the factors of an "
                         "adapter have one already; leave one of the two out")
    if options.optimizer == "adamw8bit":
        adamw8bit.require()
