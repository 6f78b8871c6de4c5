"""Markdown as HTML: README.md, docs/*.md and the like, with the house's own links and anchors.

A link to a file of the repository becomes one to its page; what is linked and has no page yet is handed to `wanted`, so
that it gets one. Anchors of titles are those of GitHub, which the pages were written for.
"""

import posixpath
import re
from collections.abc import Callable
from html import escape

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from docs.site.code import highlighted


def slug(title: str) -> str:
    """A title as its anchor."""
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


def plain(token: Token) -> str:
    """The words of a title, without its marks."""
    return "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))


def coloured(text: str, language: str, _: str) -> str:
    """A block of code, for markdown-it."""
    try:
        lines = highlighted(text.rstrip("\n"), get_lexer_by_name(language, stripnl=False)) if language else []
    except ClassNotFound:
        lines = []
    return "\n".join(lines) if lines else escape(text.rstrip("\n"), quote=False)


def render(text: str, path: str, address: Callable[[str, str], str | None]) -> tuple[str, list[tuple[str, str]]]:
    """The page of a Markdown file, and its titles with their anchors. address(file, anchor): where a link leads."""
    reader = MarkdownIt("commonmark", {"highlight": coloured}).enable("table")
    tokens, titles, seen = reader.parse(text), [], {""}
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            title = plain(tokens[i + 1])
            anchor = name = slug(title)
            while anchor in seen:
                anchor = f"{name}-{len(seen)}"
            seen.add(anchor)
            token.attrSet("id", anchor)
            titles.append((title, anchor))
        links(token, path, address)
    html = reader.renderer.render(tokens, reader.options, {})
    html = re.sub(r"<table>.*?</table>", r"<div class=wide>\g<0></div>", html, flags=re.DOTALL)
    return html, titles


def links(token: Token, path: str, address: Callable[[str, str], str | None]) -> None:
    """Turn the links and pictures of a paragraph to what the site has; one that leads nowhere is text."""
    for child in token.children or []:
        key = {"link_open": "href", "image": "src"}.get(child.type)
        target = child.attrGet(key) if key else None
        if key is None or target is None or re.match(r"\w+:", str(target)):
            continue
        file, _, anchor = str(target).partition("#")
        full = posixpath.normpath(posixpath.join(posixpath.dirname(path), file)) if file else path
        found = address(full, anchor)
        if found is None:
            child.tag, child.attrs = "span", {"class": "elsewhere"}
        else:
            child.attrSet(key, found)
    stack = []
    for child in token.children or []:                  # the end of a link that has become text ends that
        if child.type == "link_open":
            stack.append(child.tag)
        elif child.type == "link_close" and stack:
            child.tag = stack.pop()
