"""Rewards of answers, as functions that train.py --reward-function is given: docs.rewards:three_words."""


def three_words(completions, **columns):
    """1 for an answer of three words, 1/2 for one word more or less, 1/3 for two …"""
    return [1 / (1 + abs(len(text.split()) - 3)) for text in completions]
