"""python -m docs.gallery [--sizes NAME=config.json …]: what it does is said in `__init__.py`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import docs.gallery
from checkpoints.families import read_config
from checkpoints.show import costs
from checkpoints.show.drawing import kinds_of
from nanollm.config.positions import places
from nanollm.errors import NanollmError

FOLDER = Path(__file__).parent
SIZES, PAGE = FOLDER / "sizes.json", FOLDER.parent / "gallery.html"
SHORT, LONG = 64, 32_768         # no published window is full at SHORT; the smallest has 128 keys


def size(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, from a config.json."""
    family, config = read_config({k: v for k, v in values.items() if k != "quantization_config"})
    kinds = kinds_of(config)
    fits = (places(config.positions) or LONG) >= LONG
    short = costs(config, kinds, SHORT, torch.bfloat16)
    return {"name": name, "model_type": values.get("model_type", family.name), "parameters": short.parameters,
            "active": short.active, "layers": len(config.layers), "token": short.grows,
            "cache": costs(config, kinds, LONG, torch.bfloat16).cache if fits else None}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m docs.gallery", description=docs.gallery.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[], metavar="NAME=FILE", help="config.json of published models")
    known = {one["name"]: one for one in json.loads(SIZES.read_text())} if SIZES.exists() else {}
    for pair in parser.parse_args().sizes:
        name, _, file = pair.partition("=")
        try:
            known[name] = size(name, json.loads(Path(file).read_text()))
        except (OSError, ValueError, NanollmError) as error:
            parser.error(f"{pair}: {error}")
    rows = [json.dumps(known[name]) for name in sorted(known)]
    SIZES.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    PAGE.write_text(written(), encoding="utf-8", newline="\n")


def written() -> str:
    """The page, from the fixtures and the record of sizes."""
    from docs.gallery.families import families
    from docs.gallery.page import page
    return page(families(), json.loads(SIZES.read_text()))


if __name__ == "__main__":
    main()
