"""StableLM: Llama with LayerNorms, and a RoPE that turns the first quarter of each head.

    3B-4E1T             x += o(attention(norm(x)));  x += down(silu(gate(h)) · up(h)),  h = norm(x)     LayerNorms with bias
    StableLM-2 1.6B     a bias on q, k and v (use_qkv_bias)
    StableLM-2 12B      one norm, attention and feed-forward beside each other (use_parallel_residual); every head of q and k
                        has a LayerNorm with a gain of its own (qk_layernorm), a tensor a head on disk

Bellagente et al. 2024, arXiv 2402.17834. The first uploads, of model_type stablelm_epoch, are another layout and not read here.
"""

from checkpoints.families.llama import EPS, HEADS_SHARE_DIM, LAYER_NORM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import Follows, Switch, flag, number, part, size
from checkpoints.names.ops import Stack
from checkpoints.names.table import override, rule
from nanollm.config import Norm

STABLELM_NAMES = override(
    LLAMA_NAMES,  # {e} counts heads here: the rows of a gain (H, d)
    rule("model.layers.{i}.self_attn.q_layernorm.norms.{e}.weight", "layers.{i}.mixer.q_norm.gain", Stack),
    rule("model.layers.{i}.self_attn.k_layernorm.norms.{e}.weight", "layers.{i}.mixer.k_norm.gain", Stack),
)

STABLELM = LLAMA_SHAPE.but(
    "stablelm", "StableLmForCausalLM", names=(STABLELM_NAMES,), norm=LAYER_NORM,
    keys=HEADS_SHARE_DIM | {
        "num_key_value_heads": size("mixer.kv_heads", missing=32),
        "max_position_embeddings": size("context", missing=4096),
        "rope_parameters": RopeKeys(fraction=0.25),
        "qk_layernorm": Switch("mixer.qk_norm", part(Norm, kind="layer", scope="each")),  # the three switches are independent
        "use_qkv_bias": flag("mixer.qkv_bias", missing=False),
        "use_parallel_residual": flag("parallel", missing=False),
        "pre_ffn": Follows(lambda draft: None if draft["parallel"] else LAYER_NORM),
        "layer_norm_eps": number(*EPS, missing=1e-5),
    },
    without=("rms_norm_eps",),
)
FAMILIES = {"stablelm": STABLELM}
