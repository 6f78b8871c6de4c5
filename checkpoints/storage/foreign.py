"""What other programs keep that looks like a model folder or its weights: each is named as what it is, with what to do.

    a file      by its name (FILES), or by the words that its pickle holds (PICKLES), of which nothing is run
    a folder    by the names of what is in it (FOLDERS), where none of our layouts is there

The commands in here are those of the programs themselves. docs/refusals.md lists the cases.
"""

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from checkpoints.names.reader import brief

ADAPTER = ("an adapter (LoRA), which is a change to {base} and no model. Give the model, and the adapter beside it: "
           "generate.py --model BASE --adapter {folder}; or merge them: python -m checkpoints.convert BASE OUT "
           "--adapter {folder} --merge")
ZERO = ("a checkpoint of DeepSpeed, whose weights are cut up among ranks. Where deepspeed is installed: "
        "python {folder}/zero_to_fp32.py {folder} OUT --safe_serialization; then copy config.json and the tokenizer's "
        "files of the model that was trained into OUT")
SHARDED = ("weights as FSDP or torch.distributed.checkpoint shards them among ranks: mkdir -p OUT && "
           "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT/pytorch_model.bin (or, where "
           "accelerate wrote them: accelerate merge-weights {folder} OUT); then copy config.json and the tokenizer's "
           "files of the model that was trained into OUT")
TRAINER = "what a trainer keeps beside the weights, to go on with; give the folder with config.json and the weights"
LITGPT = ("litgpt's weights, under names of its own: litgpt convert_from_litgpt {folder} OUT; then call OUT/model.pth "
          "pytorch_model.bin, and copy config.json and the tokenizer's files into OUT")
ONNX = "a model exported to ONNX, which is a graph and no weights by name; take the upload that it was made from"
OLD_TRANSFORMERS = ("which transformers reads up to version 4: AutoModelForCausalLM.from_pretrained('{folder}', "
                    "from_%s=True).save_pretrained('OUT')")
TENSORFLOW = f"TensorFlow's weights, {OLD_TRANSFORMERS % 'tf'}"
FLAX = f"Flax's weights, {OLD_TRANSFORMERS % 'flax'}"
MLX = "arrays of NumPy, as MLX and JAX keep weights; take the upload in safetensors that they were made from"
DIFFUSION = "a pipeline of diffusers, which draws pictures; nothing here runs one"
NANOGPT = ("nanoGPT's checkpoint, weights and optimizer together, with the matrices of GPT-2 turned over: "
           "python examples/from_nanogpt.py {file} OUT writes it as a GPT-2 folder")
LIGHTNING = ("a checkpoint of PyTorch Lightning, weights and optimizer together: in the program that wrote it, load it "
             "and call model.save_pretrained('OUT')")
OPTIMIZER = "an optimizer's state and no weights; give the folder with config.json and the weights"
TRAINING = ("a training program's checkpoint, weights and optimizer together. Keep the weights alone: "
            "torch.save(torch.load('{file}')[KEY], 'pytorch_model.bin'), where KEY is what it calls them")
MODULE = ("a whole module (torch.save(model)), which is code by name: in the program that wrote it, call "
          "model.save_pretrained('OUT'), or torch.save(model.state_dict(), 'pytorch_model.bin')")

# Names of files; * stands for anything. The first that matches says what the file is.
FILES = {
    "adapter_model.*": ADAPTER, "adapter_config.json": ADAPTER,
    "lit_model.pth*": LITGPT,
    "*_optim_states.pt": ZERO, "*_model_states.pt": ZERO, "zero_to_fp32.py": ZERO,
    "*.distcp": SHARDED, ".metadata": SHARDED,
    **dict.fromkeys(("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth",
                     "random_states_*.pkl", "training_args.bin", "trainer_state.json"), TRAINER),
    "*.onnx": ONNX, "*.onnx_data": ONNX,
    "*.h5": TENSORFLOW, "*.msgpack": FLAX, "*.npz": MLX, "model_index.json": DIFFUSION,
}
# Of a folder: names of what is in it, a folder itself or a file, in the order in which they are asked for.
FOLDERS = {
    "adapter_config.json": ADAPTER, "adapter_model.*": ADAPTER,
    "model_index.json": DIFFUSION,
    "lit_model.pth*": LITGPT,
    "global_step*": ZERO, "*_model_states.pt": ZERO, "zero_to_fp32.py": ZERO,
    "*.distcp": SHARDED,
    "ckpt.pt": "a run of nanoGPT's; give its file: {folder}/ckpt.pt",
    "*.onnx": ONNX, "onnx": ONNX,
    "tf_model*.h5": TENSORFLOW, "flax_model*.msgpack": FLAX, "*.npz": MLX,
    **dict.fromkeys(("optimizer.pt", "optimizer.bin", "training_args.bin", "trainer_state.json"), TRAINER),
}
# Words that a pickle of this kind holds, all of them.
PICKLES = {
    ("model_args", "iter_num"): NANOGPT,
    ("pytorch-lightning_version",): LIGHTNING,
    ("transformer.h.0.attn.qkv.weight",): LITGPT, ("transformer.h.0.attn.attn.weight",): LITGPT,
    ("ds_config",): ZERO, ("ds_version",): ZERO,
    ("_parameters", "_modules", "_buffers"): MODULE,
    ("weights and param_groups",): TRAINING, ("param_groups", "state"): OPTIMIZER,
}
NO_CONFIG = "the weights alone do not say which model they are. Copy config.json, and the tokenizer's files, of "
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def file(path: Path) -> str | None:
    """What a file is, by its name; None: no idea."""
    kind = next((text for name, text in FILES.items() if fnmatch(path.name, name)), None)
    return kind and _filled(kind, path.parent, path)


def pickle(path: Path, words: Iterable[str]) -> str | None:
    """What a pickle is, by the words in it; None: no idea."""
    known = set(words)
    if known.issuperset(("param_groups", "state")) and any(word.endswith(".weight") for word in known):
        known.add("weights and param_groups")
    kind = next((text for needed, text in PICKLES.items() if known.issuperset(needed)), None)
    return kind and _filled(kind, path.parent, path)


def folder(path: Path) -> str | None:
    """What a folder is that no layout of ours is in; None: no idea."""
    names = {one.name for one in path.iterdir()}
    if found := [name for name in names if re.fullmatch(r"checkpoint-\d+", name, re.ASCII)]:
        last = max(found, key=lambda name: int(name.partition("-")[2]))
        return f"a folder of a Trainer's checkpoints; give one of them: {path / last}"
    for name in sorted(names):
        if fnmatch(name, "pytorch_model_fsdp_*"):
            return _filled(SHARDED, path / name, path)
    for pattern, text in FOLDERS.items():
        if any(fnmatch(name, pattern) for name in names):
            return _filled(text, path, path)
    return None


def is_adapter(path: Path) -> bool:
    """Whether a folder has an adapter and no model."""
    return (path / "adapter_config.json").exists() and not (path / "config.json").exists()


def no_config(path: Path) -> str:
    """What to do where there is no config.json."""
    names = [one.name for one in path.iterdir()] if path.is_dir() else []
    if not any(name.endswith(SUFFIXES) for name in names):
        return "a model folder expected: config.json beside model.safetensors"
    if any(fnmatch(name, "random_states_*.pkl") for name in names):
        return f"a folder of accelerate's save_state; {NO_CONFIG}the model that was trained into it"
    return f"{NO_CONFIG}the model that was trained into the folder"


def _filled(text: str, folder: Path, file: Path) -> str:
    base = "another model"
    if "{base}" in text:
        try:
            said = json.loads((folder / "adapter_config.json").read_bytes()[:1_000_000])["base_model_name_or_path"]
            base = brief(said) if isinstance(said, str) and said else base
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            pass                                 # it stays "another model"
    for name, value in (("{folder}", folder), ("{file}", file), ("{base}", base)):
        text = text.replace(name, str(value))
    return text
