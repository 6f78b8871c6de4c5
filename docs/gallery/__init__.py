"""The families as differences from Llama: docs/gallery.html, one page that needs nothing beside it.

    python -m docs.gallery                                  write the page anew
    python -m docs.gallery --sizes NAME=config.json …       add published models to the table of sizes, then write it

What differs is data: the config of a fixture (tests/fixtures) beside that of a Llama, field by field, in the words of
checkpoints/show/words.py. A fixture is small, so its numbers are letters here. The table of sizes is a record,
docs/gallery/sizes.json: what the library counts for a published config.json.

    families.py     what differs, and which families differ alike
    drawing.py      a layer as SVG, differences in colour
    reasons.py      why, as the papers say it
    page.py         the page
"""
