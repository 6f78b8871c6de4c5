"""A checkpoint of nanoGPT's as a GPT-2 folder, which nanollm and transformers load.

    python examples/from_nanogpt.py out/ckpt.pt mine
    python generate.py --model mine --prompt "Once"         with the tokenizer's files of openai-community/gpt2 in mine

nanoGPT's names are GPT-2's, but its matrices are (out, in) and GPT-2's (in, out). A model trained with bias=False has
none to store; GPT-2 has them always, so they are zeros. Its GELU is the exact one since 2023.
"""

import argparse
import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import save_file

MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BIASED = (*MATRICES, "ln_1.weight", "ln_2.weight", "ln_f.weight")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", type=Path)
parser.add_argument("folder", type=Path)
args = parser.parse_args()

if args.folder.exists():
    parser.error(f"{args.folder}: exists; nothing is overwritten")
try:
    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=True)  # tensors and numbers: no code is run
except (OSError, RuntimeError, pickle.UnpicklingError) as error:
    parser.error(f"{args.checkpoint}: torch does not read it: {str(error).splitlines()[0]}")
if not (isinstance(saved, dict) and {"model_args", "model"} <= saved.keys()):
    parser.error(f"{args.checkpoint}: not nanoGPT's, whose checkpoints have model_args and model")
sizes = saved["model_args"]
weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}

tensors = {}
for name, tensor in weights.items():
    if name.endswith("attn.bias") and tensor.ndim == 4:                         # the causal mask, in early versions
        continue
    if name.endswith(BIASED):                                                   # (out,) of a matrix (out, in) or a gain
        tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(tensor.shape[0]))
    tensors[name] = (tensor.T if name.endswith(MATRICES) else tensor).float().contiguous()
tensors.pop("lm_head.weight")                                                   # is the embedding

args.folder.mkdir(parents=True)
save_file(tensors, args.folder / "model.safetensors", {"format": "pt"})
(args.folder / "config.json").write_text(json.dumps({
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu",
    "vocab_size": sizes["vocab_size"], "n_positions": sizes["block_size"], "n_embd": sizes["n_embd"],
    "n_layer": sizes["n_layer"], "n_head": sizes["n_head"], "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}, indent=2))
print(f"{args.folder}: a GPT-2 of {sum(tensor.numel() for tensor in tensors.values()):,} parameters")
