"""python -m checkpoints.show FOLDER: what there is to draw is said in `__init__.py`."""

import argparse

from checkpoints import show
from checkpoints.layouts import Asked
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
    parser.add_argument("--family", metavar="MODEL_TYPE",
                        help="model_type, for a folder that does not say, or says something else")
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME",
                        help="config key, of those that reading complains of, to pass over; may be repeated")
    parser.add_argument("--allow-pickle", action="store_true",
                        help="permission to read the shapes in .bin and .pth files, from people you trust")
    args = parser.parse_args()
    found = show.find(args.source, Asked(args.family, args.allow_pickle, tuple(args.ignore)))
    print((show.facts if args.json else show.describe)(found.config, args.context, found.dtype, found.weights))


if __name__ == "__main__":
    cli.main(run)
