"""nanochat (karpathy's, as transformers has it): no gains and no biases, norms in many places, relu² and a soft cap.

    e = norm(E[token])                                 x̂ = x / √(mean(x²) + ε), nothing learned
    x += o(attention(x̂));  x += fc2(relu(fc1(x̂))²)     every head of q and k normalised once it is rotated
    logits = 15 tanh(W x̂ / 15)

RoPE turns the other way: (a cos + b sin, b cos − a sin) for the halves a, b of a head. With the halves of q and k in
the other order it is the usual rotation, and so they are stored here (`OtherHalf`).
"""

from collections.abc import Sequence

from torch import Tensor

from checkpoints.families.llama import EPS, HEADS_SHARE_DIM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_table import activation, flag, number, part
from checkpoints.names.ops import Pieces, Same
from checkpoints.names.table import override, under
from nanollm.config import MLP, Attention, Layer, Norm


class OtherHalf(Same):
    """q or k, with the second half of every head before the first."""

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        assert layer is not None and isinstance(layer.mixer, Attention)
        heads = ours[0].unflatten(0, (-1, 2, layer.mixer.head_dim // 2))             # (H d, …) → (H, 2, d/2, …)
        yield from ((0, half) for head in heads for half in (head[1], head[0]))


NANOCHAT_NAMES = override(
    LLAMA_NAMES,
    *under("model.layers.{i}.self_attn", "layers.{i}.mixer", {"q_proj": "q", "k_proj": "k"}, OtherHalf),
    *under("model.layers.{i}.mlp", "layers.{i}.ffn", {"fc1": "up", "fc2": "down"}),
)
PLAIN = part(Norm, gain=False)
NANOCHAT = LLAMA_SHAPE.but(
    "nanochat", "NanoChatForCausalLM", names=(NANOCHAT_NAMES,), norm=PLAIN, model={"embed_norm": PLAIN},
    layer={"mixer.qk_norm": part(Norm, gain=False, scope="rotated"), "ffn": part(MLP, gated=False)},
    keys=HEADS_SHARE_DIM | {
        "hidden_act": activation("ffn.activation", missing="relu2"),
        "rms_norm_eps": number(*EPS, "embed_norm.eps", missing=1e-6),
        "attention_bias": flag("mixer.qkv_bias", "mixer.out_bias", missing=False),
        "final_logit_softcapping": number("head_softcap", missing=15.0, null=None),
    },
)
FAMILIES = {"nanochat": NANOCHAT}
