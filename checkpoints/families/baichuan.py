"""Baichuan and Baichuan 2: Llama with q, k and v in one matrix. Four models share one model_type; their code differs, and no key says how.

                      hidden_size   position   head          what config.json has
    Baichuan-7B          4096       RoPE       plain         max_position_embeddings                     vocab_size  64000
    Baichuan-13B         5120       ALiBi      plain                                   model_max_length              64000
    Baichuan2-7B         4096       RoPE       unit rows     max_position_embeddings   model_max_length, z_loss_weight  125696
    Baichuan2-13B        5120       ALiBi      unit rows                               model_max_length, z_loss_weight  125696

Unit rows: each row of the head is brought to length 1 before it is used, so a token's logit does not grow with its row.

What is read from that, and refused where two signs speak against each other:

    RoPE, if there is max_position_embeddings; ALiBi, if there is only model_max_length. Not with the width of the other model.
    Unit rows, if there is z_loss_weight, which trained Baichuan 2 and is in all its configs, or the vocabulary is Baichuan 2's.
    A vocabulary that was grown by a fine-tuning decides nothing.

theta is 10000 and no key says so; neither do other keys of Llama's (a head_dim, key/value heads, a scaling) exist here.
"""

from typing import Any

from checkpoints.families.legacy import functions, read_mlp, write_decoder
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm, Rope

WIDTH_OF_ROPE, WIDTH_OF_ALIBI = 4096, 5120
FIRST_VOCAB, SECOND_VOCAB = 64000, 125696

BAICHUAN_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.self_attn.W_pack", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Blocks),
)


def read_position(r: Reader) -> tuple[dict[str, Any], int]:
    """What of Attention the position is, and the context."""
    turns = "max_position_embeddings" in r.values
    key, other = ("max_position_embeddings", WIDTH_OF_ALIBI) if turns else ("model_max_length", WIDTH_OF_ROPE)
    context = r.size(key)
    if r.size("hidden_size") == other:
        wanted = "none" if turns else "one"
        raise r.error("max_position_embeddings", f"{wanted} where hidden_size is {other}: Baichuan with RoPE has this key, with ALiBi it does not")
    return ({"rope": Rope()} if turns else {"alibi": Alibi()}), context


def read_unit_head(r: Reader) -> bool:
    """Whether the rows of the head are brought to length 1."""
    vocab, second = r.size("vocab_size"), "z_loss_weight" in r.values
    if second and vocab == FIRST_VOCAB:
        raise r.error("z_loss_weight", f"none where vocab_size is {FIRST_VOCAB}: Baichuan 2 has this key, the first does not")
    return second or vocab == SECOND_VOCAB


def read(r: Reader) -> ModelConfig:
    """Any of the four, or a model of the shape of one."""
    norm, dim, heads = Norm(eps=r.number("rms_norm_eps", 1e-6)), r.size("hidden_size"), r.size("num_attention_heads")
    if dim % heads:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim})")
    position, context = read_position(r)
    layer = Layer(Attention(heads, heads, dim // heads, **position), read_mlp(r), pre_mixer=norm, pre_ffn=norm)
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=dim,
        layers=(layer,) * r.count("num_hidden_layers"),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", False),
        context=context,
        unit_head=read_unit_head(r),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys by which `read` tells the four apart."""
    base = write_decoder(config, "baichuan", "BaichuanForCausalLM", Attention, MLP)
    layer = config.layers[0]
    return base | {
        "num_attention_heads": layer.mixer.heads,
        "intermediate_size": layer.ffn.hidden,
        "hidden_act": "gelu_pytorch_tanh" if layer.ffn.activation == "gelu_tanh" else layer.ffn.activation,
        "rms_norm_eps": config.final_norm.eps,
        "model_max_length": config.context,
    } | ({} if layer.mixer.alibi else {"max_position_embeddings": config.context}) | ({"z_loss_weight": 0} if config.unit_head else {})


BAICHUAN = functions(
    "baichuan", read, write, (BAICHUAN_NAMES,), INV_FREQ,
    irrelevant=frozenset({"_from_model_config", "gradient_checkpointing", "model_max_length", "z_loss_weight"}),
)
FAMILIES = {"baichuan": BAICHUAN}
