"""The rules of the house: who may import whom, how long a file may be, what callers may rely on."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {name: sorted((ROOT / name).rglob("*.py")) for name in ("nanollm", "checkpoints", "kernels")}
SCRIPTS = sorted(ROOT.glob("*.py"))

# Which room of the house may import which. Every room may import `errors`, and itself.
ARROWS = {
    "nanollm.errors": "",
    "nanollm.cli": "",
    "nanollm.config": "",
    "nanollm.init": "",
    "nanollm.ops": "",
    "nanollm.layers": "config init ops",
    "nanollm.cache": "config layers",
    "nanollm.block": "config layers",
    "nanollm.model": "block cache config init layers",
    "nanollm.presets": "config",
    "nanollm.text": "",
    "nanollm.data": "cli text",
    "nanollm.inference": "cache cli config layers model ops text",
    "nanollm.training": "block cli config data init layers model ops presets text",
    "checkpoints.names": "nanollm.config",
    "checkpoints.storage": "names",
    "checkpoints.families": "names nanollm.cli nanollm.config",
    "checkpoints.layouts": "families names storage nanollm.config nanollm.layers nanollm.text",
    "checkpoints.packing": "names storage nanollm.inference nanollm.model",
    "checkpoints.source": "families layouts names packing storage nanollm.config nanollm.inference nanollm.model",
    "checkpoints.parts": "layouts names source storage nanollm.inference nanollm.model",
    "checkpoints.companions": "families layouts storage nanollm.text",
    "checkpoints.export": "companions families layouts names source storage nanollm.config",
    "checkpoints.adapters": "export names source storage nanollm.model nanollm.training",
    "checkpoints.compressing": "export names packing source storage nanollm.inference nanollm.layers",
    "checkpoints.show": "layouts names source storage nanollm.cli nanollm.config nanollm.layers nanollm.model nanollm.presets nanollm.training",
    "checkpoints.convert": "adapters compressing export layouts names source storage nanollm.cli nanollm.inference",
    "checkpoints.delta": "convert export families layouts source storage nanollm.cli",
    "checkpoints.flatten": "families layouts names source nanollm.cache nanollm.cli nanollm.config nanollm.init nanollm.layers nanollm.model nanollm.presets",
    "checkpoints.inspect": "companions folding layouts names show source storage nanollm.cli",
    "checkpoints.tracing": "names storage nanollm.config nanollm.model",
    "checkpoints.folding": "",
    "checkpoints.between": "convert folding layouts names show source storage tracing nanollm.config",
    "checkpoints.compare": "between convert folding layouts names source storage tracing nanollm.cli nanollm.config nanollm.training",
}
LIBRARIES = {  # of a package, beside torch, numpy and the standard library
    "nanollm": set(), "checkpoints": {"safetensors", "huggingface_hub", "tqdm", "gguf"}, "kernels": {"triton"},
}
ITS_OWN = {  # of a file
    "checkpoints/layouts/gguf_tokens_export.py": {"tokenizers"}, "nanollm/text/tokenizer.py": {"tokenizers"}, "nanollm/text/tokenizer_files.py": {"tokenizers", "sentencepiece"},
    "nanollm/text/tokenizer_declared.py": {"tokenizers"}, "nanollm/text/render.py": {"jinja2"},
    "nanollm/data/bpe.py": {"tokenizers"}, "nanollm/data/encode.py": {"tqdm"}, "nanollm/data/split.py": {"tqdm"}, "nanollm/data/files.py": {"zstandard"},
    "nanollm/data/records.py": {"pyarrow", "datasets"}, "nanollm/data/chat_store.py": {"tqdm"}, "nanollm/inference/batches.py": {"tqdm"},
    "nanollm/inference/constrained.py": {"llguidance"}, "nanollm/inference/server.py": {"starlette"}, "nanollm/inference/listening.py": {"uvicorn"},
    "nanollm/training/plot.py": {"matplotlib"}, "nanollm/training/adamw8bit.py": {"bitsandbytes"},
    "nanollm/training/state.py": {"safetensors"}, "nanollm/training/reward.py": {"safetensors"}, "nanollm/training/options.py": {"tomli"},
    "nanollm/training/log.py": {"tqdm"}, "nanollm/training/monitors.py": {"wandb", "mlflow"},
    "checkpoints/compare.py": {"transformers"},  # it compares with them, and imports them inside
}
# what a Llama's forward pass reads, from the config to the logits
LLAMA_PATH = "config/__init__ config/parts layers/norm layers/rope layers/mask layers/linear layers/attention layers/mlp block model".split()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The wing of a module, or the file itself where it stands in none: nanollm.layers.norm → nanollm.layers."""
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


FILES = [path for files in PACKAGES.values() for path in files]
AS_PATHS = {"ids": lambda path: str(path.relative_to(ROOT))}


@pytest.mark.parametrize("path", FILES, **AS_PATHS)
def test_imports_follow_the_arrows(path):
    package, own = path.relative_to(ROOT).parts[0], room(name_of(path))
    allowed = (
        LIBRARIES[package]
        | {"torch", "numpy"}
        | ITS_OWN.get(str(path.relative_to(ROOT)), set())
        | sys.stdlib_module_names
    )
    if package == "kernels":
        rooms = {room(name_of(each)) for each in PACKAGES["kernels"]}
    elif own == package:  # the face of the package: it may import all of it
        rooms = {package, "nanollm.errors"} | {name for name in ARROWS if name.startswith((f"{package}.", "nanollm."))}
    else:
        words = ARROWS[own].split()
        rooms = {own, package, "nanollm.errors"} | {word if "." in word else f"{package}.{word}" for word in words}
    found = {name for name in imports(path) if name.partition(".")[0] not in allowed}
    assert not {name for name in found if room(name) not in rooms and name != "nanollm"}


def test_no_circle_and_at_most_seven_floors():
    """A room stands one floor above the highest room that it imports."""
    below: dict[str, set[str]] = {}
    for path in FILES:
        module = name_of(path)
        if module.startswith(("nanollm.", "checkpoints.")):
            found = {room(name) for name in imports(path)} & ARROWS.keys()
            below.setdefault(room(module), set()).update(found - {room(module)})

    def floor(name: str, seen: tuple[str, ...] = ()) -> int:
        assert name not in seen, f"a circle: {' → '.join([*seen, name])}"
        return 1 + max((floor(other, (*seen, name)) for other in below[name]), default=0)

    floors = {name: floor(name) for name in below}
    assert max(floors[name] for name in floors if name.startswith("nanollm.")) <= 7
    assert below.keys() == ARROWS.keys(), "a room without its line in ARROWS, or a line without its room"


def test_every_own_library_is_still_used():
    for name, libraries in ITS_OWN.items():
        assert libraries <= {found.partition(".")[0] for found in imports(ROOT / name)}, name


def test_config_knows_no_torch():
    found = set().union(*(imports(path) for path in (ROOT / "nanollm/config").glob("*.py")))
    assert not {name for name in found if name.startswith("torch")}


def test_importing_loads_neither_torch_nor_transformers():
    quick = "import sys, nanollm; assert not {'torch', 'transformers', 'triton', 'tokenizers'} & set(sys.modules)"
    whole = "import sys, nanollm.inference.generation, nanollm.text.chat, nanollm.training.flops; assert 'checkpoints' not in sys.modules; import checkpoints; assert not {'transformers', 'matplotlib', 'huggingface_hub', 'kernels'} & set(sys.modules)"
    for code in (quick, whole):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", [*SCRIPTS, *FILES], **AS_PATHS)
def test_no_file_over_400_lines(path):
    assert path.read_text().count("\n") <= 400


def test_a_llama_is_read_in_one_sitting():
    assert sum((ROOT / "nanollm" / f"{name}.py").read_text().count("\n") for name in LLAMA_PATH) < 1000


FAMILIES = re.compile(
    r"llama|mistral|mixtral|qwen|gemma|falcon|\bphi|bloom|olmo|gpt|aquila|xverse|\byi\b|model_type", re.IGNORECASE
)


def code_words(path: Path) -> list[str]:
    """Names and strings of a file's code, docstrings and comments left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    words = []
    for node in ast.walk(tree):
        words += [
            getattr(node, field)
            for field in ("id", "attr", "name", "arg")
            if isinstance(getattr(node, field, None), str)
        ]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.append(node.value)
    return words


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in PACKAGES["nanollm"]
        if p.parent.name not in ("text", "data") and p.name not in ("presets.py", "arguments.py")
    ],
    **AS_PATHS,
)
def test_the_decoder_knows_no_family(path):
    """presets.py and arguments.py have shapes by name, text/ and data/ have formats by name; Llama3 is the name of
    a RoPE formula."""
    assert not [word for word in code_words(path) if FAMILIES.search(word) and word.lower() != "llama3"]


PUBLIC = {
    "nanollm": ["Decoder", "ModelConfig", "generate", "tokenizer"],
    "checkpoints.load": "(source: str | pathlib.Path, *, dtype: torch.dtype | None = None, device: str | torch.device = 'cpu', ignore: collections.abc.Collection[str] = (), quantize: str | None = None, group: int | None = None, adapter: str | pathlib.Path | None = None) -> nanollm.model.Decoder",
    "checkpoints.save": "(model: nanollm.model.Decoder, folder: str | pathlib.Path, *, shard_bytes: int = 5000000000) -> None",
    "checkpoints.save_adapter": "(model: nanollm.model.Decoder, folder: str | pathlib.Path, *, base: str | None = None) -> None",
    "nanollm.text.tokenizer.load": "(folder: str | pathlib.Path) -> 'Tokenizer'",
    "nanollm.model.Decoder": "(config: nanollm.config.ModelConfig, seed: int = 0) -> None",
    "nanollm.model.Decoder.forward": "(self, tokens: torch.Tensor, positions: torch.Tensor | None = None, cache: nanollm.cache.Cache | None = None) -> torch.Tensor",
    "nanollm.inference.generation.generate": "(model: nanollm.model.Decoder, prompt: collections.abc.Sequence[int], max_new_tokens: int, sampling: nanollm.inference.sample.Sampling | None = None, *, stop_ids: collections.abc.Iterable[int] = (), stop: collections.abc.Callable[[], collections.abc.Callable[[int], bool]] | None = None, constrain: collections.abc.Callable[[], nanollm.inference.sample.Constraint] | None = None, logprobs: int | None = None, **options: Any) -> nanollm.inference.answer.Stream",
}


def test_the_public_face_is_frozen():
    """A change here breaks somebody: make it on purpose, and say so in the commit."""
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
        assert (
            re.sub(r"torch\._\w+\.\w+\.Tensor|torch\.Tensor", "torch.Tensor", str(inspect.signature(found)))
            == signature
        ), path


OPTIONS = {
    "generate.py": "--chat --context --device --dtype --help --ignore --max-new-tokens --min-p --model --prompt --quantize --seed --stop --suffix --system --temperature --template --top-k --top-p",
    "train.py": "--balance --batch-size --chat --clip --compile --config --context --data --decay --device --dtype --eval-every --force --help --init --keep --lr --mfu --micro-batch --mix --offload --optimizer --out --plan --preset --prompt --recompute --replicas --resume --sample-every --save-every --schedule --seed --skip-sigma --skip-steps --steps --template --tensorboard --tokenizer --vocab --wandb --warmup --weight-decay --world-size --z-loss",
}


@pytest.mark.parametrize("script", OPTIONS)
def test_no_option_disappears(script, monkeypatch, capsys):
    """The options of a script are a promise; a new one needs no line here."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script.removesuffix(".py")).run()
    text = capsys.readouterr().out
    assert not end.value.code
    assert set(OPTIONS[script].split()) <= set(re.findall(r"^ +(?:-h, )?(--[a-z][\w-]*)", text, re.MULTILINE))


@pytest.mark.parametrize("path", FILES, **AS_PATHS)
def test_every_public_function_says_what_it_does(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a file begins with what it is about"
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
        and node.end_lineno - node.lineno > 6
    ]
    assert not silent


@pytest.mark.parametrize("path", PACKAGES["nanollm"], **AS_PATHS)
def test_public_functions_are_typed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.col_offset in (0, 4):
            untyped = [
                a.arg
                for a in node.args.args + node.args.kwonlyargs
                if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert not untyped and node.returns is not None, (node.name, untyped)
