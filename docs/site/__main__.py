"""Write the documentation as web pages, from the sources alone.

    python -m docs.site                     into build/site; open build/site/index.html, no server is needed
    python -m docs.site --out FOLDER

Needs pip install -e ".[docs]".
"""

import argparse
import time
from pathlib import Path

parser = argparse.ArgumentParser(prog="python -m docs.site", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("build/site"), help="the folder, which is emptied first")


def run() -> None:
    """Build it, and say what is there."""
    args, begin = parser.parse_args(), time.monotonic()
    from docs.site.build import Site
    counts = Site(Path(__file__).parent.parent.parent).write(args.out)
    print(f"{args.out}/index.html: {counts.pages} pages in {time.monotonic() - begin:.0f} s; {counts.shapes} shapes "
          f"measured; {counts.linked:,} of {counts.names:,} names linked; {len(counts.equations)} equations drawn, "
          f"{len(counts.left)} left as text")


if __name__ == "__main__":
    run()
