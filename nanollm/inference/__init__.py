"""Tokens out of a model: sampling, generation, weights in 8 and 4 bits; and what generate.py makes of them: answers,
chats, files of prompts."""
