"""Measure every fixture once more, count what each family costs, and write what was found as docs/families.md.

    python -m tests.families_table                  all of them, some minutes
    python -m tests.families_table llama-1 …        these, and those without a row; the other rows stay, and all that is derived is derived anew

tests/test_parity.py, which computes the same numbers anyway, holds them to twice what is committed; tests/test_families_table.py derives
everything else anew.
"""

import ast
import inspect
import io
import platform
import re
import sys
import tempfile
import tokenize
from datetime import date
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
from tests.fixtures import FIXTURES
from tests.oracles import TOKENS, Fixture, difference, reference_logits, tokens, write

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "families.md"

HEAD = """# The families, and what was compared with what

Written by `python -m tests.families_table`, held by `tests/test_families_table.py` and `tests/test_parity.py`.
{machine}

## Parity

Each row is a published shape in miniature: a tiny model with loud random weights (`tests/oracles.py`), written by the oracle and loaded
through `checkpoints.load`. The oracle is transformers' own class of the family (native); where it has none, another of its classes that
computes the same from renamed weights; where there is none of those either, such a class with the missing piece written down in the fixture
after the published file. The row says which. None of that uses our tables or our decoder.

- float32: the largest difference of any logit over the spread of the logits, {tokens} tokens, batch 2, against each implementation of
  attention that is right in transformers for that family.
- bfloat16: bit-equal is every logit of the last of them; else the errors, ours and theirs, against the float32 logits of the same weights.
- cached: 64 greedy tokens with our cache, past every window and original context, and the oracle's.
- round trip: what `checkpoints.save` writes after `checkpoints.load`, beside what was there.

Folders that also see pictures (Gemma 3, Qwen2-VL, Qwen2.5-VL) have no row, since what is saved of them is a text model: `tests/families/test_multimodal.py`
compares them with transformers' multimodal classes.

{summary}
"""
TABLE = "| fixture | model_type | oracle | float32 | bfloat16 | cached | round trip |\n|---|---|---|---|---|---|---|\n"
COSTS = """
## What a family costs

Lines of code, without docstrings, comments and blank lines: the family's file in `checkpoints/families/`, and the files of mixers and
feed-forwards that it needs beside attention and MLP. Chat templates: those that are in `nanollm/text/templates.py`, as the folders ship none.

| file | model_type | lines | parts of its own | tokenizer | chat templates |
|---|---|--:|---|---|---|
"""
PROVED = """
## Tokenizers and templates

No published tokenizer is here but Mistral's. What is compared is each *kind*, on trained miniatures, with the library that defines it
(`tests/test_tokenizer.py`):

{tokenizers}

A template that a folder ships runs in Jinja as it is: templates in the forms that ChatML, Llama 2 and 3, Zephyr and Gemma have render as in
transformers (`tests/test_chat.py`). Where folders ship none, `nanollm/text/templates.py` has them (`tests/test_templates.py`):

| template | how it was compared, with what |
|---|---|
"""

# kind → what is proved of it, and the test that does
TOKENIZERS = {
    "byte BPE": ("byte-level, in tokenizer.json or vocab.json with merges.txt: ids, text and the rule for BOS equal transformers'", "test_ids_and_text_equal_transformers"),
    "metaspace BPE": ("in tokenizer.json: the same", "test_ids_and_text_equal_transformers"),
    "sentencepiece": ("BPE and unigram: ids and text equal the sentencepiece library's", "test_sentencepiece_equals_sentencepiece"),
    "tiktoken ranks": ("ids equal tiktoken's", "test_ranks_equal_tiktoken"),
    "GPT-2 in code": ("ids equal those of tiktoken's own gpt2 with the extra tokens", "test_xgen_equals_tiktoken"),
    "ranks and prefix in code": ("special tokens are those that the folder declares", "test_glm4_declares_its_special_tokens"),
    "Mistral's sentencepiece": ("ids equal mistral-common's, on the published files v1 to v3", "test_mistral_sentencepiece_equals_mistral_common"),
    "tekken": ("ids and text equal mistral-common's, on the published file", "test_tekken_equals_mistral_common"),
}
# file in checkpoints/families/ → kinds of tokenizer that its models come with; those of its templates that are in nanollm/text/templates.py
TOKENS_OF = {
    "llama": ("sentencepiece, metaspace BPE, byte BPE, tiktoken ranks, GPT-2 in code",
              "alpaca, aquila, aquila-chat, aquila-legacy, aquila-v1, aquila-v2, chatml, deepseek-coder, llama-2, orca-2, vicuna, xgen, xverse"),
    "mistral": ("Mistral's sentencepiece, tekken", "zephyr"),
    "mixtral": ("Mistral's sentencepiece", ""),
    "mamba2": ("byte BPE, Mistral's sentencepiece", ""),
    "chatglm": ("sentencepiece, ranks and prefix in code", "chatglm2, chatglm3, glm4"),
    "gemma": ("sentencepiece", "zephyr-gemma"),
    "baichuan": ("sentencepiece", "baichuan"),
    "internlm": ("sentencepiece", "internlm, internlm-eoh"),
    "qwen1": ("tiktoken ranks", "qwen"),
    "phi3": ("sentencepiece, byte BPE", ""),
    **dict.fromkeys(["jamba", "phimoe", "stripedhyena"], ("sentencepiece, metaspace BPE", "")),
    **dict.fromkeys(["persimmon", "recurrent_gemma", "yuan"], ("sentencepiece", "")),
    **dict.fromkeys(["bloom", "cohere", "deepseek", "falcon", "glm", "gpt2", "gpt_neox", "gpt_oss", "mamba", "mpt", "olmo", "phi", "qwen", "qwen_moe",
                     "qwen_vl", "rwkv", "stablelm", "starcoder"], ("byte BPE", "")),
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

    def numbers(self, cell: str) -> list[float]:
        """Those in a cell: what was measured."""
        return [float(found) for found in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?(?=[ ,;]|$)", getattr(self, cell))]


# ---- what is measured

def greedy_agrees(fixture: Fixture, theirs: transformers.PreTrainedModel, ours: torch.nn.Module, new: int = 64) -> bool:
    """64 tokens with our cache, and the reference's."""
    prompt = tokens(fixture, batch=1, length=12)
    if fixture.length_dependent or fixture.logits is not None or not fixture.cache:
        expected = prompt
        for _ in range(new):
            expected = torch.cat([expected, reference_logits(fixture, theirs, expected)[:, -1:].argmax(-1)], 1)
    else:
        expected = theirs.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None)
    return list(generate(ours, prompt[0].tolist(), new)) == expected[0, 12:].tolist()


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square, in standard deviations of the exact ones."""
    return ((logits.float() - exact).square().mean().sqrt() / exact.std()).item()


def bfloat16(fixture: Fixture, x: torch.Tensor) -> str:
    """Bit-equal, or how far either is from the float32 logits of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = reference_logits(fixture, write(fixture, Path(folder), torch.bfloat16), x, *fixture.attention[-1:])
        ours, exact = checkpoints.load(folder)(x), checkpoints.load(folder, dtype=torch.float32)(x)
    return "bit-equal" if torch.equal(ours, theirs) else f"error {error(ours, exact):.3f}; theirs {error(theirs, exact):.3f}"


@torch.inference_mode()
def measured(name: str) -> Row:
    """One line of the table."""
    fixture = FIXTURES[name]
    x = tokens(fixture)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "in", Path(folder) / "out"
        theirs, ours = write(fixture, before), checkpoints.load(before)
        checkpoints.save(ours, after)
        same = all((after / file).read_bytes() == (before / file).read_bytes() for file in ("model.safetensors", "generation_config.json"))
    ways = {way: difference(ours(x), reference_logits(fixture, theirs, x, way)) for way in fixture.attention or (None,)}
    family = next(kind for kind in FAMILIES if FAMILIES[kind] is ours.origin.family)        # first layouts have configs that do not say
    return Row(name, ours.origin.values.get("model_type", family), fixture.oracle, ", ".join(f"{way or ''} {found:.0e}".strip() for way, found in ways.items()),
               bfloat16(fixture, x), "equal" if greedy_agrees(fixture, theirs, ours) else "DIFFER", "bytes equal" if same else "DIFFERS")


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
    names = {name.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module == "nanollm.config" for name in node.names}
    kinds = [kind for kind in MODULES if kind.__name__ in names and kind not in (config.Attention, config.MLP)]
    return list(dict.fromkeys(Path(inspect.getfile(MODULES[kind])) for kind in kinds))


def model_types(path: Path) -> list[str]:
    return [kind for kind in FAMILIES if file_of(kind) == path]


def costs() -> list[str]:
    """One line a family's file, in the order of the registry."""
    lines = []
    for path in dict.fromkeys(map(file_of, FAMILIES)):
        parts = ", ".join(f"{part.name} {code_lines(part)}" for part in own_parts(path)) or "–"
        kinds, templates = TOKENS_OF.get(path.stem, ("", ""))
        lines.append(f"| {path.name} | {', '.join(model_types(path))} | {code_lines(path)} | {parts} | {kinds or '–'} | {templates or '–'} |")
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


def document(rows: dict[str, Row], machine: str) -> str:
    """docs/families.md."""
    body = "".join(f"\n### {file}\n\n{TABLE}" + "".join(f"| {' | '.join(rows[name])} |\n" for name in names)
                   for file, names in grouped({name: row.model_type for name, row in rows.items()}).items())
    worst, equal = max(max(row.numbers("float32")) for row in rows.values()), sum(row.bfloat16 == "bit-equal" for row in rows.values())
    summary = f"{len(rows)} fixtures. The largest difference of all is {worst:.0e}; {equal} of them are bit-equal in bfloat16."
    return HEAD.format(machine=machine, tokens=TOKENS, summary=summary) + body + COSTS + "\n".join(costs()) + "\n" + proved()


def committed() -> dict[str, Row]:
    """The rows of docs/families.md."""
    cells = [line.strip("| ").split(" | ") for line in REPORT.read_text().splitlines() if line.startswith("| ")] if REPORT.exists() else []
    return {each[0]: Row(*each) for each in cells if len(each) == len(Row._fields) and each[0] != "fixture"}


def held(fixture: Fixture, cell: str, place: int, found: float) -> None:
    """What a test measured must be what the table says, or at most twice that. A fixture without a row is named by test_families_table."""
    row = committed().get(next(name for name, one in FIXTURES.items() if one is fixture))
    if row is not None:
        assert found <= 2 * row.numbers(cell)[place] + 1e-7, f"{row.fixture}: {cell} is {found:.1e}, docs/families.md says {getattr(row, cell)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}."
    old = {name: row for name, row in committed().items() if name not in sys.argv[1:]} if sys.argv[1:] else {}
    REPORT.write_text(document({name: old.get(name) or measured(name) for name in FIXTURES}, machine))
    print(REPORT.read_text())
