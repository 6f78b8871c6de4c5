"""y = x Wᵀ + b, with W (out, in): torch's own Linear, left empty. init.py is the one place that draws numbers."""

from torch import nn

from nanollm.init import matrix, zero


class Linear(nn.Linear):
    """nn.Linear that does not initialise itself: a model is either loaded or initialised as a whole, never both."""
    INIT = {"weight": matrix, "bias": zero}

    def reset_parameters(self) -> None:
        pass
