"""nanollm: modern decoders in plain PyTorch. Start reading at config.py, then block, attention, model."""
