"""Dropout: while a model is trained, each number of the residual stream's inputs is 0 with probability p.

    drop(x) = m · x / (1 − p)        m = 0 with probability p, else 1          Srivastava et al. 2014

    x = drop(embedding)              what the first layer reads
    x + drop(mixer(…)),  x + drop(ffn(…))      what every layer adds

These are the places of embd_pdrop and resid_pdrop of GPT-2 (Vaswani et al. 2017, §5.4). Dropout of attention
probabilities, which GPT-2 has too, is not here: fused attention of every kind would need it. Wrapped around a model
from outside, so the decoder knows nothing of it; in eval mode nothing is dropped.

The masks of a micro-batch follow from its place in the run (phase.py), so a checkpoint keeps nothing of them. Another
number of ranks or another micro-batch draws other masks.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nanollm.block import Block
from nanollm.model import Decoder


def add_dropout(model: Decoder, p: float) -> None:
    """Wrap the model, in place, before anything else wraps its layers."""
    def dropped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward_and_drop(*args: Any, **named: Any) -> Tensor:
            return F.dropout(forward(*args, **named), p, model.training)
        return forward_and_drop

    model.embedded = dropped(model.embedded)                        # type: ignore[method-assign]
    for layer in model.layers:
        assert isinstance(layer, Block)
        for part in (layer.post_mixer or layer.mixer, layer.post_ffn or layer.ffn):
            if part is not None:
                part.forward = dropped(part.forward)                # type: ignore[method-assign]
