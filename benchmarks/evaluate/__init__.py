"""Evaluation that can be compared: the harness's tasks, perplexity, needles and speed, by our own forward pass."""
