"""What the options change in a model between its making and its sharding: what is frozen, and what it does only while
it learns. Each is a file of its own."""

import argparse

from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.training import dropout, freezing, neftune, shifted_attention, tuning


def arrange(model: Decoder, options: argparse.Namespace) -> bool:
    """Change the model in place. Whether its layers now draw random numbers, which recomputation has to draw again."""
    freezing.freeze(model, options)
    if options.neftune:
        neftune.add_noise(model, options.neftune)
    if options.shift_attention:
        shifted_attention.shift_attention(model, options.shift_attention, options.context)
    if options.dropout:
        dropout.add_dropout(model, options.dropout)
    if options.attention_dropout and options.shift_attention:
        raise InputError("--attention-dropout with --shift-attention: each takes the place of attention; leave one out")
    if options.attention_dropout:
        dropout.add_attention_dropout(model, options.attention_dropout)
    return options.dropout > 0 or options.attention_dropout > 0 or tuning.draws(model)
