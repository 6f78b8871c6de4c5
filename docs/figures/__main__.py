"""python -m docs.figures [NAME …]: write figures beside their scripts, all of them or some."""

import sys

from docs.figures import FOLDER, NAMES, draw

if unknown := set(sys.argv[1:]) - set(NAMES):
    sys.exit(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
for name in sys.argv[1:] or NAMES:
    path = FOLDER / f"{name}.svg"
    path.write_text(draw(name), encoding="utf-8", newline="\n")
    print(f"{path.name:24}{path.stat().st_size:7,} bytes")
