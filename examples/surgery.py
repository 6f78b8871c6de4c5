"""Surgery on a model: load it, change its config and its weights, save it, load it again.

    python examples/surgery.py FOLDER OUT --window 1024     every other layer gets a sliding window of 1024 tokens
    python examples/surgery.py FOLDER OUT --vocab 33000     more tokens; their rows are the mean of the old ones
"""

import argparse
from dataclasses import replace

import torch

import checkpoints
from nanollm import Decoder, ModelConfig, cli


def rebuilt(model: Decoder, config: ModelConfig, weights: dict[str, torch.Tensor]) -> Decoder:
    """A decoder with this config and these weights, to be saved with the config.json and the tokenizer of `model`."""
    with torch.device("meta"):                                                  # no memory yet, and nothing is drawn
        new = Decoder(config)
    new.load_state_dict(weights, assign=True)
    new.tie()
    new.origin = model.origin
    return new.eval()


def slide(model: Decoder, window: int) -> Decoder:
    """In layers 0, 2, … a token sees the last `window` tokens. Qwen2, Qwen3 and Gemma 2 have a key for it."""
    layers = [layer if index % 2 else replace(layer, mixer=replace(layer.mixer, window=window))
              for index, layer in enumerate(model.config.layers)]
    return rebuilt(model, replace(model.config, layers=tuple(layers)), model.state_dict())


def grow(model: Decoder, vocab: int) -> Decoder:
    """Embedding and head (V, D) get a row for each new token: the mean of the old rows."""
    weights = model.state_dict()
    for name in {"embed.weight", "head.weight", "head.bias"} & weights.keys():
        old = weights[name]
        weights[name] = torch.cat([old, old.mean(0, keepdim=True).expand(vocab - len(old), *old.shape[1:])])
    return rebuilt(model, replace(model.config, vocab=vocab), weights)


def run() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--window", type=cli.whole())
    parser.add_argument("--vocab", type=cli.whole())
    args = parser.parse_args()
    before = checkpoints.load(args.folder)
    if args.vocab and args.vocab < before.config.vocab:
        parser.error(f"--vocab {args.vocab}: expected at least {before.config.vocab}, the tokens that the model has")
    changed = grow(before, args.vocab) if args.vocab else before
    checkpoints.save(slide(changed, args.window) if args.window else changed, args.out)
    x = torch.randint(before.config.vocab, (1, min(args.window or 32, 32)))         # a text that fits the window
    difference = (checkpoints.load(args.out)(x)[..., : before.config.vocab] - before(x)).abs().max()
    print(f"{args.out}: the logits of {x.numel()} old tokens differ by at most {difference:.1e}")


cli.main(run)
