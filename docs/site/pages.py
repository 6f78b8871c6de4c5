"""The frame of every page, the page of a source file, and the front page."""

import posixpath
from collections import Counter
from collections.abc import Container, Iterable
from html import escape

from docs.site.code import code_line, shape_html
from docs.site.shapes import Seen
from docs.site.weave import Row


def page(title: str, path: str, body: str, kind: str) -> str:
    """A whole page. path: where it lies, from the root of the site; kind: which style it has."""
    root = posixpath.relpath(".", posixpath.dirname(path) or ".") + "/"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · nanollm</title>
<link rel="stylesheet" href="{root}style.css">
<body class={kind}>
<header class=bar>
<a class=brand href="{root}index.html">nanollm</a>
<nav><a href="{root}index.html#order">Reading order</a> <a href="{root}index.html#guides">Guides</a>
<a href="{root}index.html#files">Files</a></nav>
<div class=search><input type="search" placeholder="Search names" aria-label="Search names" autocomplete="off"
 spellcheck="false"><ol hidden></ol></div>
</header>
<main>
{body}
</main>
<script src="{root}script.js" data-root="{root}"></script>
</body>
</html>
"""


def crumbs(path: str, home: str, listed: Container[str]) -> str:
    """Where a file lies: each folder that is listed leads to its place in the list of files."""
    *folders, name = path.split("/")
    said = []
    for i, folder in enumerate(folders):
        whole = "/".join(folders[: i + 1])
        said.append(f'<a href="{home}#{whole}/">{folder}</a>' if whole in listed else folder)
    return f'<nav class=crumbs>{" / ".join([*said, f"<b>{escape(name)}</b>"])}</nav>'


def shapes_beside(seen: dict[int, list[tuple[Seen, list[str | None]]]], declared: dict[str, str],
                  main: str) -> dict[int, str]:
    """For each line what stands beside it. Of a scene that is not the page's main one, its name comes first."""
    found, before = {}, main
    for line in sorted(seen):
        scene = seen[line][0][0].scene
        said = f"<i>in {escape(scene)}:</i> " if scene != before and scene != main else ""
        found[line] = said + " ".join(shape_html(one, letters, declared) for one, letters in seen[line])
        before = scene
    return found


def main_scene(seen: dict[int, list[tuple[Seen, list[str | None]]]]) -> str:
    """That in which most lines of a file were measured."""
    count = Counter(values[0][0].scene for values in seen.values())
    return count.most_common(1)[0][0] if count else ""


def source_page(path: str, head: str, rows: list[Row], said: list[str], lines: list[str], shapes: dict[int, str],
                measured: str, around: str, way: str) -> str:
    """The body of a file's page. head and said: HTML, of the head and of each row; lines: the code's HTML;
    way: the crumbs."""
    outline = " ".join(f'<a href="#L{row.start}">{escape(row.title)}</a>' for row in rows
                       if row.title and "." not in row.title)
    lead = head.replace("<p>", "<h1>", 1).replace("</p>", "</h1>", 1) if head.startswith("<p>") else head
    lead = lead or f"<h1>{escape(path)}</h1>"
    about = measured + (f"<nav class=outline>{outline}</nav>" if outline else "")     # beside the imports
    body = [way, f"<article class=head>{lead}</article>", "<div class=weave>"]
    for row, prose in zip(rows, said, strict=True):
        prose, about = about + prose, ""
        code = "".join(code_line(n, lines[n - 1], shapes.get(n, "")) for n in row.lines)
        at = "" if row.start in row.lines else f" id=L{row.start}"
        title = f"<h3>{escape(row.title)}</h3>" if row.title else ""
        body.append(f"<section class=row{at}><div class=prose>{title}{prose}</div>"
                    f"<div class=code tabindex=0>{code}</div></section>")
    return "\n".join([*body, "</div>", around])


def front_page(order: Iterable[tuple[str, str, str]], guides: Iterable[tuple[str, str, str]],
               folders: Iterable[tuple[str, list[tuple[str, str, str]]]], picture: str) -> str:
    """Where a reader begins. Each entry: name, address, what it is about (HTML)."""
    steps = "".join(f'<li><a href="{address}"><b>{name}</b></a><span>{about}</span></li>'
                    for name, address, about in order)
    pages = "".join(f'<li><a href="{address}">{name}</a> <span>{about}</span></li>' for name, address, about in guides)
    rooms = "".join(
        f'<h3 id="{folder}/">{folder or "the scripts"}{"/" if folder else ""}</h3><ul>' + "".join(
            f'<li><a href="{address}">{name}</a> <span>{about}</span></li>' for name, address, about in files) + "</ul>"
        for folder, files in folders)
    return f"""<section class=hero>
<h1>nanollm</h1>
<p>Modern language-model decoders from scratch, in plain PyTorch. Here every file stands beside what it says of itself:
equations first, then the code, with the shape of each tensor as it was measured, and names that lead to their
definition.</p>
<p class=learn>New to language models? <a href="docs/learn.md.html">Learn</a> goes from a token to a fork on 4 GPUs, in
twelve steps.</p>
</section>
<section id=order><h2>Read a decoder in this order</h2><ol class=steps>{steps}</ol></section>
<section><h2>The rooms</h2><figure class=map><img src="{picture}"
 alt="Left: the decoder, from tokens to logits. Right: the packages, and which imports which."></figure></section>
<section id=guides><h2>Guides</h2><ul class=list>{pages}</ul></section>
<section id=files class=files><h2>All files</h2>{rooms}</section>"""
