"""The figures and the gallery: what is committed is what the code draws today."""

import pytest

from docs.figures import FOLDER, NAMES, draw, drawing

PAGE = (FOLDER.parent / "figures.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_what_its_script_draws(name):
    """To the byte, on any processor: no coordinate lies near the edge between two tenths (`drawing.px`)."""
    committed = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert draw(name) == committed, f"it has changed: python -m docs.figures {name}, then look at it"
    assert len(committed.encode()) < 40_000 and "prefers-color-scheme: dark" in committed
    assert PAGE.count(f"(figures/{name}.svg)") == 1


def test_a_coordinate_on_the_edge_is_refused():
    assert [drawing.px(x) for x in (12, 12.04, -0.26, 12.0502)] == ["12", "12", "-0.3", "12.1"]
    for edge in (12.05, 12.05004, 12.04996, -3.25):
        with pytest.raises(ValueError, match="between two tenths"):
            drawing.px(edge)
