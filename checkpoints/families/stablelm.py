"""StableLM: Llama with LayerNorms, with bias, and a RoPE that turns the first quarter of each head.

    3B-4E1T             nothing else
    StableLM-2 1.6B     a bias on q, k and v (use_qkv_bias)
    StableLM-2 12B      one norm, attention and feed-forward beside each other (use_parallel_residual); every head of q
                        and k has a LayerNorm with a gain of its own (qk_layernorm), a tensor a head on disk

The three switches are independent. Bellagente et al. 2024, arXiv 2402.17834. The first uploads, of model_type
stablelm_epoch, are another layout and not read here.
"""

from checkpoints.families.llama import EPS, HEADS_SHARE_DIM, LAYER_NORM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import Follows, Switch, flag, number, part, size
from checkpoints.names.ops import Stack
from checkpoints.names.table import override, under
from nanollm.config import Norm

STABLELM_NAMES = override(  # {e} counts heads here: the rows of a gain (H, d)
    LLAMA_NAMES, *under("model.layers.{i}.self_attn", "layers.{i}.mixer", {
        "q_layernorm.norms.{e}.weight": "q_norm.gain", "k_layernorm.norms.{e}.weight": "k_norm.gain"}, Stack))

STABLELM = LLAMA_SHAPE.but(
    "stablelm", "StableLmForCausalLM", names=(STABLELM_NAMES,), norm=LAYER_NORM,
    missing={"max_position_embeddings": 4096},
    keys=HEADS_SHARE_DIM | {
        "num_key_value_heads": size("mixer.kv_heads", missing=32),
        "rope_parameters": RopeKeys(fraction=0.25),
        "qk_layernorm": Switch("mixer.qk_norm", part(Norm, kind="layer", scope="each")),
        "use_qkv_bias": flag("mixer.qkv_bias", missing=False), "use_parallel_residual": flag("parallel", missing=False),
        "pre_ffn": Follows(lambda draft: None if draft["parallel"] else LAYER_NORM),
        "layer_norm_eps": number(*EPS, missing=1e-5),
    },
    without=("rms_norm_eps",),
)
FAMILIES = {"stablelm": STABLELM}
