"""Build the site: read the sources, measure the shapes, write the pages.

    nanollm/ kernels/ checkpoints/ examples/ docs/ and the scripts  ─┬─ names    links ─────┐
                                                                     ├─ scenes   shapes ────┤
                                                                     └─ weave    rows ──────┴─ pages ─┐
    README.md, docs/*.md …                                           ─── guides ──────────────────────┴─ build/site
                                                                                                         index.js
A page lies where its file does, with .html behind its name. What the guides link to beside all that (tests, LICENSE)
becomes a page of plain code. index.js holds every name, for the search box: a script, since a page that was opened
from a folder may not fetch.
"""

import ast
import inspect
import io
import json
import keyword
import posixpath
import shutil
import tokenize
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from docs.site import guides, pages
from docs.site.code import Links, code_line, highlighted, lexer_for
from docs.site.names import Class, Sources
from docs.site.prose import Prose
from docs.site.scenes import ROUNDS, scenes
from docs.site.shapes import Recorder, Seen, expressions, legend, lettered
from docs.site.weave import Row, weave

FOLDERS = ("nanollm", "kernels", "checkpoints", "examples", "docs")
ORDER = ("nanollm/config/__init__.py", "nanollm/config/parts.py", "nanollm/block.py", "nanollm/layers/attention.py",
         "nanollm/layers/linear.py", "nanollm/layers/norm.py", "nanollm/layers/rope.py", "nanollm/layers/mask.py",
         "nanollm/layers/mlp.py", "nanollm/model.py")
Beside = dict[int, list[tuple[Seen, list[str | None]]]]


@dataclass
class Counts:
    """What was done, for the line at the end."""
    pages: int = 0
    names: int = 0
    linked: int = 0
    shapes: int = 0
    equations: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Site:
    """root: the repository. `write` makes the site in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.counts = root, Counts()
        sources = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
        scripts = [root / "train.py", root / "generate.py"]
        self.paths = [str(path.relative_to(root)) for path in [*scripts, *sources]]
        self.sources = Sources(root, self.paths)
        marked = [*root.glob("*.md"), *(each for folder in FOLDERS for each in (root / folder).rglob("*.md"))]
        self.marked = sorted(str(path.relative_to(root)) for path in marked)
        pictures = [each for kind in ("svg", "png", "html") for each in (root / "docs").rglob(f"*.{kind}")]
        self.pictures = sorted(str(path.relative_to(root)) for path in pictures)
        self.wanted: set[str] = set()                   # files that are linked, and have no page of their own
        self.index: list[tuple[str, str, str, str]] = []        # name, what it is, address, what it says
        self.seen: dict[str, Beside] = {}               # what was measured
        self.links: dict[str, Links] = {}
        self.words: set[str] = set()                    # all names that may stand in equations

    # ---- addresses

    def address(self, path: str, line: int, start: str) -> str:
        """From the page of `start` to a line of a file."""
        anchor = f"#L{line}" if line > 1 else ""
        if path == start:
            return anchor or "#"
        return posixpath.relpath(f"{path}.html", posixpath.dirname(start) or ".") + anchor

    def link_of_guide(self, start: str, path: str, anchor: str) -> str | None:
        """Where a link of a Markdown page leads: a page, a picture, the list of files; None: nowhere."""
        above = posixpath.dirname(start) or "."
        if path in self.pictures:
            return posixpath.relpath(path, above)
        file = self.root / path
        if file.is_dir():
            known = any(each.rpartition("/")[0] == path for each in self.paths)
            return posixpath.relpath("index.html", above) + f"#{path}/" if known else None
        if not file.is_file() or not file.resolve().is_relative_to(self.root):
            return None
        if path not in self.paths and path not in self.marked:
            self.wanted.add(path)
        if path == start:
            return f"#{anchor}"
        return posixpath.relpath(f"{path}.html", above) + (f"#{anchor}" if anchor else "")

    def link_of_prose(self, start: str, said: str) -> str | None:
        """Where `said` leads: a name of the file, Class.member, a file."""
        if said.endswith((".py", ".md")) and "(" not in said:
            known = [*self.paths, *self.marked]
            near = [posixpath.normpath(posixpath.join(posixpath.dirname(start), said)), said]
            found = next((each for each in near if each in known), None)
            if found is None:
                ends = [each for each in known if each.endswith(f"/{said}")]
                same = [each for each in ends if each.partition("/")[0] == start.partition("/")[0]]
                ends = same if len(same) == 1 else ends
                found = ends[0] if len(ends) == 1 else None
            return self.address(found, 1, start) if found else None
        name, _, member = said.partition("(")[0].partition(".")
        defined = self.sources.define(self.sources.modules[start], name) if start in self.sources.modules else None
        if defined is None:
            return None
        module, line, kind = defined
        if member:
            inner = kind.of.find(member) if kind is not None and isinstance(kind.of, Class) else None
            return self.address(inner[0].module.path, inner[1], start) if inner else None
        return self.address(module.path, line, start)

    # ---- shapes

    def measure(self) -> dict[str, Beside]:
        """For each file and line what was measured there, with letters: both rounds of all scenes."""
        files = frozenset(str(self.root / path) for path in self.paths if not path.startswith("docs/"))
        recorders, sizes = [], []
        for round_ in ROUNDS:
            recorder, known = Recorder(files), {}
            for scene in scenes(round_):
                recorder.watch(scene.name, scene.run)
                known[scene.name] = scene.sizes
            recorders.append(recorder)
            sizes.append(known)
        found: dict[str, Beside] = {}
        for file, lines in recorders[0].found.items():
            path = str(Path(file).relative_to(self.root))
            module = self.sources.modules[path]
            names = expressions("\n".join(module.lines), legend(ast.get_docstring(module.tree) or ""))
            found[path] = {}
            for line, seen in lines.items():
                again = recorders[1].found.get(file, {}).get(line, [])
                alike = [(one.name, one.scene) for one in seen] == [(other.name, other.scene) for other in again]
                rows = found[path][line] = []
                for one, other in zip(seen, again if alike else seen, strict=True):
                    rounds = sizes[0][one.scene], sizes[1][one.scene]
                    rows.append((one, lettered(one.shape, other.shape if alike else (), rounds, names)))
        return found

    # ---- pages

    def source(self, path: str, seen: Beside, before: str | None, after: str | None) -> str:
        """The body of a source file's page."""
        module = self.sources.modules[path]
        text = "\n".join(module.lines)
        head, rows = weave(text)
        names = names_in(text)
        prose = Prose(lambda said: self.link_of_prose(path, said), words_of(names))
        self.words |= words_of(names)
        head_html = prose.html(titled(head))
        said = [f"<h2>{escape(row.prose)}</h2>" if row.heading else prose.html(row.prose) for row in rows]
        links = self.links[path] = self.sources.links(path)
        lines = highlighted(text, links=links, address=lambda place: self.address(place.path, place.line, path))
        declared, main = legend(ast.get_docstring(module.tree) or ""), pages.main_scene(seen)
        measured = self.measured(main, seen, declared)
        around = "<nav class=around>" + "".join(
            f'<a class={side} href="{self.address(other, 1, path)}">{other}</a>' if other else "<span></span>"
            for side, other in (("before", before), ("after", after))) + "</nav>"
        self.note(path, head, rows)
        self.counts.names += len(names)
        self.counts.linked += len(links)
        self.counts.shapes += sum(map(len, seen.values()))
        self.counts.equations += prose.rendered
        self.counts.left += prose.left
        return pages.source_page(path, head_html, rows, said, lines, pages.shapes_beside(seen, declared, main),
                                 measured, around, self.way(path))

    def way(self, path: str) -> str:
        """The crumbs of a page."""
        folders = {each.rpartition("/")[0] for each in self.paths}
        return pages.crumbs(path, posixpath.relpath("index.html", posixpath.dirname(path) or "."), folders)

    def measured(self, main: str, seen: Beside, declared: dict[str, str]) -> str:
        """The line that says how the shapes of a page were measured, with the sizes that have letters on it."""
        if not main:
            return ""
        sizes = {letter: size for values in seen.values() for one, letters in values if one.scene == main
                 for letter, size in zip(letters, one.shape, strict=True) if letter in declared}
        listed = " ".join(f'<var title="{escape(declared[letter])}">{letter}</var><sub>{sizes[letter]}</sub>'
                          for letter in declared if letter in sizes)
        return f"<p class=measured>Shapes beside the code were measured in <b>{escape(main)}</b> {listed}</p>"

    def note(self, path: str, head: str, rows: list[Row]) -> None:
        """Put the names of a file into the index."""
        self.index.append((path, "file", f"{path}.html", first_line(head)))
        for name, node in self.sources.modules[path].nodes.items():
            definition = node.node if isinstance(node, Class) else node
            kind = "class" if isinstance(node, Class) else "function"
            self.index.append((name, kind, f"{path}.html#L{definition.lineno}", first_line(doc(definition))))
            if isinstance(node, Class):
                for each in definition.body:
                    if isinstance(each, ast.FunctionDef) and not each.name.startswith("__"):
                        self.index.append((f"{name}.{each.name}", "method", f"{path}.html#L{each.lineno}",
                                           first_line(doc(each))))
                    elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                        line = self.sources.modules[path].lines[each.lineno - 1]
                        self.index.append((f"{name}.{each.target.id}", "field", f"{path}.html#L{each.lineno}",
                                           line.partition("# ")[2]))
        for name, number in self.sources.modules[path].names.items():
            if name.isupper() and name not in self.sources.modules[path].imported:
                self.index.append((name, "constant", f"{path}.html#L{number}", ""))

    def guide(self, path: str) -> tuple[str, str]:
        """The body of a Markdown file's page, and its title."""
        html, titles = guides.render((self.root / path).read_text(), path,
                                     lambda file, anchor: self.link_of_guide(path, file, anchor))
        for title, anchor in titles:
            self.index.append((title, "guide", f"{path}.html#{anchor}", path))
        return self.way(path) + f"<article class=guide>{html}</article>", titles[0][0] if titles else path

    def plain(self, path: str) -> str:
        """The body of the page of a file that is only shown."""
        text = (self.root / path).read_text()
        lines = highlighted(text.rstrip("\n"), lexer_for(path))
        code = "".join(code_line(n, line) for n, line in enumerate(lines, 1))
        return self.way(path) + f"<div class=code tabindex=0>{code}</div>"

    def write(self, out: Path) -> Counts:
        """The whole site, into an empty folder."""
        shutil.rmtree(out, ignore_errors=True)
        self.seen = self.measure()
        order = [*ORDER, *(path for path in self.paths if path not in ORDER)]
        for i, path in enumerate(order):
            after = order[i + 1] if i + 1 < len(order) else None
            body = self.source(path, self.seen.get(path, {}), order[i - 1] if i else None, after)
            self.put(out, f"{path}.html", path.rpartition("/")[2], body, "source")
        titles = {}
        for path in self.marked:
            body, titles[path] = self.guide(path)
            self.put(out, f"{path}.html", titles[path], body, "guides")
        for path in self.pictures:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(".html"):
                text = (self.root / path).read_text(encoding="utf-8")       # whole by itself; here with a way back
                home = posixpath.relpath("index.html", posixpath.dirname(path))
                back = f'<main>\n<a href="{home}">nanollm</a>'
                (out / path).write_text(text.replace("<main>", back, 1), encoding="utf-8")
            else:
                shutil.copyfile(self.root / path, out / path)
        for path in sorted(self.wanted):
            self.put(out, f"{path}.html", path, self.plain(path), "source")
        self.put(out, "index.html", "Contents", self.front(titles), "front")
        for name in ("style.css", "script.js"):
            shutil.copyfile(Path(__file__).parent / name, out / name)
        (out / "index.js").write_text(f"window.INDEX = {json.dumps(self.index, ensure_ascii=False)};\n")
        return self.counts

    def put(self, out: Path, path: str, title: str, body: str, kind: str) -> None:
        file = out / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pages.page(title, path, body, kind))
        self.counts.pages += 1

    def front(self, titles: dict[str, str]) -> str:
        """The body of the first page."""
        def entry(path: str) -> tuple[str, str, str]:
            module = self.sources.modules[path]
            return path.rpartition("/")[2], f"{path}.html", escape(first_line(doc(module.tree)))

        order = [(path.removeprefix("nanollm/"), *entry(path)[1:]) for path in ORDER]
        folders: dict[str, list[tuple[str, str, str]]] = {}
        for path in self.paths:
            folders.setdefault(path.rpartition("/")[0], []).append(entry(path))
        said = [(titles[path], f"{path}.html", path) for path in self.marked]
        said += [(path, path, "") for path in self.pictures if path.endswith(".html")]
        figures = "".join(f'<figure><a href="{path}"><img loading=lazy src="{path}" alt="{path}"></a>'
                          f"<figcaption>{path.rpartition('/')[2]}</figcaption></figure>"
                          for path in self.pictures if path.endswith(".svg") and path.count("/") > 1)
        html = pages.front_page(order, said, sorted(folders.items()), "docs/architecture.svg")
        return html + (f"<section><h2>Figures</h2><div class=figures>{figures}</div></section>" if figures else "")


# ---- small things about texts

def doc(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""                                    # type: ignore[arg-type]


def first_line(text: str) -> str:
    """The first sentence, or as much of it as stands in the first line."""
    return text.strip().partition("\n")[0].strip()


def titled(head: str) -> str:
    """A head without the indentation of its lines, which is that of nothing."""
    return inspect.cleandoc(head)


def names_in(text: str) -> list[str]:
    """The names that code uses, as often as it uses them."""
    return [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string)]


def words_of(names: list[str]) -> set[str]:
    """The names, and their parts: an equation may have W_down where the code has q_down."""
    return {part for name in names for part in (name, *name.split("_")) if len(part) > 1}
