"""Yuan 2.0: Llama whose queries and keys are made from a filtered input (nanollm/layers/filtered_attention.py). 2B, 51B, 102B.

Three things about its weights are not as their names say:

- The activation is on `up_proj`: down(gate(x) · silu(up(x))). So `up_proj` is our gate, and `gate_proj` our up.
- q_proj and k_proj are two halves of one matrix whose rows lie head by head, q and k in turn. With H = 4 heads:

      q_proj   q0 k0 q1 k1          the first half of the heads has both its q and its k there
      k_proj   q2 k2 q3 k3          the second half here

- ε of the norm after the filters is 1e-6, whatever rms_norm_eps says.

Head and embedding are tied where config.json does not say otherwise. RoPE has theta 10000 and no key.

Documents. With reset_attention_mask the published code looks for the token <eod> in what it reads: attention begins anew behind
it, and the filters run on, across it. Here documents are not found but told, by the positions that a caller gives, and nothing looks
across their border, the filters neither. So for a prompt without <eod> inside it both flags mean nothing, and for one with <eod> inside
and no positions the published logits behind it are others. In that case give positions that begin at 0 again behind <eod>: what differs
then is that the first two tokens of a document do not see the end of the one before through the filters.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from checkpoints.families.legacy import functions, read_mlp, write_decoder
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Pieces, Shape
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, FilteredAttention, Layer, ModelConfig, Norm, Rope


class Pairs:
    """Two stored tensors, one under another, have the rows of q and of k by turns, a head at a time: the drawing at the head of the file."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [tuple(tensor.shape) for tensor in ours]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        heads = layer.mixer.attention.heads
        in_turn = [rows for pair in zip(*(tensor.unflatten(0, (heads, -1)) for tensor in ours)) for rows in pair]     # q0 k0 q1 k1 …
        yield from ((0, rows) for rows in in_turn[:heads])
        yield from ((1, rows) for rows in in_turn[heads:])


YUAN_NAMES = override(
    LLAMA_NAMES,
    rule(["model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.k_proj"], ["layers.{i}.mixer.q", "layers.{i}.mixer.k"], Pairs),
    rule("model.layers.{i}.self_attn.lf_gate.conv1", "layers.{i}.mixer.first"),
    rule("model.layers.{i}.self_attn.lf_gate.conv2", "layers.{i}.mixer.second"),
    rule("model.layers.{i}.self_attn.lf_gate.output_layernorm", "layers.{i}.mixer.norm"),
    rule("model.layers.{i}.mlp.up_proj", "layers.{i}.ffn.gate"),
    rule("model.layers.{i}.mlp.gate_proj", "layers.{i}.ffn.up"),
)


def read(r: Reader) -> ModelConfig:
    """Yuan 2.0; the M32, with experts and another projection, is refused by its keys."""
    dim, heads = r.size("hidden_size"), r.size("num_attention_heads")
    if dim % (2 * heads):
        raise r.error("num_attention_heads", f"an even number of times in hidden_size ({dim})")
    r.must("use_shareqk", False)                         # one matrix for q and k
    r.must("causal_mask", True)
    for key in ("reset_attention_mask", "reset_position_ids"):
        r.flag(key, False)                               # about <eod> inside a prompt: see above
    mixer = FilteredAttention(Attention(heads, heads, dim // heads, Rope()), dim // 2, Norm(eps=1e-6))
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=dim,
        layers=(Layer(mixer, read_mlp(r), pre_mixer=norm, pre_ffn=norm),) * r.count("num_hidden_layers"),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", True),
        context=r.size("max_position_embeddings", r.size("model_max_length", 8192)),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Filters half as wide as the model, and the ε behind them, are not said: others do not read back."""
    base = write_decoder(config, "yuan", "YuanForCausalLM", FilteredAttention, MLP)
    layer = config.layers[0]
    return base | {
        "num_attention_heads": layer.mixer.attention.heads,
        "intermediate_size": layer.ffn.hidden,
        "hidden_act": "gelu_pytorch_tanh" if layer.ffn.activation == "gelu_tanh" else layer.ffn.activation,
        "rms_norm_eps": config.final_norm.eps,
        "max_position_embeddings": config.context,
        "model_max_length": config.context,
        "causal_mask": True,
        "use_flash_attention": False,
        "reset_attention_mask": False,
        "reset_position_ids": False,
        "eod_token": None,                               # the published code asks for all five
    }


YUAN = functions(
    "yuan", read, write, (YUAN_NAMES,), INV_FREQ,
    irrelevant=frozenset("_from_model_config attn_dropout dropout eod_token eod_token_id mask_token_id sep_token use_flash_attention use_loss_mask".split()),
)
FAMILIES = {"yuan": YUAN}
