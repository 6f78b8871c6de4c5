"""Hunyuan, dense (0.5B to 7B): Llama whose q and k are normalised once they are rotated, head by head.

RoPE's base is stretched once and for all: {"type": "dynamic", "alpha": α} means θ α^(d/(d−2)), whatever the length of
the sequence; the other keys beside α are not read. Without α it is dynamic as in other families. Tencent, July 2025.
"""

from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import Draft, field, only, part
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, under
from nanollm.config import Norm, Rope

HUNYUAN_NAMES = override(LLAMA_NAMES, *under("model.layers.{i}.self_attn", "layers.{i}.mixer", {
    "query_layernorm": "q_norm", "key_layernorm": "k_norm"}))


class FixedStretch(RopeKeys):
    """RoPE in which `alpha` stretches the base."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """What the keys say; with an alpha, its base and nothing else."""
        said = r.inside("rope_scaling") or r.inside("rope_parameters")
        alpha = said.number("alpha", None) if said else None
        if said is None or alpha is None:
            return super().rope(r, draft)
        said.must("rope_type" if "rope_type" in said.values else "type", "dynamic")
        theta = said.number("rope_theta", r.number("rope_theta", self.theta, above=1), above=1)
        said.close(("type", "rope_type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
        width = draft["mixer.head_dim"]
        return Rope(theta * alpha ** (width / (width - 2)))


HUNYUAN = LLAMA_SHAPE.but(
    "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", names=(HUNYUAN_NAMES,),
    layer={"mixer.qk_norm": part(Norm, scope="rotated")}, missing={"rms_norm_eps": 1e-5},
    keys={
        "attention_bias": ATTENTION_BIAS, "rope_parameters": FixedStretch(),
        # what the class always does, and the hub's configs also say
        "attention_head_dim": only(field("mixer.head_dim")), "use_qk_norm": only(True), "qk_norm": only(True),
        "use_rotary_pos_emb": only(True), "use_cla": only(False), "mlp_bias": only(False), "norm_type": only("rms"),
        "num_experts": only(1), "add_classification_head": only(False),
    },
    irrelevant=frozenset("cla_share_factor class_num dense_list im_end_id im_newline_id im_start_id mask_init_id "
                         "org_vocab_size pad_id pool_type text_end_id text_start_id".split()),
)
FAMILIES = {"hunyuan_v1_dense": HUNYUAN}
