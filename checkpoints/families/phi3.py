"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: Llama with fused matrices, and LongRoPE where the context is long.

    on disk   qkv_proj rows  q q q … k v        gate_up_proj rows  gate … up …          no biases

    Phi-3-mini-4k, -medium-4k    a window of 2047 tokens in every layer
    Phi-3-128k, Phi-3.5-mini     LongRoPE: one list of divisors up to `original_max_position_embeddings`, which stands
                                 beside the object and not in it, another list beyond. The first upload calls it "su"
    Phi-4                        theta 250000, no window, no stretch
    Phi-4-mini                   LongRoPE on the first three quarters of each head (`partial_rotary_factor`); tied

phi4_multimodal is a Phi-4-mini beside towers for pictures and sound, which are left out, and so are the adapters that
go with them, which its folder has apart. It is saved as the phi3 that it is.

A window of 262144 with a context of 131072 says nothing, and is kept as it is. Phi-3-small, Phi-3.5-MoE: other models.
"""

from typing import Any

from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys, even_share
from checkpoints.names.config_table import ABSENT, Draft, only, size
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.rope import ORIGINAL
from checkpoints.names.table import GATE_UP, QKV, override, rule

PHI3_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.self_attn.qkv_proj", QKV, Blocks),
    rule("model.layers.{i}.mlp.gate_up_proj", GATE_UP, Blocks),
)


class LongRopeOnly(RopeKeys):
    """LongRoPE or nothing. Its lists must be as long as there are pairs of channels that turn."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Check the kind and the lists, then read as for any RoPE."""
        inner = r.inside("rope_scaling") or r.inside("rope_parameters")
        if inner is not None:
            inner.must("rope_type" if "rope_type" in inner.values else "type", "default", "longrope", "su")
            turned = inner.number(self.fraction_key, r.number(self.fraction_key, self.fraction))
            pairs = int(draft["mixer.head_dim"] * turned) // 2
            for name in ("short_factor", "long_factor"):
                found = inner.get(name, None)
                if isinstance(found, list) and len(found) != pairs:
                    raise inner.error(name, f"a list of {pairs} numbers, one for each pair of channels that turns, "
                                            f"not of {len(found)}")
        super().read(r, draft, key)

    def original(self, r: Reader, draft: Draft) -> int:
        """Phi-3 says it at the top level; a missing key means 4096."""
        return r.size(ORIGINAL, 4096)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """RoPE's keys and the original context, which is the context where nothing is stretched."""
        original = draft["mixer.rope.scaling.original"]
        return super().write(draft, key) | {ORIGINAL: draft["context"] if original is ABSENT else original}


PHI3 = LLAMA_SHAPE.but(
    "phi3", "Phi3ForCausalLM", names=(PHI3_NAMES,), missing={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    keys={
        "head_dim": size("mixer.head_dim", missing=even_share, null=even_share),
        "rope_parameters": LongRopeOnly(fraction=1.0),
        "sliding_window": size("mixer.window", missing=None),
        "attention_bias": only(False), "mlp_bias": only(False), "lm_head_bias": only(False),
        "full_attn_mod": only(1), "interpolate_factor": only(1),  # Phi-4-mini's; nothing published reads them
    },
)
PHI4_MULTIMODAL = PHI3.but(
    PHI3.name, missing={"max_position_embeddings": 131072, "num_key_value_heads": 8},
    irrelevant=frozenset({"vision_config", "audio_config"}), left_out=("model.embed_tokens_extend.",),
)
FAMILIES = {"phi3": PHI3, "phi4_multimodal": PHI4_MULTIMODAL}
