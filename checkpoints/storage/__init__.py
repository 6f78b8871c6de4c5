"""Bytes: safetensors, pickles, GGUF and quantised tensors, read and written a few megabytes at a time."""
