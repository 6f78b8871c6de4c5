"""OPT (125M to 66B), Galactica, BioGPT and XGLM: GPT-2's block in (out, in) matrices, with q, k and v apart and a ReLU.

    x = E[token] + P[position + 2]                the first two rows of P stood for padding, in fairseq
    x += out_proj(attention(norm(x)));  x += fc2(relu(fc1(norm(x))))

LayerNorms with ε 1e-5 whatever the config says, the head tied, biases everywhere. Galactica has a GELU, no biases
(`enable_bias`), and norms with nothing learned (`layer_norm_elementwise_affine`). Zhang et al. 2022, arXiv 2205.01068;
Taylor et al. 2022, arXiv 2211.09085. BioGPT has a GELU and an embedding times √D (`scale_embedding`), and ε 1e-5 too,
whatever `layer_norm_eps` says; Luo et al. 2022, arXiv 2210.10341. XGLM is the same with sines in place of the table of
positions (nanollm/layers/positions.py), of which those of 0 and 1 stood for padding; Lin et al. 2021, arXiv 2112.10668.

Refused: OPT-350M, which normalises behind each branch's sum and has an embedding narrower than the stream
(`do_layer_norm_before` false, `word_embed_proj_dim`), and the models without the last norm.
"""

from typing import Any

from checkpoints.families.afmoe import RootOfWidth
from checkpoints.families.family import Family
from checkpoints.families.llama import LAYER_NORM
from checkpoints.names.config_rows import Heads, LayerCount
from checkpoints.names.config_table import Draft, Row, activation, field, flag, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import moved, override, stripped, under
from nanollm.config import MLP, Attention, Layer, ModelConfig, Positions, Sines

OPT_NAMES = override(
    {},
    *under("", "", {"lm_head": "head"}),
    *under("model.decoder", "", {
        "embed_tokens": "embed", "embed_positions": "positions", "final_layer_norm": "norm"}),
    *under("model.decoder.layers.{i}", "layers.{i}", {
        "self_attn_layer_norm": "pre_mixer", "final_layer_norm": "pre_ffn", "fc1": "ffn.up", "fc2": "ffn.down"}),
    *under("model.decoder.layers.{i}.self_attn", "layers.{i}.mixer", {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}),
)


class TwoMoreRows(Row):
    """How many positions there are; the table has two rows more, before them."""
    missing = 2048

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        number = r.size(key, self.missing)
        draft["positions"], draft["context"] = Positions(number + 2, 2), number

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["positions.rows"] - draft["positions.first"]} if "positions.rows" in draft else {}


NORMS = ("final_norm", "pre_mixer", "pre_ffn")
OPT = Family(
    "opt", "OPTForCausalLM",
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim"), "num_hidden_layers": LayerCount(),
        "num_attention_heads": Heads(), "ffn_dim": size("ffn.hidden", missing=3072),
        "max_position_embeddings": TwoMoreRows(),
        "activation_function": activation("ffn.activation", missing="relu"),
        "enable_bias": flag("mixer.qkv_bias", "mixer.out_bias", "ffn.bias", missing=True),
        "layer_norm_elementwise_affine": flag(*(f"{norm}.{one}" for norm in NORMS for one in ("gain", "bias")),
                                              missing=True),
        "tie_word_embeddings": flag("tied", missing=True),
        "do_layer_norm_before": only(True), "_remove_final_layer_norm": only(False),
        "word_embed_proj_dim": only(field("dim"), None),
        "learned_embeddings": only(True), "scale_embeddings": only(False),  # Galactica's
    },
    layer=part(Layer, mixer=part(Attention), ffn=part(MLP, gated=False), pre_mixer=LAYER_NORM, pre_ffn=LAYER_NORM).but(
        {"pre_mixer.eps": 1e-5, "pre_ffn.eps": 1e-5}),
    model=part(ModelConfig, final_norm=LAYER_NORM).but({"final_norm.eps": 1e-5}),
    names=(OPT_NAMES, stripped(OPT_NAMES, "model.")),
    irrelevant=frozenset({"dropout", "activation_dropout", "layerdrop", "init_std"}),
)
BIOGPT_NAMES = override(moved(OPT_NAMES, "model.decoder.", "biogpt."), *under("", "", {
    "output_projection": "head", "biogpt.layer_norm": "norm"}))
BIOGPT = OPT.but(
    "biogpt", "BioGptForCausalLM", names=(BIOGPT_NAMES,),
    layer={"mixer.qkv_bias": True, "mixer.out_bias": True, "ffn.bias": True},
    without=("ffn_dim", "activation_function", "enable_bias", "layer_norm_elementwise_affine", "do_layer_norm_before",
             "_remove_final_layer_norm", "word_embed_proj_dim", "learned_embeddings", "scale_embeddings"),
    missing={"max_position_embeddings": 1024},
    keys={
        "intermediate_size": size("ffn.hidden"), "hidden_act": activation("ffn.activation", missing="gelu"),
        "scale_embedding": RootOfWidth(missing=True),
    },
    irrelevant=frozenset({"activation_dropout", "layerdrop", "layer_norm_eps", "hidden_dropout_prob",
                          "attention_probs_dropout_prob"}),
)
XGLM = BIOGPT.but(
    "xglm", "XGLMForCausalLM", model={"positions": Sines(2)},
    names=(override(moved(OPT_NAMES, "model.decoder.", "model."), *under("", "", {"model.layer_norm": "norm"})),),
    without=("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
             "scale_embedding"),  # it stands behind the width
    keys={
        "d_model": size("dim"), "num_layers": LayerCount(), "attention_heads": Heads(missing=16),
        "ffn_dim": size("ffn.hidden", missing=4096),
        "activation_function": activation("ffn.activation", missing="gelu"),
        "max_position_embeddings": size("context", missing=2048), "scale_embedding": RootOfWidth(missing=True),
        "add_cross_attention": only(False),
    },
    irrelevant=frozenset({"dropout", "activation_dropout", "layerdrop", "init_std", "decoder_start_token_id"}),
)
FAMILIES = {"opt": OPT, "biogpt": BIOGPT, "xglm": XGLM}
