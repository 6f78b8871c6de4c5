"""Llama, and the many that differ from it in numbers only.

    x += o(attention(norm(x)));  x += down(silu(gate(h)) · up(h)),  h = norm(x)      RMS norms, RoPE in the half layout

    family                     what it takes besides Llama's own keys
    Llama-1                    no rope_theta, num_key_value_heads or max_position_embeddings; inv_freq on disk
    Llama-2, Orca-2, XGen      –   (Orca-2: vocab 32003)
    Llama-3, 3.1, 3.2, 3.3     theta 5e5; from 3.1 on the "llama3" scaling; 3.2 1B and 3B tied
    CodeLlama                  theta 1e6
    Vicuna, Alpaca             vocab 32001 (Alpaca); the 16k Vicunas have linear scaling
    Yi, Yi-1.5, Yi-200K        theta 5e6 and more; the first uploads have model_type "Yi" and call the norms ln1, ln2
    DeepSeek-LLM, -Coder       Coder: theta 1e5 and linear scaling by 4
    TinyLlama, SmolLM          SmolLM: tied, and two keys of its trainer
    Aquila, Aquila2            model_type "aquila"; the 16K one has linear scaling by 4
    XVERSE                     model_type "xverse", and two keys about how it was stored
    InternLM-1 as converted    attention_bias, which puts a bias on o too
    IQuest-Coder               model_type "iquestcoder": heads 128 wide whatever hidden_size is

The tables of Llama are what the other Llama-shaped lineages start from.
"""


from checkpoints.families.family import Family
from checkpoints.names.config_rows import DividingHeads, HeadDim, Heads, LayerCount, RopeKeys
from checkpoints.names.config_table import activation, field, flag, number, only, part, size
from checkpoints.names.table import override, under
from nanollm.config import MLP, Attention, Layer, Norm, Rope

EPS = (  # of all norms there are
    "final_norm.eps", "pre_mixer.eps", "post_mixer.eps", "pre_ffn.eps", "post_ffn.eps", "mixer.qk_norm.eps")

LLAMA_NORMS = {"input_layernorm": "pre_mixer", "post_attention_layernorm": "pre_ffn"}
HEADS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}  # a feed-forward with a gate
EXPERT = {f"{name}.weight": ours for name, ours in GATED.items()}  # one of many such, a tensor each
LLAMA_NAMES = override(
    {},
    *under("", "", {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}),
    *under("model.layers.{i}", "layers.{i}", LLAMA_NORMS),
    *under("model.layers.{i}.self_attn", "layers.{i}.mixer", HEADS),
    *under("model.layers.{i}.mlp", "layers.{i}.ffn", GATED),
)
YI_NAMES = override(LLAMA_NAMES, *under("model.layers.{i}", "layers.{i}", {"ln1": "pre_mixer", "ln2": "pre_ffn"}))
INV_FREQ = frozenset({"model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"})
LAYER_NORM = part(Norm, kind="layer", bias=True)
ATTENTION_BIAS = flag("mixer.qkv_bias", "mixer.out_bias", missing=False)  # one switch for q, k, v and o
# heads can only be dim / heads wide
HEADS_SHARE_DIM = {"num_attention_heads": Heads(alone=False), "head_dim": only(None, field("mixer.head_dim"))}

LLAMA_SHAPE = Family(  # what all the Llama-shaped families share
    "llama", "LlamaForCausalLM",
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim"), "num_hidden_layers": LayerCount(),
        "num_attention_heads": size("mixer.heads"),
        "num_key_value_heads": size("mixer.kv_heads", missing=field("mixer.heads"), null=field("mixer.heads")),
        "head_dim": HeadDim(),
        "intermediate_size": size("ffn.hidden", "ffn.expert.hidden"),
        "hidden_act": activation("ffn.activation", "ffn.expert.activation", missing="silu"),
        "rms_norm_eps": number(*EPS, missing=1e-6),
        "tie_word_embeddings": flag("tied", missing=False),
        "max_position_embeddings": size("context", missing=2048),
        "rope_parameters": RopeKeys(),
    },
    layer=part(Layer, mixer=part(Attention, rope=part(Rope)), ffn=part(MLP), pre_mixer=part(Norm), pre_ffn=part(Norm)),
    names=(LLAMA_NAMES,),
    ignorable=INV_FREQ,
)
LLAMA = LLAMA_SHAPE.but(
    "llama", names=(LLAMA_NAMES, YI_NAMES),
    keys={
        "num_attention_heads": DividingHeads(),
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
        "rope_interleaved": only(False), "quantization_bit": only(0),  # in configs of SmolLM, and of XVERSE
    },
    irrelevant=frozenset({"max_sequence_length", "max_tokenizer_truncation", "is_llama_config", "initializer_weight"}),
)
IQUESTCODER = LLAMA_SHAPE.but(
    "iquestcoder", "IQuestCoderForCausalLM",
    about="IQuest-Coder: Llama with heads 128 wide whatever hidden_size is, and biases where two keys say so.",
    missing={"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    keys={
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
        "clip_qkv": only(None), "use_sliding_window": only(False),  # the class refuses both
    },
)
FAMILIES = {**dict.fromkeys(("llama", "aquila", "xverse", "Yi"), LLAMA), "iquestcoder": IQUESTCODER}
