"""The rules of the house: who may import whom, how long a file may be, what callers may rely on."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {name: sorted((ROOT / name).rglob("*.py")) for name in ("nanollm", "checkpoints", "kernels")}
SCRIPTS = sorted(ROOT.glob("*.py"))
LIBRARIES = {                                            # beside torch, numpy and the standard library
    "nanollm": {"nanollm"}, "checkpoints": {"checkpoints", "nanollm", "safetensors", "huggingface_hub", "tqdm", "gguf"}, "kernels": {"kernels", "triton"},
}
ITS_OWN = {"tokenizer.py": {"tokenizers"}, "tokenizer_files.py": {"tokenizers", "sentencepiece"}, "tokenizer_declared.py": {"tokenizers"}, "chat.py": {"jinja2"},
           "text.py": {"tokenizers", "tqdm"}, "plot.py": {"matplotlib"}, "state.py": {"safetensors"}, "options.py": {"tomli"},
           "log.py": {"wandb"}, "show.py": {"checkpoints"},        # the command of show.py reads a checkpoint, and imports them inside it
           "compare.py": {"transformers"}}                         # it compares with them, and imports them inside
FORWARD = "config config_parts norm rope mask frame linear attention mlp block model".split()
TRAINER = "data optim losses distributed".split()         # with train.py: what a training step runs through


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", [p for files in PACKAGES.values() for p in files], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = LIBRARIES[package] | {"torch", "numpy"} | ITS_OWN.get(path.name, set()) | sys.stdlib_module_names
    assert not {name for name in imports(path) if name.partition(".")[0] not in allowed}


def test_every_own_library_is_still_used():
    for name, libraries in ITS_OWN.items():
        [path] = [path for files in PACKAGES.values() for path in files if path.name == name and path.parent.name != "families"]
        assert libraries <= {found.partition(".")[0] for found in imports(path)}, name


def test_config_is_imported_by_all_and_imports_nothing():
    found = set().union(*(imports(path) for path in PACKAGES["nanollm"] if path.name.startswith("config")))
    assert {name for name in found if name.startswith(("nanollm", "torch")) and not name.startswith("nanollm.config_")} == {"nanollm.errors"}


def test_importing_loads_neither_torch_nor_transformers():
    quick = "import sys, nanollm; assert not {'torch', 'transformers', 'triton', 'tokenizers'} & set(sys.modules)"
    whole = "import sys, nanollm.generation, nanollm.tokenizer, nanollm.chat, nanollm.show; assert 'checkpoints' not in sys.modules; import checkpoints; assert not {'transformers', 'matplotlib', 'huggingface_hub', 'kernels'} & set(sys.modules)"
    for code in (quick, whole):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", [*SCRIPTS, *(p for files in PACKAGES.values() for p in files)], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_over_300_lines(path):
    assert path.read_text().count("\n") <= 300


def test_the_forward_path_stays_under_1000_lines():
    assert sum((ROOT / "nanollm" / f"{name}.py").read_text().count("\n") for name in FORWARD) < 1000


def test_the_trainer_stays_under_1000_lines():
    files = [ROOT / "train.py", *(ROOT / "nanollm" / f"{name}.py" for name in TRAINER)]
    assert sum(path.read_text().count("\n") for path in files) < 1000


FAMILIES = re.compile(r"llama|mistral|mixtral|qwen|gemma|falcon|\bphi|bloom|olmo|gpt|aquila|xverse|\byi\b|model_type", re.IGNORECASE)


def code_words(path: Path) -> list[str]:
    """Names and strings of a file's code, docstrings and comments left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    words = []
    for node in ast.walk(tree):
        words += [getattr(node, field) for field in ("id", "attr", "name", "arg") if isinstance(getattr(node, field, None), str)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.append(node.value)
    return words


@pytest.mark.parametrize("path", [p for p in PACKAGES["nanollm"] if p.name not in ("presets.py", "templates.py", "options.py", "sft.py") and not p.name.startswith("token")], ids=lambda p: p.name)
def test_the_decoder_knows_no_family(path):
    """presets.py and options.py have shapes by name, templates.py has chat formats by name, the tokenizer's files and sft.py have the names of formats; Llama3 is the name of a RoPE formula;
    show.py compares every model with one."""
    assert not [word for word in code_words(path) if FAMILIES.search(word) and word.lower() != "llama3" and word != "Different from Llama"]


PUBLIC = {
    "nanollm": ["Decoder", "ModelConfig", "generate"],
    "checkpoints.load": "(source: str | pathlib.Path, *, dtype: torch.dtype | None = None, device: str | torch.device = 'cpu', ignore: collections.abc.Collection[str] = ()) -> nanollm.model.Decoder",
    "checkpoints.save": "(model: nanollm.model.Decoder, folder: str | pathlib.Path, *, shard_bytes: int = 5000000000) -> None",
    "nanollm.tokenizer.load": "(folder: str | pathlib.Path) -> 'Tokenizer'",
    "nanollm.model.Decoder": "(config: nanollm.config.ModelConfig, seed: int = 0) -> None",
    "nanollm.model.Decoder.forward": "(self, tokens: torch.Tensor, positions: torch.Tensor | None = None, cache: nanollm.cache.Cache | None = None) -> torch.Tensor",
    "nanollm.generation.generate": "(model: nanollm.model.Decoder, prompt: collections.abc.Sequence[int], max_new_tokens: int, *, stop_ids: collections.abc.Iterable[int] = (), seed: int | None = None, **sampling: Any) -> collections.abc.Iterator[int]",
}


def test_the_public_face_is_frozen():
    """A change here breaks somebody: make it on purpose, and say so in the commit."""
    import importlib

    import nanollm
    assert nanollm.__all__ == PUBLIC["nanollm"] and all(getattr(nanollm, name) for name in nanollm.__all__)
    for path, signature in PUBLIC.items():
        if path == "nanollm":
            continue
        module, owner = path, []
        while True:
            try:
                found = importlib.import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                owner.insert(0, last)
        for name in owner:
            found = getattr(found, name)
        assert re.sub(r"torch\._\w+\.\w+\.Tensor|torch\.Tensor", "torch.Tensor", str(inspect.signature(found))) == signature, path


OPTIONS = {
    "generate.py": "--chat --context --device --dtype --help --ignore --max-new-tokens --min-p --model --prompt --quantize --seed --stop --suffix --system --temperature --template --top-k --top-p",
    "train.py": "--balance --batch-size --chat --clip --compile --config --context --data --decay --device --dtype --eval-every --force --help --init --keep --lr --mfu --micro-batch --mix --offload --optimizer --out --plan --preset --prompt --recompute --replicas --resume --sample-every --save-every --schedule --seed --skip-sigma --skip-steps --steps --template --tensorboard --tokenizer --vocab --wandb --warmup --weight-decay --world-size --z-loss",
}


@pytest.mark.parametrize("script", OPTIONS)
def test_the_options_are_frozen(script):
    text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert sorted(set(re.findall(r"^ +(?:-h, )?(--[a-z][\w-]*)", text, re.MULTILINE))) == OPTIONS[script].split()


@pytest.mark.parametrize("path", [p for files in PACKAGES.values() for p in files], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_function_says_what_it_does(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a file begins with what it is about"
    silent = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
              and ast.get_docstring(node) is None and node.end_lineno - node.lineno > 6]
    assert not silent


@pytest.mark.parametrize("path", PACKAGES["nanollm"], ids=lambda p: p.name)
def test_public_functions_are_typed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.col_offset in (0, 4):
            untyped = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped and node.returns is not None, (node.name, untyped)
