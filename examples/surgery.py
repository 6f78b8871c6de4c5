"""Surgery on a model: load it, change its config and its weights, save it, load it again.

    python examples/surgery.py FOLDER OUT --window 1024     every other layer gets a sliding window of 1024 tokens
    python examples/surgery.py FOLDER OUT --vocab 33000     more tokens; their rows are the mean of the old ones

Qwen2, Qwen3 and Gemma 2 have a key in config.json for a window on some of the layers. Llama has none.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
from nanollm import Decoder, ModelConfig


def rebuilt(model: Decoder, config: ModelConfig, weights: dict[str, Tensor]) -> Decoder:
    """A decoder with this config and these weights, to be saved with the config.json and the tokenizer of `model`."""
    with torch.device("meta"):                                                  # no memory yet, and nothing is drawn
        new = Decoder(config)
    new.load_state_dict(weights, assign=True)
    new.tie()
    new.origin = model.origin
    return new.eval()


def slide(model: Decoder, window: int) -> Decoder:
    """In layers 0, 2, 4, … a token sees the last `window` tokens, itself included; the other layers stay."""
    layers = list(model.config.layers)
    layers[::2] = [replace(layer, mixer=replace(layer.mixer, window=window)) for layer in layers[::2]]
    return rebuilt(model, replace(model.config, layers=tuple(layers)), model.state_dict())


def grow(model: Decoder, vocab: int) -> Decoder:
    """Embedding and head (V, D) get a row for each new token: the mean of the old rows."""
    weights = model.state_dict()
    for name in {"embed.weight", "head.weight", "head.bias"} & weights.keys():
        old = weights[name]
        weights[name] = torch.cat([old, old.mean(0, keepdim=True).expand(vocab - len(old), *old.shape[1:])])
    return rebuilt(model, replace(model.config, vocab=vocab), weights)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("out", type=Path)
parser.add_argument("--window", type=int)
parser.add_argument("--vocab", type=int)
args = parser.parse_args()
before = checkpoints.load(args.folder)
changed = grow(before, args.vocab) if args.vocab else before
changed = slide(changed, args.window) if args.window else changed
checkpoints.save(changed, args.out)
x = torch.randint(before.config.vocab, (1, min(args.window or 32, 32)))         # a text that fits the window
with torch.no_grad():
    difference = (checkpoints.load(args.out)(x)[..., : before.config.vocab] - before(x)).abs().max()
print(f"{args.out}: the logits of {x.numel()} old tokens differ by at most {difference:.1e}")
