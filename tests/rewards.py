"""Reward functions of the tests: --reward-function tests.rewards:NAME."""

import json
import math


def betas(completions, prompts, word, **columns):
    """How many words of an answer are the one that its row names, less what else it says."""
    assert len(completions) == len(prompts) == len(word) and isinstance(prompts[0], str)
    return [float(sum(1.0 if said == wanted else -0.1 for said in text.split()))
            for text, wanted in zip(completions, word, strict=True)]


def nothing(completions, **columns):
    return [math.nan] * len(completions)


def too_few(completions, **columns):
    return [0.0]


def silent(completions, **columns):
    pass


def without_columns(completions, prompts, completion_ids):
    return [0.0] * len(completions)


def alone(completions):
    return [0.0] * len(completions)


def in_a_library(completions, **columns):
    return [json.loads("{") for _ in completions]


def broken(completions, **columns):
    return completions[0].no_such_thing
