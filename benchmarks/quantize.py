"""What fewer bits cost: perplexity of two texts, with the weights of a model in 16, 8 and 4 bits.

    python -m benchmarks.quantize MODEL              a table of it: a model folder, or FILE.gguf
    python -m benchmarks.quantize MODEL --write      … and keep the table as benchmarks/quantize.md

The texts are the page of prose in tests/test_published.py, and the first tokens of LICENSE. Weights are rounded to the
nearest (nanollm/inference/quantize.py); the head stays in 16 bits.
"""

import argparse
from pathlib import Path

import torch

import checkpoints
from benchmarks.generate import machine
from nanollm.inference.quantize import GROUPS, QuantizedLinear
from nanollm.model import Decoder
from tests.test_published import PROSE, perplexity

ROOT = Path(__file__).parent.parent


def bytes_a_weight(model: Decoder) -> float:
    """Of those that are quantised."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    parts = [part for module in modules for part in (module.packed, module.scale, module.zero) if part is not None]
    return sum(part.nbytes for part in parts) / sum(module.inputs * module.outputs for module in modules)


def table(path: Path, tokens: int) -> str:
    """A row for each kind of weights that the model's widths allow."""
    tokenizer = checkpoints.tokenizer(path)
    texts = [tokenizer.encode(PROSE), tokenizer.encode((ROOT / "LICENSE").read_text())[:tokens]]
    rows = ["| weights | bytes a weight | perplexity of prose | of LICENSE |", "|---|--:|--:|--:|"]
    widths = [one.shape[-1] for one in checkpoints.load(path, quantize="int8").state_dict().values() if one.ndim == 2
              and one.dtype == torch.int8]
    kinds = [("bfloat16", {}), ("int8, a scale a row", {"quantize": "int8"})]
    kinds += [(f"int4, groups of {group}", {"quantize": "int4", "group": group}) for group in GROUPS
              if all(width % group == 0 for width in widths)]
    for name, options in kinds:
        model = checkpoints.load(path, dtype=torch.bfloat16, **options)
        size = bytes_a_weight(model) if options else 2
        with torch.inference_mode():
            found = " | ".join(f"{perplexity(model(torch.tensor([ids])), ids):.2f}" for ids in texts)
        rows.append(f"| {name} | {size:.2f} | {found} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of LICENSE")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text = f"{args.model.name}, {args.tokens} tokens of LICENSE. {machine()}.\n\n{table(args.model, args.tokens)}\n"
    print(text)
    if args.write:
        head = "# What fewer bits cost\n\nWritten by `python -m benchmarks.quantize MODEL --write`.\n\n"
        Path(__file__).with_name("quantize.md").write_text(head + text)


if __name__ == "__main__":
    main()
