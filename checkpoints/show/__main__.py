"""python -m checkpoints.show FOLDER: what there is to draw is said in `__init__.py`."""

import argparse

from checkpoints import show
from nanollm import cli


def run() -> None:
    """The command."""
    parser = cli.Parser(prog="python -m checkpoints.show", description=show.__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FOLDER",
                        help="model folder, config.json, params.json or *.gguf, owner/name on the hub, or preset")
    parser.add_argument("--context", type=cli.whole(), metavar="N",
                        help=f"number of tokens that the costs are for (default {show.CONTEXT}, or as many as the "
                        "model was trained for)")
    parser.add_argument("--json", action="store_true", help="the same for machines")
    args = parser.parse_args()
    found = show.find(args.source)
    print((show.facts if args.json else show.describe)(found.config, args.context, found.dtype, found.weights))


if __name__ == "__main__":
    cli.main(run)
