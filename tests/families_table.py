"""Measure fixtures once more, count what each family costs, and write what was found as docs/families.md.

    python -m tests.families_table              all fixtures, a minute or two
    python -m tests.families_table NAME …       these, and those without a row; other rows keep their numbers and date
    python -m tests.families_table --derive     those without a row; the document is written anew from the rows

The numbers are a record, with the machine that they were measured on. What holds on every machine are the bounds of
tests/test_parity.py. tests/test_families_table.py derives everything else anew.
"""

import argparse
import ast
import inspect
import io
import re
import tempfile
import tokenize
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import checkpoints
from checkpoints.families import FAMILIES, FILES
from nanollm import config
from nanollm.inference.generation import generate
from nanollm.layers import MODULES
from nanollm.text.templates import PROOFS
from tests.fixtures import FIXTURES, LINEAGES
from tests.model_types import coverage
from tests.oracles import TOKENS, Fixture, difference, reference_logits, tokens, write
from tests.record import here_and_now, lettered, places

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "families.md"

HEAD = """# The families, and what was compared with what

Written by `python -m tests.families_table`. The numbers are a record. What holds on every machine are the bounds of
`tests/test_parity.py`: in float32 a largest difference of {bound:.0e}. `tests/test_families_table.py` derives all else.

## Parity

Each row is a published shape in miniature: a tiny model with loud random weights (`tests/oracles.py`), written by the
oracle and loaded through `checkpoints.load`. The oracle is transformers' own class of the family (native); where it has
none, another of its classes that computes the same from renamed weights; where there is none of those either, such a
class with the missing piece written down in the fixture after the published file. The row says which. None of that uses
our tables or our decoder.

- float32: the largest difference of any logit over the spread of the logits, {tokens} tokens, batch 2, against each
  implementation of attention that is right in transformers for that family.
- bfloat16: bit-equal is every logit of the last of them; else the errors, ours and theirs, against the float32 logits
  of the same weights.
- cached: 64 greedy tokens with our cache, past every window and original context; equal if each of them is the one that
  the oracle's full pass chooses.
- round trip: what `checkpoints.save` writes after `checkpoints.load`, beside what was there.
- measured: when, and on what.
{measured}

Folders that also see pictures (Gemma 3 and 4, Qwen2-VL, Qwen2.5-VL) have no row, since what is saved of them is a text
model: `tests/families/test_multimodal.py` compares them with transformers' multimodal classes.

{summary}
"""
TABLE = """| fixture | model_type | oracle | float32 | bfloat16 | cached | round trip | measured |
|---|---|---|---|---|---|---|---|
"""
COSTS = """
## What a family costs

Lines of code, without docstrings, comments and blank lines: the family's file in `checkpoints/families/`, and the files
of mixers and feed-forwards that it needs beside attention and MLP. They are a record too. Chat templates: those that
are in `nanollm/text/templates.py`, as the folders ship none.

| file | model_type | lines | parts of its own | tokenizer | chat templates |
|---|---|--:|---|---|---|
"""
MISSING = """
## What of transformers' text decoders loads

Counted by `python -m tests.model_types`, which says what a text decoder is, and names those that do not load. The
number is a record.

{coverage}.
"""
PROVED = """
## Tokenizers and templates

What is compared is each *kind*, on trained miniatures, with the library that defines it (`tests/test_tokenizer.py`),
and published files that packages ship: Mistral's, DeepSeek-V3's, those of Llama 3 and 4 and of Qwen-1
(`tests/test_real_tokenizers.py`, which names the packages; the extras `test` and `published` bring all but Qwen's):

{tokenizers}

A template that a folder ships runs in Jinja as it is: templates in the forms that ChatML, Llama 2 and 3, Zephyr and
Gemma have render as in transformers (`tests/test_chat.py`). Where folders ship none, `nanollm/text/templates.py` has
them (`tests/test_templates.py`):

| template | how it was compared, with what |
|---|---|
"""

# kind → what is proved of it, and the test that does
TOKENIZERS = {
    "byte BPE": (
        "byte-level, in tokenizer.json or vocab.json with merges.txt: ids, text and BOS equal transformers'",
        "test_ids_and_text_equal_transformers"),
    "metaspace BPE": ("in tokenizer.json: the same", "test_ids_and_text_equal_transformers"),
    "sentencepiece": (
        "BPE and unigram: ids and text equal the sentencepiece library's", "test_sentencepiece_equals_sentencepiece"),
    "tiktoken ranks": (
        "each published file is known by its number of ranks; ids equal tiktoken's", "test_ranks_equal_tiktoken"),
    "GPT-2 in code": ("ids equal those of tiktoken's own gpt2 with the extra tokens", "test_xgen_equals_tiktoken"),
    "ranks and prefix in code": (
        "special tokens are those that the folder declares", "test_glm4_declares_its_special_tokens"),
    "Mistral's sentencepiece": (
        "ids equal mistral-common's, on the published files v1 to v3",
        "test_mistral_sentencepiece_equals_mistral_common"),
    "tekken": (
        "ids and text equal mistral-common's, on the published file", "test_tekken_equals_mistral_common"),
}


class Row(NamedTuple):
    """One line of the table, as its cells."""
    fixture: str
    model_type: str
    oracle: str
    float32: str
    bfloat16: str
    cached: str
    round_trip: str
    measured: str           # date, machine, libraries; in the document a letter, which its head explains

    def numbers(self, cell: str) -> list[float]:
        """Those in a cell: what was measured."""
        return [float(found) for found in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?(?=[ ,;]|$)", getattr(self, cell))]


# ---- what is measured

def greedy_agrees(
    fixture: Fixture, theirs: transformers.PreTrainedModel, ours: torch.nn.Module, new: int = 64) -> bool:
    """Whether each of 64 tokens that our cache gives is the one that the reference chooses after all before it.

    One full pass judges them all, as no token sees those after it; where angles follow the length each has its own."""
    prompt = tokens(fixture, batch=1, length=12)
    whole = torch.cat([prompt, torch.tensor([list(generate(ours, prompt[0].tolist(), new))])], 1)
    if fixture.length_dependent:
        prefixes = (whole[:, :n] for n in range(12, 12 + new))
        logits = torch.cat([reference_logits(fixture, theirs, prefix)[:, -1:] for prefix in prefixes], 1)
    else:
        logits = reference_logits(fixture, theirs, whole[:, :-1])[:, 11:]
    return torch.equal(logits.argmax(-1), whole[:, 12:])


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square, in standard deviations of the exact ones."""
    return ((logits.float() - exact).square().mean().sqrt() / exact.std()).item()


def bfloat16(fixture: Fixture, x: torch.Tensor) -> str:
    """Bit-equal, or how far either is from the float32 logits of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = reference_logits(fixture, write(fixture, Path(folder), torch.bfloat16), x, *fixture.attention[-1:])
        ours, exact = checkpoints.load(folder)(x), checkpoints.load(folder, dtype=torch.float32)(x)
    if torch.equal(ours, theirs):
        return "bit-equal"
    return f"error {error(ours, exact):.3f}; theirs {error(theirs, exact):.3f}"


@torch.inference_mode()
def measured(name: str) -> Row:
    """One line of the table."""
    fixture = FIXTURES[name]
    x = tokens(fixture)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "in", Path(folder) / "out"
        theirs, ours = write(fixture, before), checkpoints.load(before)
        checkpoints.save(ours, after)
        files = ("model.safetensors", "generation_config.json")
        same = all((after / file).read_bytes() == (before / file).read_bytes() for file in files)
    ways = {way: difference(ours(x), reference_logits(fixture, theirs, x, way)) for way in fixture.attention or (None,)}
    family = next(kind for kind in FAMILIES if FAMILIES[kind] is ours.origin.family)    # some first configs do not say
    float32 = ", ".join(f"{way or ''} {found:.0e}".strip() for way, found in ways.items())
    return Row(
        name, ours.origin.values.get("model_type", family), fixture.oracle, float32, bfloat16(fixture, x),
        "equal" if greedy_agrees(fixture, theirs, ours) else "DIFFER", "bytes equal" if same else "DIFFERS",
        here_and_now())


# ---- what is counted

def code_lines(path: Path) -> int:
    """Lines that have code on them: no blank ones, no comments, no docstrings."""
    text = path.read_text()
    passed = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in passed
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def file_of(model_type: str) -> Path:
    """The family's own file."""
    return Path(checkpoints.__file__).parent / "families" / f"{FILES[model_type]}.py"


def own_parts(path: Path) -> list[Path]:
    """The files of the mixers and feed-forwards, beside attention and MLP, that a family's file asks for by name."""
    imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {name.name for node in imported if node.module == "nanollm.config" for name in node.names}
    kinds = [kind for kind in MODULES if kind.__name__ in names and kind not in (config.Attention, config.MLP)]
    return list(dict.fromkeys(Path(inspect.getfile(MODULES[kind])) for kind in kinds))


def model_types(path: Path) -> list[str]:
    return [kind for kind in FAMILIES if file_of(kind) == path]


def costs() -> list[str]:
    """One line a family's file, in the order of the registry."""
    lines = []
    for path in dict.fromkeys(map(file_of, FAMILIES)):
        parts = ", ".join(f"{part.name} {code_lines(part)}" for part in own_parts(path)) or "–"
        lineage = LINEAGES[path.stem]
        kinds, templates = lineage.TOKENIZERS, getattr(lineage, "TEMPLATES", "–")
        cells = (path.name, ", ".join(model_types(path)), str(code_lines(path)), parts, kinds, templates)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def proved() -> str:
    """What is compared of tokenizers and templates."""
    kinds = "\n".join(f"- {kind}: {what} (`{test}`)" for kind, (what, test) in TOKENIZERS.items())
    return PROVED.format(tokenizers=kinds) + "".join(f"| {name} | {proof} |\n" for name, proof in PROOFS.items())


# ---- the document

def grouped(kinds: dict[str, str]) -> dict[str, list[str]]:
    """Fixtures by the file of their family, given each one's model_type; both in the order of FIXTURES."""
    groups: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(file_of(kind).name, []).append(name)
    return groups


def document(rows: dict[str, Row]) -> str:
    """docs/families.md."""
    letters, measured = lettered(row.measured for row in rows.values())
    body = ""
    for file, names in grouped({name: row.model_type for name, row in rows.items()}).items():
        shown = [rows[name]._replace(measured=letters[rows[name].measured]) for name in names]
        body += f"\n### {file}\n\n{TABLE}" + "".join(f"| {' | '.join(row)} |\n" for row in shown)
    worst = max(max(row.numbers("float32")) for row in rows.values())
    equal = sum(row.bfloat16 == "bit-equal" for row in rows.values())
    summary = (f"{len(rows)} fixtures. The largest difference of all is {worst:.0e}; "
               f"{equal} of them are bit-equal in bfloat16.")
    head = HEAD.format(bound=Fixture.bound, tokens=TOKENS, summary=summary, measured=measured)
    return head + body + COSTS + "\n".join(costs()) + "\n" + MISSING.format(coverage=coverage()) + proved()


def committed() -> dict[str, Row]:
    """The rows of docs/families.md."""
    text = REPORT.read_text() if REPORT.exists() else ""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [Row(*each) for each in cells if len(each) == len(Row._fields) and each[0] != "fixture"]
    return {row.fixture: row._replace(measured=places(text)[row.measured]) for row in rows}


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.families_table", description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help="fixtures to measure; none: all of them")
    parser.add_argument("--derive", action="store_true", help="measure only fixtures that have no row")
    args = parser.parse_args()
    if unknown := set(args.names) - FIXTURES.keys():
        parser.error(f"no such fixture: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    known = committed() if args.names or args.derive else {}
    kept = {name: row for name, row in known.items() if name not in args.names}
    REPORT.write_text(document({name: kept.get(name) or measured(name) for name in FIXTURES}))
    print(REPORT.read_text())
