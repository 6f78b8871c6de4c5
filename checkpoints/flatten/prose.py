"""Docstrings and comments that still speak of what is there: a sentence that names what is gone goes with it."""

import ast
import re
import textwrap

from checkpoints.flatten.sources import Code, dedented, parsed, source
from nanollm import config

# things of the library that no flattened file has, and names of models, which say what others do
ELSEWHERE = re.compile(r"\b(?:padding|documents?|ragged|kernels?|quantised|packed|configs?|absent|meta device"
                       r"|type: ignore)\b")
MODELS = re.compile(r"\b(?:[Ll]lama|Mistral|Mixtral|Qwen|Gemma|Falcon|Phi|BLOOM|OLMo|GPT|DeepSeek|Command|Nemotron"
                    r"|Granite|Jamba|StripedHyena|V[23]\b|GLM|Cohere|NeoX|ERNIE|LFM2|Hugging Face|families)")
KINDS = set(config.__all__)


def speaks(text: str, gone: set[str], models: bool = False) -> bool:
    """Whether a text names nothing that is gone; nor, of comments, models, where it says what each of them does."""
    return not ELSEWHERE.search(text) and not (models and MODELS.search(text)) and not any(
        re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text) for word in gone)


def sentences(text: str) -> list[str]:
    """A paragraph in sentences."""
    return re.split(r"(?<=[.;]) (?=[^a-z(]|real |begins )", text)


def docstring(text: str, gone: set[str], indent: int) -> list[str]:
    """The lines of a docstring without the sentences, or indented lines, that name what is gone; maybe none."""
    kept = []
    for part in re.split(r"\n[ ]*\n", text.replace("at the head of the file", "above")):
        if part.startswith("    "):
            lines = [line for line in part.splitlines() if speaks(line, gone)]
            kept.append("\n".join(lines))
            continue
        said = [one for one in sentences(" ".join(part.split())) if speaks(one, gone)]
        whole = " ".join(said)
        if whole:
            whole = re.sub(r";$", ".", whole)
            kept.append("\n".join(textwrap.wrap(whole, 114 - indent)))
    kept = [part for part in kept if part.strip()]
    if not kept:
        return []
    together = " ".join(kept)
    if "\n" not in together and "    " not in together and len(together) < 2 * (110 - indent):
        kept = ["\n".join(textwrap.wrap(together, 114 - indent))]
    lines = "\n\n".join(kept).lstrip().splitlines()
    first = f'"""{lines[0]}'
    rest = [line if not line else " " * indent + line for line in lines[1:]]
    return [" " * indent + first + '"""'] if not rest else [" " * indent + first, *rest, " " * indent + '"""']


def pruned(lines: list[str], code: Code, gone: set[str]) -> list[str]:
    """The body of a function with its docstring and its trailing comments pruned."""
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    text = ast.get_docstring(code.node)
    parameters = {one.arg for one in code.parameters}
    read = {one.id for one in ast.walk(parsed(dedented(lines))) if isinstance(one, ast.Name)}
    missing = {name for name in parameters - read if len(name) > 1} | gone
    if text is not None:
        last = parsed(dedented(lines)).body[0].end_lineno or 0
        lines = docstring(text, missing, indent) + lines[last:]
    out = []
    for line in lines:
        found = re.match(r"(.*?)\s\s+# (.*)$", line)
        if found and found[1].strip() and not speaks(found[2], missing, True):
            line = found[1]
        elif line.strip().startswith("# ") and not speaks(line, missing, True):
            continue
        out.append(line)
    return out


def equations(module: str, gone: set[str], kinds: set[str]) -> list[str]:
    """The head of a module as comments: its indented lines, which are equations and diagrams, as far as they hold.

    A line that begins with the name of a part of a config, as those of RoPE's scalings, holds if the model has it; one
    that is set in further goes on with the line above; what is introduced by a sentence that is gone is gone too."""
    if module.endswith((".block", ".model", ".mask", ".state")):
        return []                                               # these show all ways of wiring side by side
    out: list[str] = []
    introduced = True
    for block in re.split(r"\n[ ]*\n", source(module).docstring):
        if not block.startswith("    "):
            introduced = not block.endswith(":") or speaks(block, set(), True)
            continue
        if not introduced:
            continue
        lines = block.splitlines()
        kept: list[str] = []
        for line in lines:
            if line.startswith(" " * 9) and not re.search(r"[│┌└─┬┴▲]", block):
                holds = bool(kept) and kept[-1] == lines[lines.index(line) - 1] and speaks(line, gone, True)
            else:
                holds = line.split()[0] in kinds if line.split()[0] in KINDS else speaks(line, gone, True)
            kept += [line] if holds else []
        if len(kept) == len(lines) or (kept and not re.search(r"[│┌└─┬┴▲]", block)):
            out += (["#"] if out else []) + [f"# {line[2:]}".rstrip() for line in kept]
    return out


def legend(modules: list[str], text: str) -> list[str]:
    """What the letters of shapes mean, gathered from the heads of the modules; those that the file uses."""
    meanings: dict[str, str] = {}
    for module in modules:
        found = re.search(r"^Shapes: (.*?)(?:\.\s|\.$|\n\n|\Z)", source(module).docstring, re.DOTALL | re.MULTILINE)
        for part in re.split(r"[,;]\s+", " ".join(found[1].split())) if found else []:
            match = re.match(r"([A-Za-z]) ([a-z][^()=:]*)$", part.strip())
            if match and match[1] not in meanings:
                meanings[match[1]] = match[2]
    used = {letter for letters in re.findall(r"\(([A-Za-z](?:(?:,| or|·) ?[A-Za-z])+[^()]*)\)", text)
            for letter in re.findall(r"\b[A-Za-z]\b", letters)}
    words = [f"{letter} {meaning}" for letter, meaning in meanings.items() if letter in used]
    return textwrap.wrap("Shapes: " + ", ".join(words) + ".", 116)
