"""The names of stored tensors, as a table of the file and the code that reads it."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from checkpoints.flatten import arrange
from checkpoints.flatten.cleanup import WIDTH
from checkpoints.flatten.constants import Constants
from checkpoints.flatten.sources import Code
from checkpoints.names.ops import Same, Transposed
from checkpoints.names.table import INSIDE, Table, _split_layer
from nanollm.errors import ConfigError
from nanollm.model import Decoder

FIELDS = {"KV_HEADS": "kv_heads", "HEADS": "heads", "HEAD_DIM": "head_dim", "KEY_HEADS": "key_heads",
          "KEY_DIM": "key_dim"}


def rows(names: Table, parameters: Mapping[str, Tensor]) -> dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[Any,
                                                                                                             str]]:
    """(ours, theirs) → the operation, and the first layer that has them; {i} is the layer, {e} an expert."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[Any, str]] = {}
    for name in parameters:
        layer, pattern = _split_layer(name)
        ways = ((own, one) for own in (name, pattern) for one in INSIDE if own.endswith(one))
        own, leaf = next(((own, one) for own, one in ways if own.removesuffix(one) in names), ("", None))
        if leaf is None:
            raise ConfigError(f"this model cannot be flattened: its family has no name for {name}")
        rule = names[own.removesuffix(leaf)]
        key = tuple(one + leaf for one in rule.ours), tuple(one + INSIDE[leaf] for one in rule.theirs)
        found.setdefault(key, (rule.op, layer))
    return found


def function_of(op: Any) -> str:
    """The function of arrange.py that an operation is."""
    if isinstance(op, Transposed):
        return "transposed"
    kind = (op if isinstance(op, type) else type(op)).__name__
    if kind == "ByHead":
        return f"by_{op.heads.__name__}"
    name = "qkvz" if kind == "QKVZ" else re.sub("(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    if not hasattr(arrange, name):
        raise ConfigError(f"this model cannot be flattened yet: checkpoints.flatten.arrange has no function for the "
                          f"operation {kind} of its table of names")
    return name


def naming(model: Decoder, names: Table, constants: Constants) -> list[str]:
    """NAMES, ARRANGED, the functions that ARRANGED needs, as lines."""
    plain, moved, functions = ["NAMES = {", ], [], {}
    found = rows(names, dict(model.named_parameters()))
    single = [key for key in found if re.match(r"layers\.\d", key[0][0])]     # names that one layer alone has: last
    for ours, theirs in [*(key for key in found if key not in single), *single]:
        op, layer = found[ours, theirs]
        if op is Same and len(ours) == 1 and "{e}" not in theirs[0]:
            line = f'    "{ours[0]}": "{theirs[0]}",'
            plain += [line] if len(line) <= WIDTH else line.replace(": ", ":\n        ").split("\n")
            continue
        name = function_of(op)
        functions[name] = arranged(name, model, layer, constants)
        moved.append(f"    ({list(ours)}, {list(theirs)}, {name}),".replace("'", '"'))
    lines = ["# parameter here: tensor in the folder", *plain, "}"]
    for text in functions.values():
        lines += ["", "", *text]
    if moved:
        lines += ["", "", "# parameters here, tensors in the folder, and how those become these", "ARRANGED = [",
                  *moved, "]"]
    return lines


def arranged(name: str, model: Decoder, layer: str, constants: Constants) -> list[str]:
    """A function of arrange.py with the numbers of the layer."""
    code = Code(arrange.__name__, name)
    node = code.node
    lines = code.source.lines(node.lineno, node.end_lineno or 0)
    text = "\n".join(lines).replace("Tensors", "list[Tensor]")
    if not layer:
        return text.splitlines()
    mixer: nn.Module = model.layers[int(layer)].mixer           # type: ignore[assignment]  # a layer has one
    config: Any = getattr(mixer, "config", None)
    for word, field in FIELDS.items():
        if re.search(rf"\b{word}\b", text):
            number = constants.name([config], field) or str(getattr(config, field))
            text = re.sub(rf"\b{word}\b", number, text)
    return text.splitlines()
