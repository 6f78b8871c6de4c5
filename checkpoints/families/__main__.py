"""python -m checkpoints.families [MODEL_TYPE]: the families that are read, or what the tables of one say.

    python -m checkpoints.families            model_types, and the file of each
    python -m checkpoints.families qwen3      its keys of config.json and their fields, its tensors and their parameters
"""

import argparse
import difflib
import importlib
import json

from checkpoints.families import FAMILIES, FILES
from checkpoints.families.family import Family
from checkpoints.names.config_table import Key, Row
from checkpoints.names.reader import NEEDED
from nanollm import cli
from nanollm.errors import ConfigError


def listed() -> list[str]:
    """One line a file: its model_types, and what its docstring begins with."""
    lines = []
    for name in dict.fromkeys(FILES.values()):
        kinds = ", ".join(kind for kind in FAMILIES if FILES[kind] == name)
        about = (importlib.import_module(f"checkpoints.families.{name}").__doc__ or "").split("\n")[0]
        lines.append(f"{kinds:34} {about}")
    return lines


def described(kind: str, family: Family) -> list[str]:
    """The tables of a family: keys and tensors."""
    lines = [f"model_type {kind}, written as {family.name}: {family.architecture}", "", "config.json"]
    rows = [(key, row.says(), missing(row)) for key, row in family.keys.items()]
    wide = max([len(key) for key, _, _ in rows], default=0)
    lines += [f"    {key:{wide}}  {says}{said}" for key, says, said in rows]
    if family.irrelevant:
        lines += ["    passed over: " + ", ".join(sorted(family.irrelevant))]
    lines += ["", "tensors"]
    rules = dict.fromkeys(family.names[0].values())
    wide = max([len(", ".join(rule.theirs)) for rule in rules], default=0)
    lines += [f"    {', '.join(rule.theirs):{wide}}  {', '.join(rule.ours)}" for rule in rules]
    return lines


def missing(row: Row) -> str:
    """What a missing key means, in words."""
    if not isinstance(row, Key):
        return ""
    if row.missing is NEEDED:
        return "; must stand"
    return "; missing: " + ("as the fields above say" if callable(row.missing) else json.dumps(row.missing))


def run() -> None:
    """The command."""
    parser = cli.Parser(prog="python -m checkpoints.families", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", metavar="MODEL_TYPE",
                        help="a model_type, as config.json says it; without one all are listed")
    kind = parser.parse_args().kind
    if kind is not None and kind not in FAMILIES:
        near = ", ".join(difflib.get_close_matches(kind, FAMILIES, 3))
        raise ConfigError(f"no model_type {kind!r}; "
                          + (f"near it are {near}" if near else "without an argument all are listed"))
    print("\n".join(listed() if kind is None else described(kind, FAMILIES[kind])))


if __name__ == "__main__":
    cli.main(run)
