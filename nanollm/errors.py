"""The project's own errors. Each message names the file, key or tensor, what was found and what was expected."""


class NanollmError(Exception):
    """Base of every error that nanollm raises on purpose: bad input, never a bug of ours."""
    alone = False               # of the ranks of a run only this one met it


class ConfigError(NanollmError):
    """A model configuration that is impossible, or that asks for something not implemented."""


class CheckpointError(NanollmError):
    """A folder of weights that is damaged, incomplete, or not what its config says."""


class TokenizerError(NanollmError):
    """A tokenizer file or a chat template that cannot be used."""


class InputError(NanollmError):
    """An argument that the model or the sampler cannot honour: a token out of range, a cache that is full."""


class RunError(NanollmError):
    """A training run that cannot begin or cannot go on: its folder, its checkpoints, its numbers."""


class DataError(NanollmError):
    """Text or token shards that cannot be read or trained on: a damaged file, a wrong format, too little of it."""
