"""The figures and the gallery: what is committed is what the code draws today."""

import json
import re

import pytest

from checkpoints.families import FAMILIES
from docs.figures import FOLDER, NAMES, draw, drawing
from docs.gallery.__main__ import PAGE, SIZES, size, written
from docs.gallery.families import Family, described, published
from tests.browser import CHROMIUM, Browser
from tests.fixtures import FIXTURES
from tests.test_show import PUBLISHED

FIGURES = (FOLDER.parent / "figures.md").read_text(encoding="utf-8")


# ---- figures

@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_what_its_script_draws(name):
    """To the byte, on any processor: no coordinate lies near the edge between two tenths (`drawing.px`)."""
    committed = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert draw(name) == committed, f"it has changed: python -m docs.figures {name}, then look at it"
    assert len(committed.encode()) < 40_000 and "prefers-color-scheme: dark" in committed
    assert FIGURES.count(f"(figures/{name}.svg)") == 1


def test_a_coordinate_on_the_edge_is_refused():
    assert [drawing.px(x) for x in (12, 12.04, -0.26, 12.0502)] == ["12", "12", "-0.3", "12.1"]
    for edge in (12.05, 12.05004, 12.04996, -3.25):
        with pytest.raises(ValueError, match="between two tenths"):
            drawing.px(edge)
    picture = drawing.Picture(10, 10, "")
    with pytest.raises(ValueError, match="between two shades"):
        picture.cells(0, 0, 4, [[("a", 0.625001)]])


# ---- the gallery

def test_the_page_is_what_the_configs_say():
    committed = PAGE.read_text(encoding="utf-8")
    assert written() == committed, "python -m docs.gallery, then look at it"
    assert sorted(re.findall(r'<span id="([^"]+)" class="of">', committed)) == sorted(FAMILIES)
    outside = re.findall(r'(?:src|href)="(?!#)([^"]+)"|url\((?!#)', committed)
    assert all(re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link) for link in outside), "a link, and no asset"


def by_hand(name: str) -> tuple[Family, set[tuple[str, str]]]:
    """A fixture's family, and its differences in all layers or some."""
    values = published(FIXTURES[name])
    family = described(values["model_type"], name, values)
    return family, {*family.model, *(said for kind in family.kinds for said in kind.differences)}


OFFSET = "the gain is stored less 1, rounded after the gain, not before it"


@pytest.mark.parametrize("name, expected", {
    "mistral-v0.1": {("mixer", "a query sees W keys, itself included")},
    "qwen3-0.6b": {("qk_norm", "there is one"), ("model", "the head is the embedding")},
    "mixtral-8x7b": {
        ("ffn", "MoE in place of an MLP: k of E experts a token"), ("ffn", "their weights divided by their sum")},
    "gemma2-9b": {
        ("pre_mixer", OFFSET), ("pre_ffn", OFFSET), ("final_norm", OFFSET), ("post_mixer", f"there is one, {OFFSET}"),
        ("post_ffn", f"there is one, {OFFSET}"), ("mixer", "a query sees W keys, itself included"),
        ("mixer", "scores become c·tanh(score / c)"), ("ffn", "gelu_tanh in place of silu"),
        ("model", "the head is the embedding"), ("model", "the embedding times s"),
        ("model", "logits become c·tanh(logit / c)")},
}.items())
def test_the_differences_are_those_of_the_config(name, expected):
    family, found = by_hand(name)
    assert found == expected
    if name == "qwen3-0.6b":                                # the large ones are not tied: a key says it
        assert family.keys == {("model", "the head is the embedding"): "tie_word_embeddings"}
    if name == "gemma2-9b":
        sliding, full = (dict.fromkeys(kind.differences) for kind in family.kinds)
        assert sliding.keys() - full.keys() == {("mixer", "a query sees W keys, itself included")}


def test_sizes_are_what_is_published():
    """The record is what the library counts today, where the config is here too."""
    record = {one["name"]: one for one in json.loads(SIZES.read_text())}
    here = record.keys() & PUBLISHED.keys()
    assert len(here) > 12
    for name in here:
        found = size(name, PUBLISHED[name][0])
        assert (found["parameters"], found["active"]) == (record[name]["parameters"], record[name]["active"]), name
    assert record["Llama-3.1-8B"]["token"] == 2 * 32 * 8 * 128 * 2      # k and v, layers, heads, width, bytes
    assert record["gpt-oss-20b"]["token"] == 2 * 24 * 8 * 64 * 2        # before the windows of 128 keys are full
    assert record["DeepSeek-V3"]["token"] == 61 * (512 + 64) * 2        # one latent vector and a rotated key a layer
    assert {one["model_type"] for one in record.values()} <= FAMILIES.keys()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_the_table_sorts_and_the_search_finds():
    with Browser() as page:
        page.open(PAGE.as_uri())
        rows = "[...document.querySelectorAll('tbody tr')].map(row => row.cells"
        for at, read in ((5, "[5].dataset.n * 1"), (6, "[6].dataset.n * 1"), (1, "[1].textContent[0].toLowerCase()")):
            found = []
            for _ in range(2):                              # upwards, and then downwards
                page.run(f"document.querySelectorAll('th button')[{at}].click()")
                found.append(page.run(f"{rows}{read})"))
            up, down = found
            assert len(up) > 80 and up != down and up == sorted(up) and down == sorted(down, reverse=True), at
            assert page.run(f"document.querySelectorAll('th')[{at}].ariaSort") == "descending"
        page.run("search.value = 'alibi'; search.oninput()")
        shown = page.run("[...document.querySelectorAll('.family:not([hidden]) .of')].map(each => each.id)")
        assert {"bloom", "mpt"} <= set(shown) and "llama" not in shown
        page.look(390, 800, "dark")
        assert page.run("document.documentElement.scrollWidth") <= 390
