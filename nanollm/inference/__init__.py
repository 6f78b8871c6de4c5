"""Tokens out of a model: sampling, generation, weights in 8 and 4 bits."""
