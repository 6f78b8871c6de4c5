"""The file: constants, records, functions and classes in the order of reading, then what loads and generates."""

import ast
import dataclasses
import inspect
import re

from torch import nn

from checkpoints.flatten import frame, training
from checkpoints.flatten.cleanup import fitted, tidy
from checkpoints.flatten.expressions import is_config
from checkpoints.flatten.heads import Heads
from checkpoints.flatten.naming import naming
from checkpoints.flatten.plain import TEXT, chosen
from checkpoints.flatten.prose import docstring, equations, legend, pruned
from checkpoints.flatten.sources import Code, dedented, global_value, is_ours, parsed, source
from checkpoints.flatten.training import drawing
from checkpoints.flatten.write import PLACE, Writer
from checkpoints.names.table import Table
from nanollm.config import MLP
from nanollm.layers import mask
from nanollm.layers.linear import Linear
from nanollm.model import Decoder

ORDER = """norm scaling rope alibi positions frame state mask attention ssd scan recurrent delta mamba mamba2
           latent_attention gated_attention""".split()
LAST = ["linear", "mlp", "xielu", "scaled_mlp", "moe", "input_weighted_moe", "normed_moe", "shared_block", "block",
        "model"]


class File(Heads):
    """Puts together what a Writer has left."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def text(self, title: list[str], names: Table, train: bool = False) -> str:
        """The whole file. title: the lines of its docstring."""
        writer = self.writer
        sections = self.sections()
        kinds = {type(one).__name__ for one in writer.constants.objects}
        code: list[str] = []
        for module, parts in sections:
            said = equations(module, self.gone, kinds)
            code += ["", "", *(self.banner(module) if said or len(parts) > 1 else []), *said]
            code += "\n\n\n".join(parts).splitlines()
        layers = self.layers()
        records = self.records(set(re.findall(r"\w+", "\n".join(code))))
        leaves = {leaf for one in writer.modules() for leaf in getattr(one, "FLOAT32", ())
                  if isinstance(getattr(one, leaf, None), nn.Parameter)}
        body = [*code, "", "", *(self.training() if train else self.loading(names, layers, leaves))]
        used = set(re.findall(r"\w+", "\n".join([*body, *records])))
        title = [*title[:-2], "", *legend([module for module, _ in sections], "\n".join(code)), *title[-2:]]
        head = [*title, *self.imports(body, records), "", *self.numbers(layers, used), *records]
        lines = fitted([tidy(line).rstrip() for line in [*head, *body]])
        return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)) + "\n"

    def loading(self, names: Table, layers: list[str], leaves: set[str]) -> list[str]:
        """The names of tensors, load, generate and the command."""
        table = naming(self.writer.model, names, self.writer.constants)
        text = "\n".join(table)
        there = {word for word, holds in {
            "arranged": "ARRANGED" in text, "uniform": not layers and "ARRANGED" not in text, "experts": "{e}" in text,
            "apart": bool(re.search(r'\(\["[^{"]*"', text)), "float32": bool(leaves),
            "tied": self.writer.model.config.tied, "cache": self.writer.cached,
        }.items() if holds}
        ends = ", ".join(f'".{leaf}"' for leaf in sorted(leaves))
        islands = ["", f"FLOAT32 = ({ends},)    # kept as stored"] if leaves else []
        words = {"LAYERS": "LAYERS" if not layers else "len(LAYERS)"}
        return ["# ---- weights", *table, *islands, "", "", *chosen(TEXT, there, words)]

    def training(self) -> list[str]:
        """How the weights are drawn, generate, and a loop."""
        rest = chosen(TEXT, {"cache"} if self.writer.cached else set(), {})
        generate = rest[next(i for i, line in enumerate(rest) if "inference_mode" in line) :]
        end = next(i for i, line in enumerate(generate) if line.startswith("if __name__"))
        return ["# ---- first values", *drawing(self.writer.model), "", "", *generate[:end],
                *training.TEXT.strip("\n").splitlines()]

    def banner(self, module: str) -> list[str]:
        name = {"frame": "what is remembered, and shared by all layers"}.get(module.rpartition(".")[2])
        return [f"# ---- {name or module.rpartition('.')[2].replace('_', ' ')}"]

    def imports(self, body: list[str], records: list[str]) -> list[str]:
        """What the file imports: as much as its text speaks of."""
        text = "\n".join(body)
        out = [f"import {name}" for name in ("math", "re") if re.search(rf"(?<![\w.]){name}\.", text)]
        out += ["import sys",
               "from collections.abc import Callable, Iterator" if "Callable" in text else
               "from collections.abc import Iterator",
               *(["from dataclasses import dataclass"] if records else []), "from pathlib import Path"]
        typing = [word for word in ("Any", "NamedTuple") if re.search(rf"\b{word}[\],)]", text)]
        out += [f"from typing import {', '.join(typing)}"] if typing else []
        out += ["", "import torch", *(["from safetensors.torch import load_file"] if "load_file" in text else [])]
        out += ["from torch import Tensor, nn"]
        return out + (["from torch.nn import functional as F"] if re.search(r"\bF\.", text) else [])

    def numbers(self, layers: list[str], used: set[str]) -> list[str]:
        """The constants of the config."""
        known = dict(self.writer.constants.comments)
        if not layers:
            known["LAYERS"] = len(self.writer.model.layers), "from the embedding to the head"
        order = ["VOCAB", "DIM", "LAYERS", *self.writer.constants.table.values()]
        out = []
        for name in sorted(known, key=order.index):
            value, comment = known[name]
            line = f"{name} = {value!r}"
            if name in used:
                out.append(f"{line:<40}# {comment}" if comment else line)
        return out + layers

    def layers(self) -> list[str]:
        """LAYERS, a letter a layer, where they differ."""
        writer = self.writer
        texts = [writer.construct(layer) for layer in writer.layers]
        if len(set(texts)) == 1:
            return []
        letters = {text: "abcdefghijklmnopqrstuvwxyz"[i] for i, text in enumerate(dict.fromkeys(texts))}
        word = "".join(letters[texts[kind]] for kind in writer.kind_of_layer)
        return [f"LAYERS = {repeated(word)}"]

    def layer_function(self) -> list[str]:
        """What each letter of LAYERS is."""
        writer = self.writer
        texts = list(dict.fromkeys(writer.construct(layer) for layer in writer.layers))
        if len(texts) == 1:
            return []
        place = f", {PLACE}: int" if writer.counts_layers else ""
        out = [f"def layer(kind: str{place}) -> Block:", '    """The kinds of layers."""']
        for i, text in enumerate(texts[:-1]):
            out += [f'    if kind == "{"abcdefghijklmnopqrstuvwxyz"[i]}":', f"        return {text}"]
        return [*out, f"    return {texts[-1]}"]

    def records(self, used: set[str]) -> list[str]:
        """Config classes of which something is left."""
        out: list[str] = []
        writer = self.writer
        done: set[type] = set()

        def one(kind: type) -> None:
            """Write a config class down, behind those of its fields."""
            if kind in done:
                return
            done.add(kind)
            lines = ["", "", "@dataclass(frozen=True)", f"class {writer.name(kind)}:",
                     f'    """{(kind.__doc__ or "").splitlines()[0]}"""']
            fields = sorted(writer.records.get(kind, ()), key=[*kind.__dataclass_fields__].index)   # type: ignore
            for field in fields:
                values = [getattr(part, field) for part in writer.constants.objects if type(part) is kind]
                for inner in {type(value) for value in values if is_config(value)}:
                    one(inner)
                names = sorted({writer.name(type(v)) if is_config(v) else type(v).__name__.replace("NoneType", "None")
                                for v in values}, key=lambda name: (name == "None", name))
                comment = writer.constants.comment(kind, field)
                line = f"    {field}: {' | '.join(names)}"
                lines.append(f"{line:<44}# {comment}" if comment else line)
            out.extend(lines)

        named = (kind for kind in writer.names if isinstance(kind, type) and dataclasses.is_dataclass(kind))
        for kind in [*writer.records, *named]:
            if writer.name(kind) in used:
                one(kind)
        return out

    def struck_out(self) -> set[str]:
        """Names of classes, functions and kinds of things that the modules of this file have, and it does not."""
        used = set(re.findall(r"\w+", self.left)) | {kind.__name__ for kind in self.classes}
        found = set()
        for module in {code.module for code in self.alive}:
            here = source(module)
            found |= {name.rpartition(".")[2] for name in here.defs} - {"forward", "project", "placed", "mixed", "add"}
            found |= here.words
        gates = {one.gated for one in self.writer.constants.objects if isinstance(one, MLP)}
        found -= {"gated"} if True in gates else set()
        found |= {"plain"} if gates == {True} else set()
        return {name for name in found - (used - {"plain"}) if len(name) > 3 and not name.startswith("_")}

    def rank(self, module: str) -> tuple[int, str]:
        name = module.rpartition(".")[2]
        if name in ORDER:
            return ORDER.index(name), name
        return (100 + LAST.index(name), name) if name in LAST else (50, name)

    def used(self, code: Code) -> bool:
        """Whether a function is still called from somewhere."""
        return code in self.alive

    def sections(self) -> list[tuple[str, list[str]]]:
        """(module, lines) of each module that something is left of."""
        self.alive = self.reached()
        self.left = "\n".join("\n".join(self.writer.specs[code].text) for code in self.alive)
        self.gone = self.struck_out()
        modules = sorted({code.module for code in self.alive} | {kind.__module__ for kind in self.classes}
                         | {module for (module, _), name in self.writer.globals.items()
                            if re.search(rf"\b{name}\b", self.left)}, key=self.rank)
        found: list[tuple[str, list[str]]] = []
        for module in modules:
            parts: list[list[str]] = []
            for name, node in source(module).defs.items():
                if "." in name:
                    continue
                lines = self.class_lines(module, node) if isinstance(node, ast.ClassDef) else (
                    self.function_lines(Code(module, name), 0))
                if lines:
                    parts.append(lines)
            constants = self.constant_lines(module, "\n".join(line for part in parts for line in part))
            if module == "nanollm.block":
                parts += [lines] if (lines := self.layer_function()) else []
            if module == mask.__name__ and not parts:           # one constant needs no section
                found[-1][1].insert(0, "\n".join(constants))
            elif parts or constants:
                found.append((module, ["\n".join(constants)] * bool(constants) + ["\n".join(part) for part in parts]))
        return found

    def reached(self) -> set[Code]:
        """Functions that what is left speaks of, from the model and the cache on; and `self.classes` likewise."""
        writer = self.writer
        by_name: dict[str, list[Code]] = {}
        for code in writer.specs:
            plain = code.name.rpartition(".")[2]
            if code in writer.entered:
                by_name.setdefault(f".{plain}" if code.owner else writer.names.get(
                    inspect.unwrap(global_value(code.module, code.name)), plain), []).append(code)
        classes = {writer.name(kind): kind for kind in [*writer.kinds(), *writer.names] if isinstance(kind, type)}
        self.classes: set[type] = set()
        alive: set[Code] = set()
        todo: list[Code] = []

        def meet(kind: type) -> None:
            """A class is used: so are its bases, and what makes and runs it."""
            if kind in self.classes or not is_ours(kind) or kind is Linear or kind.__module__.startswith(
                    "nanollm.config"):                          # of a config something else stays, see `records`
                return
            self.classes.add(kind)
            for one in kind.__mro__:
                if is_ours(one):
                    other = writer.in_place.get(one, one)
                    meet(other if isinstance(other, type) else one)
            todo.extend(code for code in writer.specs if writer.class_of(code) in kind.__mro__
                        and code.name.rpartition(".")[2] in ("__init__", "forward"))

        meet(Decoder)
        if writer.cached:
            meet(frame.Cache)
        for layer in writer.layers:
            for found in re.findall(r"[A-Za-z_]\w*", writer.construct(layer)):
                if found in classes:
                    meet(classes[found])
        while todo:
            code = todo.pop()
            if code in alive or code not in writer.entered:
                continue
            alive.add(code)
            tree = parsed(dedented(writer.specs[code].text))
            stored = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name)
                      and isinstance(one.ctx, ast.Store)} | {one.arg for one in code.parameters}
            for node in ast.walk(tree):
                if isinstance(node, ast.Name) and node.id not in stored:
                    todo += by_name.get(node.id, [])
                    if node.id in classes:
                        meet(classes[node.id])
                elif isinstance(node, ast.Attribute):
                    todo += by_name.get(f".{node.attr}", [])
        return {code for code in alive if code.owner is None or writer.class_of(code) in self.classes}

    def constant_lines(self, module: str, heads: str) -> list[str]:
        """Constants of a module that what is left reads."""
        found = source(module)
        lines = []
        for node in found.tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if not isinstance(target, ast.Name) or (module, target.id) not in self.writer.globals:
                continue
            name = self.writer.globals[module, target.id]
            if re.search(rf"\b{name}\b", self.left + heads):
                new = found.lines(node.lineno, node.end_lineno or 0)
                new[0] = re.sub(rf"^{target.id}(: Final)?\b", name, new[0])
                lines += new
        return lines

    def function_lines(self, code: Code, indent: int) -> list[str]:
        if not self.used(code):
            return []
        writer, node = self.writer, code.node
        spec = writer.specs[code]
        body = pruned(self.without_idle_attributes(spec.text), code, self.gone) if spec.text else []
        grad = [" " * indent + "@torch.no_grad()" for one in node.decorator_list if "no_grad" in ast.unparse(one)]
        return grad + self.head(code, indent) + body

    def without_idle_attributes(self, lines: list[str]) -> list[str]:
        """Without `self.memo = {}` where nothing reads .memo."""
        return [line for line in lines if not (found := re.match(r" *self\.(\w+)(: [^=]*)? = \{\}$", line))
                or len(re.findall(rf"\.{found[1]}\b", self.left)) > 1]

    def stands(self, kind: type) -> bool:
        """Whether there is more to a class than that others once had it as a base."""
        return not issubclass(kind, nn.Module) or any(type(one) is kind for one in self.writer.modules())

    def base_name(self, base: type, name: str) -> str:
        """A base class; nn.Module in the place of one that has nothing left in it."""
        base = self.writer.in_place.get(base, base)
        own = any(self.used(code) for code in self.writer.specs if self.writer.class_of(code) is base)
        module = isinstance(base, type) and issubclass(base, nn.Module)
        return "nn.Module" if module and is_ours(base) and base is not Linear and not own else (
            self.kind_name(base, name))

    def class_lines(self, module: str, node: ast.ClassDef) -> list[str]:
        """What is left of a class, and nothing where it is not used."""
        kind = global_value(module, node.name)
        writer = self.writer
        here = [one for one in node.body if isinstance(one, ast.FunctionDef)
                and self.used(Code(module, f"{node.name}.{one.name}"))]
        if kind not in self.classes or not (here or self.stands(kind)):
            return []
        bases = [self.base_name(global_value(module, base.id), base.id) if isinstance(base, ast.Name)
                 else source(module).text(base) for base in node.bases]
        lines = [f"class {writer.name(kind)}{'(' + ', '.join(bases) + ')' if bases else ''}:"]
        first = node.body[0]
        if isinstance(first, ast.Expr):
            lines += docstring(
                ast.get_docstring(node) or "", self.gone if module != frame.__name__ else set(), 4)
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and "NamedTuple" in bases]
        fields += [one for one in node.body if isinstance(one, ast.AnnAssign) and not issubclass(kind, nn.Module)
                   and module != frame.__name__ and re.search(rf"\.{ast.unparse(one.target)}\b", self.left)]
        for field in dict.fromkeys(fields):
            lines += source(module).lines(field.lineno, field.end_lineno or 0)
        for one in here:
            body = self.function_lines(Code(module, f"{node.name}.{one.name}"), 4)
            if body:
                lines += [""] * (len(lines) > 1) + body
        if len(lines) == 1:
            lines.append("    pass")
        return lines


def repeated(word: str) -> str:
    """A word of letters, shortened where it repeats itself: "aab" * 8 + "a"."""
    for size in range(1, len(word) // 2 + 1):
        times = len(word) // size
        if word[:size] * times == word[: size * times] and times > 1:
            rest = word[size * times :]
            return f'"{word[:size]}" * {times}' + (f' + "{rest}"' if rest else "")
    for size in range(1, len(word)):                            # a beginning, then one kind
        if len(set(word[size:])) == 1 and len(word) - size > 3:
            return f'"{word[:size]}" + "{word[-1]}" * {len(word) - size}'
    return f'"{word}"'
