"""docs/gallery.html: the table of sizes, and a card for each group of families that differ from Llama alike."""

import importlib
from html import escape
from typing import Any

from checkpoints.families import FAMILIES, FILES
from checkpoints.show import amount, billions
from checkpoints.show.words import PLACES
from docs.gallery.drawing import by_kind, svg
from docs.gallery.families import Family, groups, with_towers
from docs.gallery.reasons import REASONS

STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #fff; --rim: #d0d7de; --text: #1f2328; --dim: #59636e;
  --box: #eef4fb; --edge: #54789c; --new: #fdecd2; --newedge: #b4690e; --newtext: #8a4b00; --link: #0a58ca }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #15191f; --rim: #3d444d; --text: #e6edf3;
  --dim: #9aa5b1; --box: #1c2a3a; --edge: #6c97c4; --new: #3a2a12; --newedge: #e0a04a; --newtext: #f0bd77;
  --link: #79b0f5 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 ui-sans-serif, system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px }
h1 { font-size: 26px; margin: 8px 0 } h2 { font-size: 20px; margin: 36px 0 8px } h3 { font-size: 16px; margin: 0 }
a { color: var(--link) } code { font: 12px ui-monospace, Menlo, Consolas, monospace; color: var(--dim) }
.card { background: var(--card); border: 1px solid var(--rim); border-radius: 8px; padding: 14px 16px; margin: 14px 0 }
.scroll { overflow-x: auto; max-width: 100% } .tall { max-height: 600px; overflow: auto; padding-top: 0 }
.body { display: flex; flex-wrap: wrap; gap: 4px 32px } .what { flex: 1 1 320px; padding-top: 8px }
.family[hidden] { display: none }
.dim, small { color: var(--dim) } small { font-size: 13px }
ul { margin: 6px 0 6px; padding-left: 20px } li { margin: 1px 0 } li b { font-weight: 600; color: var(--newtext) }
.why { border-left: 3px solid var(--newedge); padding-left: 10px; margin: 8px 0 2px }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--rim); text-align: right; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } tbody tr:last-child td { border-bottom: 0 }
th { position: sticky; top: 0; background: var(--card); padding-top: 12px }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid var(--link) }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rim); border-radius: 6px;
  padding: 6px 10px; width: 100%; max-width: 360px }
svg { display: block; margin: 10px 0 4px; max-width: max(100%, 640px); height: auto;
  font: 12px ui-sans-serif, system-ui, sans-serif }
svg text { fill: var(--text) } svg .mid { text-anchor: middle } svg .tag { font-size: 10px; fill: var(--newtext) }
svg .kind { font-weight: 600 } svg .box { fill: var(--box); stroke: var(--edge) }
svg .box.new { fill: var(--new); stroke: var(--newedge) } svg text.new { fill: var(--newtext); font-weight: 600 }
svg .box.gone { fill: none; stroke: var(--newedge); stroke-dasharray: 4 3 } svg text.gone { fill: var(--newtext) }
svg .wire { fill: none; stroke: var(--dim); stroke-width: 1.3 } svg .wire.gone { stroke-dasharray: 3 3 }
svg .tip { marker-end: url(#tip) }
#tip path { fill: var(--dim) }
"""
SCRIPT = """
for (const [column, head] of document.querySelectorAll('th').entries())
  head.querySelector('button').onclick = () => {
    const up = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1
    for (const other of document.querySelectorAll('th')) other.removeAttribute('aria-sort')
    head.setAttribute('aria-sort', up > 0 ? 'ascending' : 'descending')
    const value = ({ cells }) => 'n' in cells[column].dataset ? +cells[column].dataset.n : cells[column].textContent
    const order = (a, b) => { const [x, y] = [value(a), value(b)]
      return up * (typeof x === 'number' ? x - y : x.localeCompare(y)) }
    const body = document.querySelector('tbody')
    body.append(...[...body.rows].sort(order))
  }
const search = document.querySelector('input')
search.oninput = () => {
  const words = search.value.toLowerCase().split(' ')
  for (const card of document.querySelectorAll('.family'))
    card.hidden = !words.every(word => card.textContent.toLowerCase().includes(word))
}
"""
COLUMNS = ("model", "family", "parameters", "active", "layers", "cache a token", "of 32,768 tokens")


def page(every: list[Family], sizes: list[dict[str, Any]]) -> str:
    """The whole page."""
    cards = "".join(card(alike) for alike in groups(every))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nanollm: the families as differences</title>
<style>{STYLE}</style>
<svg width="0" height="0" style="position:absolute"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4"
markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs></svg>
<main>
<h1>The families as differences</h1>
<p>Every decoder that nanollm reads, beside a Llama. Written by <code>python -m docs.gallery</code>: what differs is
found by comparing configs field by field, not told. Colour marks what a Llama has otherwise, a dashed box what it has
and this one lacks; under a box stand the fields of its config that differ.</p>
<h2>Sizes</h2>
<p>Counted by the library from the config.json of published models, without weights. The cache is of one sequence, in
bfloat16: what a token adds while no window is full, and all of it for 32,768 tokens, whether the model was trained for
so many or not. A click on a heading sorts.</p>
<div class="card tall">{table(sizes)}</div>
<h2>Differences</h2>
<p>Each family is drawn from the config of a small model in its shape (<code>tests/fixtures</code>), so its numbers are
letters, and how kinds of layers follow each other is not shown. A <code>key</code> behind a difference is the one of
config.json that says it: a published model may say otherwise. What has none is the family's own, or what a missing key
means.</p>
<p><input type="search" placeholder="mixtral, ALiBi, window …" aria-label="Search the families"></p>
{cards}</main>
<script>{SCRIPT}</script>
</html>
"""


def table(sizes: list[dict[str, Any]]) -> str:
    """Sorted by parameters."""
    heads = "".join(f'<th scope="col"{" aria-sort=ascending" * (name == "parameters")}><button>{name}</button></th>'
                    for name in COLUMNS)
    rows = ""
    for one in sorted(sizes, key=lambda one: (one["parameters"], one["name"])):
        cache = one["cache"]
        numbers = ((one["parameters"], billions(one["parameters"])), (one["active"], billions(one["active"])),
                   (one["layers"], str(one["layers"])), (one["token"], f"{one['token']:,} B"),
                   (cache or -1, f"{amount(cache)}B" if cache else "–"))
        cells = "".join(f'<td data-n="{number}">{words}</td>' for number, words in numbers)
        kind = one["model_type"]
        rows += f'<tr><td>{escape(one["name"])}</td><td><a href="#{kind}">{kind}</a></td>{cells}</tr>\n'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table>"


def card(alike: list[Family]) -> str:
    """Families that differ alike, drawn once."""
    first, towers = alike[0], with_towers()
    titles = ", ".join(named(one.model_type) for one in alike)
    about = "".join(f"<br>{escape(line)}" for line in dict.fromkeys(headline(one.model_type) for one in alike))
    beside = [named(kind) for one in alike for kind in towers.get(one.model_type, ())]
    seen = f"<br>Beside a tower for pictures, which is left out: {', '.join(beside)}" if beside else ""
    said: dict[tuple[str, str], list[str]] = {}             # (which layers, words) → places
    for where, (place, words) in by_kind(first):
        said.setdefault((where, words), []).append(place)
    lines: dict[tuple[str, str], list[str]] = {}            # (which layers, places) → what differs there, in HTML
    for (where, words), places in said.items():
        keys = {f.keys.get((place, words)) for f in alike for place in places} - {None}
        words = escape(words) + "".join(f" <code>{key}</code>" for key in sorted(map(str, keys)))
        lines.setdefault((where, ", ".join(PLACES[place] for place in places)), []).append(words)
    items = "".join(item(where, places, words) for (where, places), words in lines.items())
    what = f"As Llama, but:<ul>{items}</ul>" if lines else "As Llama."
    why = "".join(f'<div class="why">{f"{one.model_type}: " * (len(alike) > 1)}{escape(words)} '
                  f'<a href="https://arxiv.org/abs/{number}">arXiv {number}</a></div>'
                  for one in alike for words, number in REASONS.get(one.model_type, ()))
    return (f'<section class="card family"><h3>{titles}</h3><small>{about.removeprefix("<br>")}{seen}</small>\n'
            f'<div class="body"><div class="scroll">{svg(first)}</div>\n'
            f'<div class="what">{what}{why}</div></div></section>\n')


def named(kind: str) -> str:
    """A model_type, each once in the page."""
    return f'<span id="{kind}" class="of">{kind}</span>'


def headline(kind: str) -> str:
    """What a family says of itself: its own line, or that which its file begins with."""
    file = importlib.import_module(f"checkpoints.families.{FILES[kind]}")
    return FAMILIES[kind].about or (file.__doc__ or "").split("\n")[0]


def item(where: str, places: str, words: list[str]) -> str:
    """What differs in some places of some layers, "" for all."""
    layers = f'<span class="dim">{escape(where)}: </span>' if where else ""
    return f"<li>{layers}<b>{places}</b>: {'; '.join(words)}</li>"


assert REASONS.keys() <= FAMILIES.keys(), REASONS.keys() - FAMILIES.keys()
