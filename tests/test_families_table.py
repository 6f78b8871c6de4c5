"""docs/families.md: all but its record of measured numbers is derived anew, and every row of that is a proof."""

import ast
import re
from pathlib import Path

from transformers.models.auto import modeling_auto as auto

from checkpoints.families import FAMILIES
from nanollm.text.templates import TEMPLATES
from tests import families_table
from tests.families_table import (
    REPORT,
    TOKENIZERS,
    Row,
    code_lines,
    committed,
    document,
    file_of,
    own_parts,
)
from tests.fixtures import FIXTURES, LINEAGES, ONCE
from tests.model_types import NO_TEXT_DECODER, coverage

AGAIN = "python -m tests.families_table --derive writes it anew"


def test_every_fixture_has_its_row_and_each_row_its_fixture():
    assert sorted(committed()) == sorted(FIXTURES), AGAIN


def without_counts(text: str) -> str:
    """Those in the cells of `What a family costs`, and of the model types that load, are a record."""
    before, costs, after = re.split(r"(?<=\n)(## What a family costs\n|## Tokenizers and templates\n)", text)[::2]
    costs = re.sub(r"\d+ of the \d+ text decoders of transformers [\d.]+ load", "… load", costs)
    return before + re.sub(r"(\.py|\|) \d+(?=[ ,])", r"\1 …", costs) + after


def test_all_but_what_was_measured_or_counted_is_derived_anew():
    """Order, headings, oracles, parts, proofs: the document written again from its own rows is the document."""
    text, rows = REPORT.read_text(), committed()
    assert without_counts(document({name: rows[name] for name in FIXTURES})) == without_counts(text), AGAIN
    assert [rows[name].oracle for name in FIXTURES] == [fixture.oracle for fixture in FIXTURES.values()], AGAIN


def test_each_row_is_a_proof():
    """What the tests of the fixture assert is what its row says, in the ways that the fixture allows."""
    rows = committed()
    for name, fixture in FIXTURES.items():
        row = rows[name]
        found = row.numbers("float32")
        assert len(found) == max(1, len(fixture.attention)) and max(found) < fixture.bound, name
        assert all(way in row.float32 for way in fixture.attention), name
        assert (row.bfloat16 == "bit-equal") >= fixture.bit_equal, name
        assert len(row.numbers("bfloat16")) == (0 if row.bfloat16 == "bit-equal" else 2), name
        assert (row.cached, row.round_trip) == ("equal", "bytes equal"), name


def test_every_model_type_has_a_fixture_which_make_test_tries():
    """But those that leave other towers out: what they load is the fixture of another family."""
    tried = {row.model_type for name, row in committed().items() if name in ONCE}
    files = {file_of(kind) for kind in tried}
    assert tried == {row.model_type for row in committed().values()}
    assert not [kind for kind, family in FAMILIES.items() if file_of(kind) not in files and not family.left_out]


def test_what_no_text_decoder_is_has_its_reason_once():
    """And is a model_type of transformers that neither loads here nor stands in its lists of encoders."""
    kinds, encoders = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    assert NO_TEXT_DECODER.keys() <= kinds - encoders - FAMILIES.keys()
    found = coverage()
    assert set(found.loaded) == kinds & FAMILIES.keys() and not set(found.missing) & FAMILIES.keys()


def test_what_is_said_of_tokenizers_names_a_test_that_exists():
    tree = ast.parse((Path(__file__).parent / "test_tokenizer.py").read_text())
    assert {test for _, test in TOKENIZERS.values()} <= {getattr(node, "name", None) for node in tree.body}
    assert {file_of(kind).stem for kind in FAMILIES} == LINEAGES.keys(), "a family's fixtures are in a file of its name"
    assert {kind for lineage in LINEAGES.values() for kind in lineage.TOKENIZERS.split(", ")} == TOKENIZERS.keys()
    said = [name for lineage in LINEAGES.values() for name in getattr(lineage, "TEMPLATES", "").split(", ") if name]
    assert sorted(said) == sorted(TEMPLATES)


def test_lines_are_counted_without_docstrings_comments_and_blank_lines(tmp_path):
    code = ('"""One\n\ntwo."""\n\nimport os  # three\n\n# four\n\n'
            'def f(x):\n    """Five."""\n    text = """a\n\n    b"""\n    return (x,\n            text)\n')
    (tmp_path / "x.py").write_text(code)
    assert code_lines(tmp_path / "x.py") == 7               # import, def, three of text, two of return


def test_what_a_family_needs_beside_attention_and_mlp():
    assert [path.name for path in own_parts(file_of("rwkv"))] == ["rwkv.py"]
    assert [path.name for path in own_parts(file_of("mixtral"))] == ["moe.py"] and own_parts(file_of("llama")) == []


ROW = Row(
    "x", "llama", "native", "eager 8e-07, sdpa 0e+00", "error 0.019; theirs 0.026", "equal", "bytes equal", "today")


def test_numbers_of_a_cell():
    assert ROW.numbers("float32") == [8e-07, 0.0] and ROW.numbers("bfloat16") == [0.019, 0.026]
    assert ROW._replace(bfloat16="bit-equal").numbers("bfloat16") == []


def test_a_row_keeps_the_date_and_the_machine_that_it_was_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(families_table, "REPORT", tmp_path / "families.md")
    assert committed() == {}
    days = {"x": "2026-01-01, a machine", "y": "2026-01-02, a machine", "z": "2026-01-01, a machine"}
    rows = {name: ROW._replace(fixture=name, measured=day) for name, day in days.items()}
    families_table.REPORT.write_text(document(rows))
    assert committed() == rows
    assert "  - b: 2026-01-02, a machine\n" in families_table.REPORT.read_text()
