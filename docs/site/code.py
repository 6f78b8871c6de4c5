"""Code as HTML: a line at a time, with its number, its colours, the links of its names, and the shapes beside it.

    <span class=line id=L12>   12   │   q, k = rotate(q, …), …   │   q (B 3, H 8, T 7, d 10)   k (B 3, K 2, T 7, d 10)
"""

import functools
from collections.abc import Callable
from html import escape

from pygments.lexer import Lexer
from pygments.lexers import PythonLexer, TextLexer, get_lexer_for_filename
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String, _TokenType
from pygments.util import ClassNotFound

from docs.site.names import Place
from docs.site.shapes import Seen

COLOURS = ((Comment, "c"), (String, "s"), (Keyword, "k"), (Operator.Word, "k"), (Number, "n"), (Name.Decorator, "k"),
           (Name.Function, "f"), (Name.Class, "f"), (Operator, "o"), (Punctuation, "o"))
Links = dict[tuple[int, int], Place]


def lexer_for(name: str) -> Lexer:
    try:
        return get_lexer_for_filename(name, stripnl=False)
    except ClassNotFound:
        return TextLexer(stripnl=False)


@functools.cache
def colour(kind: _TokenType) -> str:
    return next((name for parent, name in COLOURS if kind in parent), "")


def highlighted(text: str, lexer: Lexer | None = None, links: Links | None = None,
                address: Callable[[Place], str] = lambda place: "") -> list[str]:
    """Each line of a text as HTML."""
    lines: list[list[str]] = [[]]
    number, column = 1, 0
    for _, kind, value in (lexer or PythonLexer(stripnl=False)).get_tokens_unprocessed(text):
        for i, part in enumerate(value.split("\n")):
            if i:
                lines.append([])
                number, column = number + 1, 0
            if not part:
                continue
            place = (links or {}).get((number, column)) if kind in Name or kind in Keyword else None
            html = escape(part, quote=False)
            if place is not None:
                title = f' title="{escape(place.title)}"' if place.title else ""
                html = f'<a href="{address(place)}"{title}>{html}</a>'
            css = colour(kind)
            lines[-1].append(f"<span class={css}>{html}</span>" if css else html)
            column += len(part)
    return ["".join(line) for line in lines]


def code_line(number: int, html: str, shapes: str = "") -> str:
    """One line, which can be linked to."""
    beside = f"<span class=shapes>{shapes}</span>" if shapes else ""
    return f'<span class=line id=L{number}><span class=text><a class=no href="#L{number}">{number}</a>' \
           f"<span class=src>{html or ' '}</span></span>{beside}</span>"


def shape_html(seen: Seen, letters: list[str | None], declared: dict[str, str]) -> str:
    """q (B 3, H 8, T 7, d 10); a letter says its words to whoever hovers."""
    sizes = []
    for size, letter in zip(seen.shape, letters, strict=True):
        if letter is None:
            sizes.append(str(size))
        else:
            words = f"{letter}: {declared[letter]}" if letter in declared else letter
            sizes.append(f'<var title="{escape(words)}">{letter}</var><sub>{size}</sub>')
    given = ",".join(map(str, seen.shape))
    return f'<span class=shape data-name="{escape(seen.name)}" data-shape="{given}" title="measured in: ' \
           f'{escape(seen.scene)}"><b>{escape(seen.name)}</b> ({", ".join(sizes)})</span>'

