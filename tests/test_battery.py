"""Bad input: every case of tests/hostile/ is refused, quickly, in little memory, with its cause named; what is sound
loads. And docs/refusals.md, which tests/battery.py writes, says what was found."""

import itertools
import os
from pathlib import Path

import pytest
import torch

import checkpoints
from checkpoints.source import Source
from checkpoints.storage import files
from nanollm.errors import CheckpointError, NanollmError
from nanollm.text import render as rendering
from tests import battery
from tests.battery import (
    LARGEST,
    LINEAGES,
    REPORT,
    SECTIONS,
    SEEDED,
    committed,
    document,
    good_folder,
    measured,
    need_little,
    need_refusal,
    prepared,
    quickest,
    resident,
    tried,
)
from tests.hostile import GROUPS, good, lineages
from tests.hostile.configs import CONFIGS, META
from tests.hostile.files import FILES, INDICES

AGAIN = "python -m tests.battery writes it anew"
# what does not fit is refused alike in every lineage: all of them are for `make test-all`
ONCE = {f"tensors {name}" for name in lineages.LINEAGES[::16]}


def marks(key: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (key.startswith("tensors ") and key not in ONCE)


CASES = [pytest.param(key, name, id=f"{key}: {name[:60]}", marks=marks(key))
         for key, group in GROUPS.items() for name in group.cases]


@pytest.fixture(scope="module")
def goods(tmp_path_factory):
    """The good folder of each group, made once; that it loads is a test of its own."""
    made: dict[str, Path] = {}

    def folder(key: str) -> Path:
        if key not in made:
            made[key] = good_folder(GROUPS[key], tmp_path_factory.mktemp("good"))
        return made[key]
    return folder


@pytest.mark.parametrize("key", [pytest.param(key, marks=marks(key)) for key in GROUPS])
def test_the_good_folder_loads(key, goods):
    group, folder = GROUPS[key], goods(key)
    assert group.use(folder) is not None
    outcome = quickest(lambda: group.use(folder), group.seconds, group.process)
    assert outcome.error is None
    need_little(outcome, group.seconds, folder)


@pytest.mark.parametrize("key, name", CASES)
def test_case(key, name, goods, tmp_path, monkeypatch):
    group = GROUPS[key]
    harm, cause = group.cases[name]
    if key == "templates" and name != "nested ranges":       # one with the real limit, the others with a short one
        monkeypatch.setattr(rendering, "TIME_LIMIT", 0.5)
    folder = prepared(harm, tmp_path / "case", goods(key))
    outcome = quickest(lambda: group.use(folder), group.seconds, group.process)
    if cause is not None:
        need_refusal(outcome, cause, group.seconds, folder)
    else:
        assert outcome.error is None, outcome.error
        need_little(outcome, group.seconds, folder)
    if key == "templates":
        assert group.use(goods(key)) == "Hi", "the next chat is served"


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[pytest.mark.slow] * key.startswith("sweep")) for key in SEEDED]
)
def test_the_seeded_load_or_are_refused_and_most_are_refused(key, tmp_path):
    """Which of them is not foretold: docs/refusals.md records how many were."""
    outcomes, refused = tried(SEEDED[key], tmp_path)
    assert len(outcomes) // 2 < len(refused) < len(outcomes)


# ---- nothing is taken before the plan holds

LOADED = [key for key, group in GROUPS.items() if group.use is checkpoints.load and key != "mistral"]


@pytest.mark.parametrize("key", [pytest.param(key, marks=marks(key)) for key in LOADED])
def test_no_memory_is_taken_for_what_does_not_fit(key, goods, tmp_path, monkeypatch):
    """Here whoever takes memory for a parameter, begins to fill a model, or reads a tensor fails the test: but
    for values
    that are not finite. (Mistral's own layout does not say whether the head is the embedding: they are compared; so
    are two tensors of one name.)"""
    def refuse(*args, **more):
        pytest.fail("memory was taken before the plan held")

    with torch.device("meta"):  # torch notes here, once, which functions a device applies to: before one is replaced
        torch.empty(1)

    def empty(*args, plain=torch.empty, **more):
        found = plain(*args, **more)
        return found if found.is_meta else refuse()

    for number, (harm, cause) in enumerate(GROUPS[key].cases.values()):
        if cause is not None and "NaN or an infinity" not in cause and "other values" not in cause:
            folder = prepared(harm, tmp_path / str(number), goods(key))
            with monkeypatch.context() as watched, pytest.raises(NanollmError):
                watched.setattr(torch, "empty", empty)
                watched.setattr(Source, "fill", refuse)
                watched.setattr(files.Stored, "read_run", refuse)
                GROUPS[key].use(folder)


# ---- the battery can fail

def test_what_is_not_refused_or_takes_too_much_is_noticed(tmp_path):
    error = CheckpointError("model.safetensors: empty")
    folder = tmp_path / "model"
    folder.mkdir()
    for outcome, cause, said in (
        (battery.Outcome(None, 0.1, 1.0, []), "empty", "loaded, but should have said"),
        (battery.Outcome(error, 0.1, 1.0, []), "truncated", "does not say"),
        (battery.Outcome(error, 1.1, 1.0, []), "empty", "1.10 s"),
        (battery.Outcome(error, 0.1, LARGEST + 1, []), "empty", "65 MB"),
        (battery.Outcome(error, 0.1, 1.0, [str(tmp_path / "outside")]), "empty", "opened"),
        (battery.Outcome(error, 0.1, 1.0, ["/etc/passwd"]), "empty", "opened"),
    ):
        with pytest.raises(AssertionError, match=said):
            need_refusal(outcome, cause, 1.0, folder)
    need_refusal(battery.Outcome(error, 0.1, 1.0, [str(folder / "model.safetensors")]), "empty", 1.0, folder)
    (tmp_path / battery.MARK).touch()
    with pytest.raises(AssertionError, match="code of the file was run"):
        need_refusal(battery.Outcome(error, 0.1, 1.0, []), "empty", 1.0, folder)


def test_evil_pickles_are_evil(tmp_path):
    """Python's own reader runs them, and leaves the mark."""
    folder = tmp_path / "model"
    folder.mkdir()
    good.pickled(folder)
    harm, _ = GROUPS["pickles"].cases["os.system"]
    harm(folder)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / battery.MARK).exists()


@pytest.mark.skipif(resident() is None, reason="the system does not tell")
def test_time_memory_and_files_are_measured(tmp_path):
    (tmp_path / "x").write_text("x")

    def work() -> None:
        (tmp_path / "x").read_text()
        torch.ones(100_000_000 // 4)
        for _ in range(10_000_000):
            pass

    # a system that takes back idle pages of a large process meanwhile hides what was added: then once more
    outcome = next((found for found in (measured(work) for _ in range(3)) if found.megabytes > 90), None)
    assert outcome is not None and outcome.seconds > 0.05 and os.path.realpath(tmp_path / "x") in outcome.opened
    assert measured(lambda: None).megabytes < 5


def test_there_are_as_many_cases_as_were_promised():
    assert (
        sum(cause is not None for _, cause in FILES.values()) >= 44
        and int(committed()[SEEDED["mutated safetensors"].title].tried) == 500
    )
    assert len(INDICES) >= 12 and len(CONFIGS) >= 30 and len(META) >= 12


# ---- the document

def test_the_document_is_derived_anew():
    """Cases, headings, sums: the document written again from its own rows is the document."""
    rows = committed()
    assert list(rows) == list(SECTIONS), AGAIN
    assert document(rows) == REPORT.read_text(), AGAIN


@pytest.mark.parametrize("title", [title for title, keys in SECTIONS.items() if keys[0] in GROUPS])
def test_each_row_counts_its_cases(title):
    cases = list(itertools.chain.from_iterable(GROUPS[key].cases.values() for key in SECTIONS[title]))
    row, loaded = committed()[title], sum(cause is None for _, cause in cases)
    assert (int(row.tried), int(row.refused), int(row.loaded)) == (len(cases), len(cases) - loaded, loaded), AGAIN


def test_whatever_is_not_refused_loads():
    for title, row in committed().items():
        assert title == LINEAGES or int(row.tried) == int(row.refused) + int(row.loaded)
