"""A transformer block whose weights several layers share, and the layers that use it, as data."""

from dataclasses import dataclass

from nanollm.config.checks import Mixer, Part, need, need_sizes, present
from nanollm.config.parallel import ParallelMixer
from nanollm.config.parts import MLP, Attention, Norm, Rope
from nanollm.config.scans import Mamba2, MultiHeadMamba


@dataclass(frozen=True)
class SharedBlock(Part):
    """Attention over the stream and the embedding side by side, then an MLP; its weights are there once a model."""
    number: int                             # which of the model's: layers that name the same one share its weights; 0
    attention: Attention                    # reads 2 D numbers a token, gives D
    mlp: MLP                                # reads what attention gives
    norm: Norm                              # before either

    def __post_init__(self) -> None:
        need(type(self.number) is int and self.number >= 0, self, "number", "0 or a whole number above it")
        inner = self.attention
        need(type(inner) is Attention and inner.qk_norm is None and inner.clip is None and inner.window is None, self,
             "attention", "plain attention: no qk_norm, clip or window")
        need(self.mlp.gated, self, "mlp", "an MLP with a gate")
        need(self.norm.scope == "head", self, "norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class SharedBlockScan(Mixer):
    """A scan that reads the stream and what a shared transformer block says of it, shared_block.py."""
    block: SharedBlock                      # the same in each layer that uses it
    scan: Mamba2 | MultiHeadMamba           # this layer's own
    pre_scan: Norm                          # before the scan
    mlp_rank: int | None = None             # of what this layer adds to the block's gate and up; None: nothing;
                                            # Zamba2 128
    qkv_rank: int | None = None             # the same of its q, k and v; Zamba2-1.2B 128, 2.7B None

    def __post_init__(self) -> None:
        need_sizes(self, *present(self, "mlp_rank", "qkv_rank"))
        need(self.pre_scan.scope == "head", self, "pre_scan", "a norm whose scope is 'head'")

    @property
    def attention(self) -> Attention:
        """As FilteredAttention.attention."""
        return self.block.attention

    @property
    def rope(self) -> Rope | None:
        """As FilteredAttention.rope."""
        return self.block.attention.rope


WITH_SCAN = (ParallelMixer, SharedBlockScan)  # mixers that have a scan beside attention


def shared_blocks(mixers: list[Mixer | None]) -> dict[int, SharedBlock]:
    """The blocks that these mixers use, by number. One number is one block."""
    found: dict[int, SharedBlock] = {}
    for mixer in mixers:
        if isinstance(mixer, SharedBlockScan):
            block = found.setdefault(mixer.block.number, mixer.block)
            need(block == mixer.block, mixer, "block", f"{block}, which another layer has under this number")
    return found
