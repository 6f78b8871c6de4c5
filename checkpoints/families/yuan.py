"""Yuan 2.0: Llama whose queries and keys are made from a filtered input. 2B, 51B, 102B.

The filters are in nanollm/layers/filtered_attention.py. Three things about its weights are not as their names say:

- The activation is on `up_proj`: down(gate(x) · silu(up(x))). So `up_proj` is our gate, and `gate_proj` our up.
- q_proj and k_proj are two halves of one matrix whose rows lie head by head, q and k in turn. With H = 4 heads:

      q_proj   q0 k0 q1 k1          the first half of the heads has both its q and its k there
      k_proj   q2 k2 q3 k3          the second half here

- ε of the norm after the filters is 1e-6, whatever rms_norm_eps says.

Head and embedding are tied where config.json does not say otherwise. RoPE has theta 10000 and no key.

Documents. With reset_attention_mask the published code looks for the token <eod> in its input: attention begins anew
behind it, and the filters run on across it. Here the caller's positions say where documents begin, and nothing looks
across their border, the filters neither. So for a prompt without <eod> inside it both flags mean nothing; for one with
<eod> inside, give positions that begin at 0 again behind it. Then the one difference from the published logits is that
the first two tokens of a document do not see the end of the one before through the filters.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_table import Draft, Row, field, only, part, size, unread
from checkpoints.names.ops import Pieces, Shape
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import Attention, FilteredAttention, Layer, Norm, Rope


class Pairs:
    """Two stored tensors, one under another, have the rows of q and of k by turns, a head at a time, as drawn above."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [tuple(tensor.shape) for tensor in ours]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        assert layer is not None and isinstance(layer.mixer, FilteredAttention)
        heads = layer.mixer.attention.heads
        q, k = (tensor.unflatten(0, (heads, -1)) for tensor in ours)
        in_turn = [rows for pair in zip(q, k, strict=True) for rows in pair]  # q0 k0 q1 k1 …
        yield from ((0, rows) for rows in in_turn[:heads])
        yield from ((1, rows) for rows in in_turn[heads:])


YUAN_NAMES = override(
    LLAMA_NAMES,
    rule(["model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.k_proj"], QKV[:2], Pairs),
    *under("model.layers.{i}.self_attn.lf_gate", "layers.{i}.mixer", {
        "conv1": "first", "conv2": "second", "output_layernorm": "norm",
    }),
    *under("model.layers.{i}.mlp", "layers.{i}.ffn", {"up_proj": "gate", "gate_proj": "up"}),
)


class FilteredHeads(Row):
    """The number of heads, each dim / heads wide, and an even number. Between the filters there is half of dim."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        dim, heads = draft["dim"], r.size(key)
        if dim % (2 * heads):
            raise r.error(key, f"an even number of times in hidden_size ({dim})")
        draft["mixer.attention.heads"] = draft["mixer.attention.kv_heads"] = heads
        draft["mixer.attention.head_dim"], draft["mixer.hidden"] = dim // heads, dim // 2

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.attention.heads"]}


YUAN = LLAMA_SHAPE.but(
    "yuan", "YuanForCausalLM", names=(YUAN_NAMES,),
    layer={"mixer": part(FilteredAttention, attention=part(Attention, rope=part(Rope)), norm=part(Norm, eps=1e-6))},
    missing={"tie_word_embeddings": True},
    keys={
        "num_attention_heads": FilteredHeads(),
        "model_max_length": size("context", missing=8192),
        "max_position_embeddings": size("context", missing=field("context")),
        "use_shareqk": only(False),  # one matrix for q and k
        "causal_mask": only(True, written=True),
        **dict.fromkeys(("reset_attention_mask", "reset_position_ids"), only(False, True, written=True)),  # see above
        "eod_token": unread(None), "use_flash_attention": unread(False),
    },
    without=("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters"),
    irrelevant=frozenset({"attn_dropout", "dropout", "eod_token_id", "mask_token_id", "sep_token", "use_loss_mask"}),
)
FAMILIES = {"yuan": YUAN}
