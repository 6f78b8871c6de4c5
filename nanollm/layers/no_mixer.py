"""What stands for the mixer of a layer that is a feed-forward alone: it remembers nothing, and costs nothing."""

import torch

from nanollm.layers.state import NoState


class NoMixer:
    """Has no forward pass and no parameters: `Block` builds no mixer where there is none."""

    @staticmethod
    def new_state(config: None, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> NoState:
        return NoState()

    @staticmethod
    def multiply_adds(config: None, dim: int, context: int) -> int:
        return 0
