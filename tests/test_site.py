"""The site of docs/site: its equations say what the sources say, its links lead somewhere, its shapes are those of a
forward pass, and it can be read on a phone, in the light and in the dark."""

import ast
import html
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from tests import browser

pytest.importorskip("pygments", reason="needs pip install -e .[docs]")
pytest.importorskip("markdown_it", reason="needs pip install -e .[docs]")

from docs.site import scenes
from docs.site.build import Site
from docs.site.equations import SUB, SUPER, mathml
from docs.site.names import Sources
from docs.site.prose import section_address
from docs.site.shapes import Recorder, lettered
from nanollm.cache import Cache

ROOT = Path(__file__).parent.parent
CHROMIUM = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")


# ---- equations

def flat(element: ElementTree.Element) -> str:
    """MathML as one line: _ and ^ before scripts, / and √ where they are drawn; the brackets that a line needs and a
    drawing does not are left out of both."""
    parts = [flat(child) for child in element]
    match element.tag:
        case "msub" | "munder":
            return f"{parts[0]}_{parts[1]}"
        case "msup":
            return f"{parts[0]}^{parts[1]}"
        case "msubsup" | "munderover":
            return f"{parts[0]}_{parts[1]}^{parts[2]}"
        case "mfrac":
            return f"{parts[0]}/{parts[1]}"
        case "msqrt":
            return "√" + "".join(parts)
        case "mover":
            return parts[0] + {"^": "\u0302", "~": "\u0303", "¯": "\u0304", "˙": "\u0307"}[parts[1]]
    return (element.text or "") + "".join(parts)


def bare(line: str) -> str:
    """A line of a head in the same form."""
    for table, sign in ((SUPER, "^"), (SUB, "_")):
        signs = "".join(table)
        line = re.sub(f"([{signs}]+)", rf"{sign}\1", line).translate(str.maketrans(table))
    line = unicodedata.normalize("NFD", re.sub(r"\^?′\^?", "^′", line))
    line = line.replace("sqrt", "√").replace("Σ", "∑")
    line = re.sub(r"[\s(){}\u00a0]", "", line)
    return re.sub(r"\^([A-Z]+)_([a-z]+)", r"_\2^\1", line)           # c^Q_t is c_t^Q: drawn above each other


def test_an_equation_says_what_its_line_says(site):
    """All that are drawn, read back from their MathML: order, scripts, fractions, roots. Nothing is lost or moved."""
    assert len(site.counts.equations) > 300
    for line in site.counts.equations:
        drawn = mathml(line, site.words)
        assert drawn is not None, line
        assert bare(flat(ElementTree.fromstring(drawn))) == bare(line), line


@pytest.mark.parametrize("line, drawn", [
    ("x / sqrt(mean(x²) + ε) · g", "mfrac msqrt"), ("a / b c", ""), ("λ s_e / Σ_T s", ""), ("θ^(−2j/d)", ""),
    ("a + 8h/H", "mfrac"), ("1/n Σ_t x_t", "mfrac"), ("W x / c", ""), ("a b/c", "mfrac"),
    ("m̂ / (√v̂ + ε)", "mfrac msqrt"),
    ("0.2 √max(n, m) · M", "msqrt"), ("a / b / c", ""),
])
def test_fractions_only_where_they_are_sure(line, drawn):
    html = mathml(line, {"mean", "max"})
    assert html is not None and {tag for tag in ("mfrac", "msqrt") if f"<{tag}>" in html} == set(drawn.split())


@pytest.mark.parametrize("line", [
    "one program = ROWS rows", "T = the k largest of s", "f(x", "x = y)", "a -b", "x_", "W_i^UK^nope",
                                  "x ≔ y", "#1 = 2"])
def test_what_is_not_surely_an_equation_stays_text(line):
    assert mathml(line) is None


def test_a_root_covers_all_of_its_call():
    drawn = mathml("√max(n, m) x")
    assert re.search(r"<msqrt><mi>max</mi><mrow><mo>\(</mo>.*</mrow></msqrt>.*<mi>x</mi>", drawn)


def test_sections_of_papers():
    assert section_address("2405.21060", "7.1") == "https://arxiv.org/html/2405.21060#S7.SS1"
    assert section_address("1706.03762", "3.2.1") == "https://ar5iv.labs.arxiv.org/html/1706.03762#S3.SS2.SSS1"


# ---- names

def test_names_lead_to_their_definition(tmp_path):
    (tmp_path / "a.py").write_text("class Base:\n    size: int\n\n    def grow(self) -> 'Base':\n        return self\n")
    (tmp_path / "b.py").write_text(
        "import a\nfrom a import Base as B\n\n\ndef f(x: B | None, n):\n    y = x.grow().size\n"
        "    return [n for n in y], a.Base(size=n)\n")
    links = Sources(tmp_path, ["a.py", "b.py"]).links("b.py")
    found = {(line, column): (place.path, place.line) for (line, column), place in links.items()}
    assert found[2, 14] == found[5, 9] == found[7, 29] == ("a.py", 1)       # import … as B, an annotation, a.Base
    assert found[6, 10] == ("a.py", 4) and found[6, 17] == ("a.py", 2)      # x.grow(), and .size of what it returns
    assert found[7, 12] == ("b.py", 7) and found[7, 39] == ("b.py", 5)      # the comprehension's n, the parameter n
    assert found[7, 34] == ("a.py", 2) and (5, 17) not in found             # the field; None is nowhere


# ---- shapes

def test_shapes_are_those_of_a_forward_pass():
    """What hooks of the modules see, which know nothing of lines."""
    sizes = scenes.ROUNDS[0]
    model = scenes.Builder(sizes).decoder(scenes.Builder(sizes).attention())
    attention, seen = model.layers[0].mixer, {}
    for name in ("q", "k", "v"):
        getattr(attention, name).register_forward_hook(lambda *call, name=name: seen.update({name: call[2].shape}))
    file = str(ROOT / "nanollm/layers/attention.py")
    recorder = Recorder(frozenset({file}))
    recorder.watch("", lambda: scenes.read(model, sizes))
    line = next(n for n, text in enumerate(Path(file).read_text().splitlines(), 1) if "q, k, v = self.q(x)" in text)
    tokens = torch.zeros(sizes.B, sizes.T, dtype=torch.long)
    model(tokens, cache=Cache(model.config, sizes.B, 20))
    assert {one.name: one.shape for one in recorder.found[file][line]} == {key: tuple(s) for key, s in seen.items()}


def test_comments_of_shapes_agree_with_what_was_measured(site):
    """`scores = …  # (B, H, T, S)`: every size that has a letter of its own has that which the comment says."""
    checked = 0
    for path, lines in site.seen.items():
        source = (ROOT / path).read_text().splitlines()
        for line, values in lines.items():
            comment = re.search(r"# \(([\w·, ]+),?\)$", source[line - 1])
            said = [each.strip() for each in comment[1].split(",")] if comment else []
            for _, letters in values if said else ():
                for one, letter in zip(said, letters, strict=True):
                    assert letter is None or letter in one.split(" or "), f"{path}:{line}: {said}, not {letters}"
                    checked += letter is not None
    assert checked > 120


def test_a_letter_needs_both_rounds():
    sizes = {"B": 3, "T": 7, "k": 3}, {"B": 4, "T": 9, "k": 2}
    assert lettered((3, 7, 3), (4, 9, 2), sizes, ["B", "T", "k"]) == ["B", "T", "k"]
    assert lettered((3, 7), (4, 8), sizes, ["B", "T", "k"]) == ["B", None]
    assert lettered((21,), (36,), sizes, ["B", "T", "B·T"]) == ["B·T"]


# ---- the whole site

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(ROOT)
    made.out = tmp_path_factory.mktemp("site")
    made.write(made.out)
    return made


@pytest.fixture(scope="module")
def page():
    with browser.Browser() as opened:
        yield opened


pytestmark = pytest.mark.slow


def test_no_link_is_broken(site):
    """Every href and src: a file of the site, and an id in it; the addresses of papers have the shape of such."""
    texts = {path: path.read_text() for path in site.out.rglob("*.html") if "<main>" in path.read_text()}
    ids = {path: set(re.findall(r'\bid="?([^"\s>]+)', text)) for path, text in texts.items()}
    links = 0
    for path, text in texts.items():
        for target in {html.unescape(each) for each in re.findall(r'(?:href|src)="([^"]*)"', text)}:
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            aim = (path.parent / file).resolve() if file else path
            links += 1
            assert aim.is_file(), f"{path.relative_to(site.out)}: {target}"
            assert not anchor or anchor in ids[aim], f"{path.relative_to(site.out)}: {target}"
        assert re.search(r'href="[./]*index.html"', text), f"no way back from {path}"
    assert links > 20000 and 'href="docs/learn.md.html"' in (site.out / "index.html").read_text()
    papers = set(re.findall(r'href="(https://arxiv.org/abs/[^"]*)"', "".join(texts.values())))
    assert len(papers) > 80 and all(re.fullmatch(r".*/\d{4}\.\d{4,5}(v\d+)?", each) for each in papers)


def test_every_name_leads_to_a_line_that_has_it(site):
    """Of all links of names: the line defines the name, or is the first of the module that it names."""
    for path, links in site.links.items():
        lines = (ROOT / path).read_text().splitlines()
        for (line, column), place in links.items():
            dotted = lines[line - 1].lstrip().startswith(("from ", "import ")) and place.line == 1
            name = re.match(r"[\w.]+" if dotted else r"\w+", lines[line - 1][column:])[0]
            last = name.rpartition(".")[2]
            known = {last, aliases(path).get(last, last)}
            there = site.sources.modules[place.path].lines[place.line - 1] if place.line > 1 else None
            assert there is None or any(re.search(rf"\b{each}\b", there) for each in known), (path, line, name, place)


def aliases(path: str, known: dict = {}) -> dict[str, str]:     # noqa: B006  a cache
    """import … x as y: y → x."""
    if path not in known:
        known[path] = {alias.asname: alias.name for node in ast.walk(ast.parse((ROOT / path).read_text()))
                       if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names if alias.asname}
    return known[path]


def test_each_source_has_a_page_that_holds_all_its_code(site):
    for path in ("train.py", "nanollm/layers/attention.py", "kernels/rms_norm.py", "examples/loop.py"):
        if not (ROOT / path).exists():
            continue
        text = re.sub(r"<[^>]*>", "", (site.out / f"{path}.html").read_text())
        lines = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        code = [line for line in lines if line.startswith(("def ", "return ", "x = "))]
        assert not [line for line in code if html.escape(line, False) not in text]


TOPS = "[...document.querySelectorAll('.row')[1].children].map(part => Math.round(part.getBoundingClientRect().top))"
PAGES = ("index.html", "nanollm/layers/attention.py.html", "nanollm/layers/latent_attention.py.html", "train.py.html",
         "kernels/attention.py.html", "docs/fork.md.html", "README.md.html")


@CHROMIUM
@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_a_phone(site, page, name):
    page.ask("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    page.open((site.out / name).as_uri())
    assert page.run("document.documentElement.scrollWidth") <= 390
    if "layers" in name:                                    # prose above code, and code of the width of the screen
        above, code = page.run(TOPS)
        assert above < code


@CHROMIUM
def test_light_and_dark_differ_and_equations_are_drawn(site, page):
    page.open((site.out / "nanollm/layers/norm.py.html").as_uri())
    light, dark = page.look(1200, 700, "light"), page.look(1200, 700, "dark")
    assert light != dark
    colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor].join()"
    assert "255" not in page.run(colours).replace("rgb", "")
    size = page.run("(() => { const box = document.querySelector('mfrac').getBoundingClientRect();"
                    "return [box.width, box.height] })()")
    assert min(size) > 20                                   # one above the other
    prose, code = page.run(TOPS)
    assert prose == code                                    # side by side


@CHROMIUM
def test_the_search_finds_a_name_and_goes_there(site, page):
    page.open((site.out / "nanollm/layers/norm.py.html").as_uri())
    page.run("document.querySelector('.search input').focus()")
    page.until("window.INDEX !== undefined")
    page.type("attend_fused")
    page.until("document.querySelector('.search li.chosen a') !== null")
    assert page.run("document.querySelector('.search li.chosen b').textContent") == "attend_fused"
    page.press_enter()
    page.until("location.pathname.endsWith('layers/attention.py.html')")
    page.until("document.readyState === 'complete'")
    assert "def attend_fused" in page.run("document.querySelector(':target').textContent")


def test_nothing_of_it_is_imported_by_the_library():
    for folder in ("nanollm", "checkpoints", "kernels"):
        assert not [path for path in (ROOT / folder).rglob("*.py") if re.search(r"^\s*(from|import) docs\b",
                                                                             path.read_text(), re.MULTILINE)]
