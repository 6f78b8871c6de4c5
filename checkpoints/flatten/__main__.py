"""python -m checkpoints.flatten MODEL: what it makes is said in `__init__.py`."""

import argparse
from pathlib import Path

from checkpoints import flatten
from nanollm import cli


def run() -> None:
    """The command."""
    parser = cli.Parser(prog="python -m checkpoints.flatten", description=flatten.__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL",
                        help="model folder or config.json of Hugging Face's layout, owner/name on the hub, or preset")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the file goes (default: standard output)")
    parser.add_argument("--train", action="store_true", help="a training loop on the bytes of a text, in place of load")
    args = parser.parse_args()
    text = flatten.flatten(args.source, args.train)
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text)
        lines = text.count("\n")
        print(f"{args.out}: {lines} lines")


if __name__ == "__main__":
    cli.main(run)
