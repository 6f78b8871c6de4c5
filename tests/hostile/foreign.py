"""Folders and files of other programs, sound as they are: each must be named as what it is, with what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import checkpoints
from tests.hostile import good
from tests.hostile.good import Case, Group, Harm, keys, write_json

CONFIG, SAFE = "config.json", "model.safetensors"


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def holding(*names: str, config: bool = False) -> Harm:
    """Files of a few bytes under these names, in place of the model; `config`: beside its config.json."""
    def harm(folder: Path) -> None:
        (folder / SAFE).unlink()
        if not config:
            (folder / CONFIG).unlink()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
    return harm


def saved(name: str, what: Callable[[], Any]) -> Harm:
    """One file that torch.save wrote, in place of the model."""
    def harm(folder: Path) -> None:
        emptied(folder)
        torch.save(what(), folder / name)
    return harm


def adapter(said: dict[str, Any]) -> Harm:
    def harm(folder: Path) -> None:
        emptied(folder)
        write_json(folder / "adapter_config.json", said)
        save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2, 8)}, folder / "adapter_model.safetensors")
    return harm


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    return model, optimizer


def nanogpt() -> dict[str, Any]:
    """As nanoGPT's train.py writes ckpt.pt."""
    model, optimizer = trained()
    return {
        "model": {"transformer.wte.weight": torch.ones(16, 8), "lm_head.weight": torch.ones(16, 8)},
        "optimizer": optimizer.state_dict(), "model_args": {"n_layer": 2, "bias": False}, "iter_num": 7,
        "best_val_loss": torch.tensor(1.0), "config": {"out_dir": "out"},
    }


def training() -> dict[str, Any]:
    model, optimizer = trained()
    return {"net": {"layers.0.weight": torch.ones(2)}, "optim": optimizer.state_dict(), "step": 3}


def quantised(suffix: str) -> Harm:
    return good.weights(lambda found: found.update({f"model.layers.0.self_attn.q_proj{suffix}": torch.ones(2)}))


def accelerated(folder: Path) -> None:
    holding("random_states_0.pkl", "optimizer.bin")(folder)
    save_file(good.tensors(), folder / SAFE, {"format": "pt"})


LITGPT = {"lm_head.weight": torch.ones(16, 8), "transformer.h.0.attn.qkv.weight": torch.ones(8, 8)}
FOREIGN: dict[str, Case] = {
    "an adapter": (
        adapter({"base_model_name_or_path": "owner/name"}),
        "an adapter .LoRA., which is a change to 'owner/name' and no model.*--adapter .*--merge",
    ),
    "an adapter that does not say of what": (adapter({}), "a change to another model"),
    "an adapter of a megabyte's name": (adapter({"base_model_name_or_path": "x" * 900_000}), "a change to 'xxx"),
    "an adapter's file alone": (holding("adapter_model.bin"), "an adapter"),
    "checkpoints of a Trainer": (
        holding("checkpoint-500/x", "checkpoint-1000/x"), "a Trainer's checkpoints; .*/checkpoint-1000$",
    ),
    "what a Trainer keeps beside": (holding("optimizer.pt", "rng_state.pth", config=True), "what a trainer keeps"),
    "training_args.bin": (holding("training_args.bin"), "what a trainer keeps"),
    "rng_state_0.pth": (holding("rng_state_0.pth"), "what a trainer keeps"),
    "DeepSpeed": (
        holding("global_step100/mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest", config=True),
        "DeepSpeed, .*zero_to_fp32.py .* OUT --safe_serialization",
    ),
    "DeepSpeed, one step": (
        holding("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed",
    ),
    "FSDP": (holding(".metadata", "__0_0.distcp"), "format_utils dcp_to_torch .*/model OUT"),
    "FSDP of accelerate": (
        holding("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", config=True),
        "accelerate merge-weights .*/pytorch_model_fsdp_0 OUT",
    ),
    "accelerate's save_state": (accelerated, "config.json: no such file; a folder of accelerate's save_state"),
    "weights alone": (good.gone(CONFIG), "config.json: no such file; the weights alone do not say"),
    "an empty folder": (emptied, "config.json: no such file; a model folder expected"),
    "litgpt": (
        holding("lit_model.pth", "model_config.yaml", config=True), "litgpt convert_from_litgpt .*/model OUT",
    ),
    "litgpt's file": (saved("lit_model.pth", lambda: LITGPT), "litgpt's weights"),
    "litgpt's file under another name": (saved("final.pth", lambda: LITGPT), "litgpt's weights"),
    "nanoGPT": (
        lambda folder: [holding("loss.csv")(folder), torch.save(nanogpt(), folder / "ckpt.pt")],
        "a run of nanoGPT's; give its file: .*/ckpt.pt$",
    ),
    "nanoGPT's file": (saved("ckpt.pt", nanogpt), "nanoGPT's checkpoint.*examples/from_nanogpt.py .*/ckpt.pt OUT"),
    "PyTorch Lightning": (
        saved("last.pt", lambda: {"state_dict": {"w.weight": torch.ones(2)}, "pytorch-lightning_version": "2.4"}),
        "PyTorch Lightning",
    ),
    "weights and optimizer": (saved("step.pt", training), "a training program's checkpoint, .*KEY"),
    "an optimizer": (saved("opt.pt", lambda: trained()[1].state_dict()), "an optimizer's state and no weights"),
    "a whole module": (saved("model.pt", lambda: trained()[0]), r"a whole module .*state_dict"),
    "ONNX": (holding("model.onnx", "model.onnx_data", config=True), "exported to ONNX"),
    "ONNX in a folder below": (holding("onnx/model.onnx", config=True), "exported to ONNX"),
    "TensorFlow": (holding("tf_model.h5", config=True), "TensorFlow's weights, .*up to version 4: .*from_tf=True"),
    "Flax": (holding("flax_model.msgpack", config=True), "Flax's weights, .*from_flax=True"),
    "MLX": (holding("weights.npz", config=True), "arrays of NumPy, as MLX"),
    "diffusers": (holding("model_index.json", "unet/config.json", "vae/config.json"), "a pipeline of diffusers"),
    "an encoder": (keys(model_type="bert"), "model_type is 'bert': an encoder, .*sentence-transformers"),
    "an encoder with a decoder": (keys(model_type="t5"), "model_type is 't5': an encoder with a decoder"),
    "GPTQ without a word of it": (quantised(".qweight"), "q_proj.qweight: weights quantised by GPTQ or AWQ"),
    "bitsandbytes without a word of it": (quantised(".weight.absmax"), "weights quantised by bitsandbytes"),
}


def given(folder: Path) -> Any:
    """The folder as --model; where it holds one file alone, that file."""
    inside = list(folder.iterdir())
    return checkpoints.load(inside[0] if len(inside) == 1 and inside[0].is_file() else folder)


GROUPS = {"foreign": Group("folders and files of other programs", good.hugging_face, given, FOREIGN)}
