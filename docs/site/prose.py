"""What stands in a docstring or a comment, as HTML: paragraphs, equations, drawings, links.

    block       lines without a blank one between; indented by four: a drawing, code, or equations; else a paragraph
    equations   a block of which at least half of the lines have one (equations.py); their glosses go beside them,
                and a line that has none stays as it is written
    links       `names`, files (mask.py), arXiv numbers and their sections, addresses
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from html import escape

from docs.site.equations import is_equation, mathml

DRAWN = re.compile(r"[─│┌└┐┘├┬┴┤┼▣▒▲▼↓↑]")
ARXIV = r"arXiv (?P<paper>\d{4}\.\d{4,5})(?P<version>v\d+)?"
SECTION = r"§(?P<section>[\d.]*\d)"
CODE = r"(?P<code>`[^`]+`)"
EMPHASIS = r"(?P<emphasis>(?<![\w*])\*[^*\s](?:[^*]*[^*\s])?\*(?![\w*]))"
SYMBOL = r"(?P<symbol>(?<![\w.`/^·])[A-Za-zΑ-ω]\u0302?(?:_(?:\{[^}\s]+\}|[A-Za-z0-9])|\^[A-Z]{1,3}){1,2}" \
    r"(?![\w(^ᵀ·]|[.,]\w))"                             # q_i, h_{t−1}, W^KR; no part of something longer
ADDRESS = r"(?P<address>https?://[^\s)>,]+)"
FILE = r"(?P<file>(?<![\w/.])[\w/]+\.(?:py|md)\b)"
INLINE = re.compile("|".join((CODE, EMPHASIS, ARXIV, SECTION, SYMBOL, ADDRESS, FILE)))
NEW_HTML = 2312                         # arXiv has its own pages with anchors of papers from December 2023 on


@dataclass
class Prose:
    """How the texts of one file are written.

    link: from what stands in backticks, or the name of a file, to an address; None where there is none.
    words: the names of the file's code, which may stand in equations. counts: rendered equations, and lines left.
    """
    link: Callable[[str], str | None]
    words: Collection[str] = ()
    rendered: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def html(self, text: str) -> str:
        """All of a docstring."""
        self.paper: str | None = None
        blocks = re.split(r"\n[ \t]*\n", text.strip("\n"))
        return "\n".join(part for block in blocks for part in self.block(block.rstrip()))

    def block(self, block: str) -> list[str]:
        """Its paragraph, and the indented lines after it (or before)."""
        found, lines = [], block.split("\n")
        while lines:
            indented = lines[0].startswith("    ")
            end = next((i for i, line in enumerate(lines) if line.startswith("    ") != indented), len(lines))
            part, lines = lines[:end], lines[end:]
            if indented and any(DRAWN.search(line) for line in part):       # a drawing goes on where it is not indented
                part, lines = part + lines, []
            found.append(self.indented(part) if indented else self.paragraph(part))
        return [part for part in found if part]

    def paragraph(self, lines: list[str]) -> str:
        if all(line.startswith(("- ", "  ")) for line in lines) and lines[0].startswith("- "):
            items = re.split(r"(?:^|\n)- ", "\n".join(lines))[1:]
            drawn = (self.inline(" ".join(item.split()), symbols=True) for item in items)
            return f"<ul>{''.join(f'<li>{item}</li>' for item in drawn)}</ul>"
        if any(DRAWN.search(line) for line in lines):
            return self.drawing(lines)
        text = " ".join(line.strip() for line in lines)
        return f"<p>{re.sub(r' {2,}', '&emsp;', self.inline(text, symbols=True))}</p>" if text else ""

    def drawing(self, lines: list[str]) -> str:
        least = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        return f"<pre class=drawing>{self.inline(chr(10).join(line[least:] for line in lines), drawn=True)}</pre>"

    def indented(self, lines: list[str]) -> str:
        """Equations if they are such, else as it is written."""
        if any(DRAWN.search(line) for line in lines):
            return self.drawing(lines)
        rows = [self.row(line.strip()) for line in lines]
        equations = [sum(drawn is not None for _, drawn in row) for row in rows]
        if 2 * sum(count > 0 for count in equations) < len(rows):
            self.left += [line.strip() for line, row in zip(lines, rows, strict=True) if any(map(claims, row))]
            return self.drawing(lines)
        self.rendered += [text for row in rows for text, drawn in row if drawn is not None]
        self.left += [text for row in rows for text, drawn in row if drawn is None and is_equation(text)]
        width = max(len(row) for row, count in zip(rows, equations, strict=True) if count)
        html = []
        for line, row, count in zip(lines, rows, equations, strict=True):
            if not count:
                html.append(f"<tr><td colspan={width}><pre>{self.inline(line[4:], drawn=True)}</pre></td></tr>")
                continue
            cells = [f"<td class=math>{drawn}</td>" if drawn is not None else f"<td>{self.inline(text)}</td>"
                     for text, drawn in row]
            if len(cells) < width:
                cells[-1] = cells[-1].replace("<td", f"<td colspan={width - len(cells) + 1}", 1)
            html.append(f"<tr>{''.join(cells)}</tr>")
        return f"<div class=equations><table>{''.join(html)}</table></div>"

    def row(self, line: str) -> list[tuple[str, str | None]]:
        """The cells of a line, which two spaces part; an equation lined up at its = is one cell. With their MathML."""
        cells: list[str] = []
        for cell in re.split(r"\s{2,}", line):
            if cells and cell[:2] in ("= ", "≈ ", "← "):
                cells[-1] += f" {cell}"
            else:
                cells.append(cell)
        return [(cell, mathml(cell, self.words) if is_equation(cell) else None) for cell in cells]

    # ---- inside of a line

    def inline(self, text: str, symbols: bool = False, drawn: bool = False) -> str:
        """Escaped, with its links. A § belongs to the paper that was named last.

        symbols: h_t is drawn as one. drawn: in a drawing nothing may change its width, so marks stay as they are.
        """
        found, at = [], 0
        for match in INLINE.finditer(text):
            found += [escape(text[at : match.start()], quote=False), self.linked(match, symbols, drawn)]
            at = match.end()
        return "".join(found) + escape(text[at:], quote=False)

    def linked(self, match: re.Match[str], symbols: bool, drawn: bool) -> str:
        text = escape(match.group(), quote=False)
        if match["code"]:
            target = self.link(match["code"].strip("`"))
            text = text if drawn else f"<code>{text.strip('`')}</code>"
            return f'<a href="{target}">{text}</a>' if target else text
        if match["symbol"]:
            known = not symbols or match.group() in self.words
            return text if known else mathml(match.group(), self.words, block=False) or text
        if match["emphasis"]:
            return text if drawn else f"<em>{text.strip('*')}</em>"
        if match["paper"]:
            self.paper = match["paper"]
            return f'<a class=paper href="https://arxiv.org/abs/{match["paper"]}{match["version"] or ""}">{text}</a>'
        if match["section"]:
            return f'<a class=paper href="{section_address(self.paper, match["section"])}">{text}</a>' \
                if self.paper else text
        if match["address"]:
            return f'<a class=paper href="{text}">{text}</a>'
        target = self.link(match["file"])
        return f'<a href="{target}">{text}</a>' if target else text


def claims(cell: tuple[str, str | None]) -> bool:
    return is_equation(cell[0])


def section_address(paper: str, section: str) -> str:
    """A section of a paper as a web page: S3, S3.SS2, S3.SS2.SSS1 are the anchors that LaTeX's converter gives."""
    anchor = ".".join("S" * (depth + 1) + number for depth, number in enumerate(section.split(".")[:3]))
    host = "arxiv.org" if int(paper[:4]) >= NEW_HTML else "ar5iv.labs.arxiv.org"
    return f"https://{host}/html/{paper}#{anchor}"
