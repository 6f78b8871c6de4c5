"""docs/families.md is what the tests find: here all but the measured numbers, which test_parity holds."""

import ast
import re
from pathlib import Path

import pytest

from checkpoints.families import FAMILIES
from nanollm.text.templates import TEMPLATES
from tests import families_table
from tests.families_table import (
    REPORT,
    TOKENIZERS,
    TOKENS_OF,
    Row,
    code_lines,
    committed,
    document,
    file_of,
    own_parts,
)
from tests.fixtures import FIXTURES

AGAIN = "python -m tests.families_table writes it anew"


def test_every_fixture_has_its_row_and_each_row_its_fixture():
    assert sorted(committed()) == sorted(FIXTURES), AGAIN


def test_all_but_the_measured_numbers_is_derived_anew():
    """Order, headings, oracles, costs, proofs: the document written again from its own rows is the document."""
    text, rows = REPORT.read_text(), committed()
    machine = text.splitlines()[3]
    assert document({name: rows[name] for name in FIXTURES}, machine) == text, AGAIN
    assert [rows[name].oracle for name in FIXTURES] == [fixture.oracle for fixture in FIXTURES.values()], AGAIN


@pytest.mark.parametrize("name", FIXTURES)
def test_each_row_is_a_proof(name):
    """What the tests of the fixture assert is what its row says, in the ways that the fixture allows."""
    fixture, row = FIXTURES[name], committed()[name]
    found = row.numbers("float32")
    assert len(found) == max(1, len(fixture.attention)) and max(found) < fixture.bound
    assert all(way in row.float32 for way in fixture.attention)
    assert (row.bfloat16 == "bit-equal") >= fixture.bit_equal and len(row.numbers("bfloat16")) == (0 if row.bfloat16 == "bit-equal" else 2)
    assert (row.cached, row.round_trip) == ("equal", "bytes equal")


def test_every_family_has_a_fixture():
    """But those that leave other towers out: what they load is the fixture of another family."""
    files = {file_of(row.model_type) for row in committed().values()}
    assert not [kind for kind, family in FAMILIES.items() if file_of(kind) not in files and not family.left_out]


def test_what_is_said_of_tokenizers_names_a_test_that_exists():
    tests = {node.name for node in ast.parse((Path(__file__).parent / "test_tokenizer.py").read_text()).body if isinstance(node, ast.FunctionDef)}
    assert {test for _, test in TOKENIZERS.values()} <= tests
    assert {file_of(kind).stem for kind in FAMILIES} == set(TOKENS_OF)
    assert {kind for kinds, _ in TOKENS_OF.values() for kind in kinds.split(", ")} == set(TOKENIZERS)
    assert sorted(name for _, names in TOKENS_OF.values() for name in names.split(", ") if name) == sorted(TEMPLATES)


def test_lines_are_counted_without_docstrings_comments_and_blank_lines(tmp_path):
    (tmp_path / "x.py").write_text('"""One\n\ntwo."""\n\nimport os  # three\n\n# four\n\ndef f(x):\n    """Five."""\n    text = """a\n\n    b"""\n    return (x,\n            text)\n')
    assert code_lines(tmp_path / "x.py") == 7               # import, def, three of text, two of return


def test_what_a_family_needs_beside_attention_and_mlp():
    assert [path.name for path in own_parts(file_of("rwkv"))] == ["rwkv.py"]
    assert [path.name for path in own_parts(file_of("mixtral"))] == ["moe.py"] and own_parts(file_of("llama")) == []


def test_numbers_of_a_cell():
    row = Row("x", "y", "native", "eager 8e-07, sdpa 0e+00", "error 0.019; theirs 0.026", "equal", "bytes equal")
    assert row.numbers("float32") == [8e-07, 0.0] and row.numbers("bfloat16") == [0.019, 0.026] and row._replace(bfloat16="bit-equal").numbers("bfloat16") == []


def test_what_is_larger_than_committed_is_noticed(monkeypatch):
    name = next(iter(FIXTURES))
    row = Row(name, "llama", "native", "eager 8e-07, sdpa 0e+00", "bit-equal", "equal", "bytes equal")
    monkeypatch.setattr(families_table, "committed", lambda: {name: row})
    families_table.held(FIXTURES[name], "float32", 0, 1.6e-6)
    families_table.held(FIXTURES[name], "float32", 1, 0.9e-7)
    for place, found in ((0, 1.8e-6), (1, 1.1e-7)):
        with pytest.raises(AssertionError, match=re.escape(f"{name}: float32 is {found:.1e}")):
            families_table.held(FIXTURES[name], "float32", place, found)
