"""Pictures as SVG, written line by line: small, light or dark as the reader's screen is, and the same bytes everywhere.

A number of the library has a few digits that depend on the processor. What is drawn is rounded to a tenth of a pixel,
and a coordinate so near to the edge between two tenths that those digits could decide is an error, not a coin toss:

    11.9   12.0   12.1   12.2            12.05 ± EDGE: ValueError; who draws moves the picture a little
       ├──────┼──────┤

Colours are classes: a … f for lines (a is blue, f grey), the same with "fill", and shades of them by `strength`.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from html import escape

EDGE, SHADE = 1e-4, 1e-5        # px, and of an opacity; float32 has seven digits, a coordinate here needs four
STYLE = """
    svg { color: #1f2328; --card: #ffffff; --rim: #d0d7de; --a: #2a6cb8; --b: #c2600f; --c: #23854f; --d: #7d4fd1;
      --e: #c23b4e; --f: #6e7781 }
    @media (prefers-color-scheme: dark) { svg { color: #e6edf3; --card: #15191f; --rim: #3d444d; --a: #6ea8ee;
      --b: #eb9a4c; --c: #5dc08a; --d: #b395f5; --e: #f0798a; --f: #9aa5b1 } }
    .card { fill: var(--card); stroke: var(--rim) }    .axis { fill: none; stroke: currentColor; stroke-opacity: .6 }
    .grid { fill: none; stroke: currentColor; stroke-opacity: .12 }    text { fill: currentColor }
    .dim { fill: var(--f) }    .mid { text-anchor: middle }    .end { text-anchor: end }
    .small { font-size: 11px }    .tiny { font-size: 9px }    .head { font-weight: 600 }
    .dash { stroke-dasharray: 5 4 }
"""
STYLE += "\n".join(f"    .{hue} {{ fill: none; stroke: var(--{hue}); stroke-width: 1.8; stroke-linejoin: round }}"
                   f"    .fill.{hue}, text.{hue} {{ fill: var(--{hue}); stroke: none }}"
                   for hue in "abcdef")
Point = tuple[float, float]


def px(value: float) -> str:
    """A coordinate to a tenth of a pixel: 12.3, 12. Raises ValueError where it lies on the edge between two tenths."""
    nearest = round(10 * value)
    if abs(abs(10 * value - nearest) - 0.5) < 10 * EDGE:
        raise ValueError(f"{value!r} px lies between two tenths: move the picture, or take another number of points")
    return f"{nearest / 10:g}"


class Picture:
    """width × height pixels, on a card. `title` is what a screen reader says."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            'font-family="ui-sans-serif, system-ui, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>",
            f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>']

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """kind: mid, end, small, dim, head, or a colour."""
        self.parts.append(f'<text class="{kind}" x="{px(x)}" y="{px(y)}">{escape(words, quote=False)}</text>'
                          .replace(' class=""', ""))

    def line(self, points: Iterable[Point], kind: str) -> None:
        """Through all points."""
        self.parts.append(f'<path class="{kind}" d="M{"L".join(f"{px(x)} {px(y)}" for x, y in points)}"/>')

    def boxes(self, boxes: Iterable[tuple[float, float, float, float]], kind: str, strength: float = 1) -> None:
        """Filled rectangles of one colour, (x, y, width, height). strength: their opacity, in steps of 0.05."""
        drawn = "".join(f"M{px(x)} {px(y)}h{px(w)}v{px(h)}h{px(-w)}z" for x, y, w, h in boxes)
        opacity = "" if strength == 1 else f' fill-opacity="{strength:g}"'
        self.parts.append(f'<path class="fill {kind}"{opacity} d="{drawn}"/>' if drawn else "")

    def dots(self, points: Iterable[Point], kind: str, radius: float = 3) -> None:
        """Filled circles."""
        self.parts += [f'<circle class="fill {kind}" cx="{px(x)}" cy="{px(y)}" r="{px(radius)}"/>' for x, y in points]

    def cells(self, x: float, y: float, size: float, rows: Sequence[Sequence[tuple[str, float] | None]]) -> None:
        """A matrix: each cell a colour and a strength from 0 to 1, or None for an empty one, whose place is marked."""
        places: dict[tuple[str, float], list[tuple[float, float, float, float]]] = {}
        for i, row in enumerate(rows):
            for j, cell in enumerate(row):
                kind, strength = cell or ("f", 0.1)
                twentieths = max(2, round(20 * strength))
                if abs(abs(20 * strength - round(20 * strength)) - 0.5) < 20 * SHADE:
                    raise ValueError(f"a strength of {strength!r} lies between two shades")
                places.setdefault((kind, twentieths / 20), []).append((x + j * size, y + i * size, size - 1, size - 1))
        for (kind, strength), boxes in places.items():
            self.boxes(boxes, kind, strength)

    def __str__(self) -> str:
        return "\n".join(filter(None, [*self.parts, "</svg>", ""]))


class Axes:
    """A frame in a picture, and where numbers lie in it. Ticks are numbers and what is written at them."""

    def __init__(self, picture: Picture, frame: tuple[float, float, float, float], x: Point, y: Point, *,
                 across: Callable[[float], float] = float, up: Callable[[float], float] = float) -> None:
        """frame: left, top, width, height. x, y: the numbers at its ends. across, up: math.log10 for a log scale."""
        self.picture, self.frame, self.across, self.up = picture, frame, across, up
        self.x, self.y = tuple(map(across, x)), tuple(map(up, y))

    def at(self, x: float, y: float) -> Point:
        """The place of a point."""
        left, top, width, height = self.frame
        (x0, x1), (y0, y1) = self.x, self.y
        return (left + width * (self.across(x) - x0) / (x1 - x0), top + height * (y1 - self.up(y)) / (y1 - y0))

    def ticks(self, x: Iterable[tuple[float, str]], y: Iterable[tuple[float, str]]) -> None:
        """Lines and labels, and the two axes."""
        left, top, width, height = self.frame
        for value, words in x:
            place, _ = self.at(value, 1)
            self.picture.line([(place, top), (place, top + height)], "grid")
            self.picture.text(place, top + height + 16, words, "mid small dim")
        for value, words in y:
            _, place = self.at(1, value)
            self.picture.line([(left, place), (left + width, place)], "grid")
            self.picture.text(left - 6, place + 4, words, "end small dim")
        self.picture.line([(left, top), (left, top + height), (left + width, top + height)], "axis")

    def named(self, title: str, x: str, y: str = "") -> None:
        """A title above, the name of x below; that of y stands at the top of its axis, upright. Any may be empty."""
        left, top, width, height = self.frame
        places = ((left, top - 28, title, "head"), (left + width / 2, top + height + 34, x, "mid small"),
                  (left, top - 10, y, "small dim"))
        for at, down, words, kind in places:
            if words:
                self.picture.text(at, down, words, kind)

    def curve(self, points: Iterable[Point], kind: str) -> None:
        """A line through points."""
        self.picture.line([self.at(*point) for point in points], kind)

    def dots(self, points: Iterable[Point], kind: str, radius: float = 3) -> None:
        """A dot at each point."""
        self.picture.dots([self.at(*point) for point in points], kind, radius)

    def bars(self, points: Iterable[Point], kind: str, width: float = 10, strength: float = 1) -> None:
        """A bar from the ground to each point."""
        ground = self.frame[1] + self.frame[3]
        places = [self.at(*point) for point in points]
        self.picture.boxes([(x - width / 2, y, width, ground - y) for x, y in places], kind, strength)


def legend(picture: Picture, x: float, y: float, names: Iterable[tuple[str, str]], step: float = 18) -> None:
    """Colours and what they stand for, one below the other."""
    for i, (kind, words) in enumerate(names):
        picture.line([(x, y + i * step - 4), (x + 18, y + i * step - 4)], kind)
        picture.text(x + 24, y + i * step, words, "small")


def normal(rows: int, columns: int, seed: int) -> list[list[float]]:
    """Numbers from N(0, 1), the same on every machine: Python's generator is, torch's is not."""
    draw = random.Random(seed)
    return [[draw.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]
