"""ChatGLM2-6B, ChatGLM3-6B, their 32k and 128k variants, and GLM-4-9b as first uploaded: model_type chatglm.

Llama's block, its norms rounding after the gain, with these differences:

    rope     half of each head turns, in neighbouring pairs (0,1) (2,3) …
    biases   on q, k and v, by `add_qkv_bias`; nowhere else
    on disk  query_key_value rows  q q q … k v          dense_h_to_4h rows  gate … up …

`rope_ratio` stretches the context, and means one of two things that the key itself does not tell apart:

                                                   angle of pair j at position m
    ChatGLM2-6B-32k (16)                           (m / ratio) · 10000^(−2j/r)             positions are divided
    ChatGLM3-6B-32k (50) and -128k (500),          m · (10000 · ratio)^(−2j/r)             the base is multiplied
    GLM-4-9b-chat (500) and -1m (10000)

The folder mostly does: by the name in `_name_or_path`, or by GLM-4's vocabulary. Where neither does, someone who knows adds a key
of ours to config.json: "rope_ratio_scales": "positions" or "base".

The first ChatGLM-6B (positions in two dimensions, a prefix that sees itself both ways) is another model, and its keys are refused.
"""

import re
from typing import Any

from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, Linear, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

THETA = 10_000.0
GLM4_VOCAB = 151552
RATIO_SCALES = "rope_ratio_scales"                       # our key: what rope_ratio scales

NAMES = override(
    {},
    rule("transformer.embedding.word_embeddings", "embed"),
    rule("transformer.encoder.layers.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    rule("transformer.encoder.layers.{i}.self_attention.query_key_value",
         ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Blocks),
    rule("transformer.encoder.layers.{i}.self_attention.dense", "layers.{i}.mixer.o"),
    rule("transformer.encoder.layers.{i}.post_attention_layernorm", "layers.{i}.pre_ffn"),
    rule("transformer.encoder.layers.{i}.mlp.dense_h_to_4h", ["layers.{i}.ffn.gate", "layers.{i}.ffn.up"], Blocks),
    rule("transformer.encoder.layers.{i}.mlp.dense_4h_to_h", "layers.{i}.ffn.down"),
    rule("transformer.encoder.final_layernorm", "norm"),
    rule("transformer.output_layer", "head"),
)


def read_ratio(r: Reader) -> Rope:
    """`rope_ratio` in the meaning that our key gives it, or else the folder."""
    ratio = r.number("rope_ratio", 1.0)
    scales = r.must(RATIO_SCALES, what_ratio_scales(r), "positions", "base")
    if ratio == 1:
        return Rope(THETA, "interleaved", 0.5)
    if scales is None:
        raise r.error("rope_ratio", f'"{RATIO_SCALES}" beside it, since the folder does not tell which model this is: "positions" where '
                                    f'positions are divided by it (ChatGLM2), "base" where the base is multiplied by it (ChatGLM3, GLM-4)')
    if scales == "positions":
        return Rope(THETA, "interleaved", 0.5, Linear(ratio))
    return Rope(THETA * ratio, "interleaved", 0.5)


def what_ratio_scales(r: Reader) -> str | None:
    """"positions" or "base", as far as a published folder says it; else None."""
    name = r.get("_name_or_path", "")
    name = name.lower() if isinstance(name, str) else ""
    older, newer = re.search(r"chatglm-?2", name), re.search(r"chatglm-?3|glm-?4", name)
    if bool(older) != bool(newer):
        return "positions" if older else "base"
    return "base" if r.size("padded_vocab_size") == GLM4_VOCAB else None


def read(r: Reader) -> ModelConfig:
    """The keys that stand first belong to other wirings of the same code, which no published model has."""
    for key, value in (("rmsnorm", True), ("post_layer_norm", True), ("add_bias_linear", False), ("tie_word_embeddings", False),
                       ("apply_residual_connection_post_layernorm", False), ("fp32_residual_connection", False),
                       ("pre_seq_len", None), ("quantization_bit", 0)):
        r.must(key, value)
    vocab, layers = r.size("padded_vocab_size"), r.count("num_layers")
    r.must("vocab_size", vocab)                          # GLM-4 says both twice
    r.must("num_hidden_layers", layers)
    if not r.flag("multi_query_attention", False):
        raise r.error("multi_query_attention", "true, which is what is implemented")
    attention = Attention(
        heads=r.size("num_attention_heads"),
        kv_heads=r.size("multi_query_group_num", 1),
        head_dim=r.size("kv_channels", 128),
        rope=read_ratio(r),
        qkv_bias=r.flag("add_qkv_bias", False),
    )
    norm = Norm(eps=r.number("layernorm_epsilon", 1e-5), cast_after_gain=True)
    layer = Layer(attention, MLP(r.size("ffn_hidden_size")), pre_mixer=norm, pre_ffn=norm)
    return ModelConfig(vocab, r.size("hidden_size"), (layer,) * layers, norm, context=r.size("seq_length", 2048))


def write(config: ModelConfig) -> dict[str, Any]:
    """What it cannot say (another part of the head that turns, another scaling, a tied head) does not read back."""
    base = write_decoder(config, "chatglm", "ChatGLMModel", Attention, MLP)
    attention, mlp = config.layers[0].mixer, config.layers[0].ffn
    if attention.rope is None:
        raise ConfigError("layers[0].mixer.rope is None")
    linear = isinstance(attention.rope.scaling, Linear)
    return base | {
        "padded_vocab_size": config.vocab,
        "num_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "multi_query_attention": True,
        "multi_query_group_num": attention.kv_heads,
        "kv_channels": attention.head_dim,
        "add_qkv_bias": attention.qkv_bias,
        "ffn_hidden_size": mlp.hidden,
        "layernorm_epsilon": config.final_norm.eps,
        "seq_length": config.context,
        "rope_ratio": attention.rope.scaling.factor if linear else attention.rope.theta / THETA,
        RATIO_SCALES: "positions" if linear else "base",
        "original_rope": True, "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
    }


CHATGLM = functions(
    "chatglm", read, write, (NAMES,), frozenset({"transformer.rotary_pos_emb.inv_freq"}),
    # how scores are kept from overflowing in 16 bits, which kernels run, dropout, and what only a tuned prefix reads
    irrelevant=frozenset({"apply_query_key_layer_scaling", "attention_softmax_in_fp32", "original_rope", "bias_dropout_fusion",
                          "classifier_dropout", "prefix_projection", "attn_implementation"}),
)
FAMILIES = {"chatglm": CHATGLM}
