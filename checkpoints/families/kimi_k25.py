"""Kimi-K2.5 and later: a vision tower, which is left out, and Kimi-K2, which is DeepSeek-V3 in other numbers.

"text_config" is a config of DeepSeek-V3, in full, whose model_type is kimi_k2 or, as transformers writes it,
deepseek_v3; so is what is saved. "Kimi K2.5: Visual Agentic Intelligence", arXiv 2602.02276.

    on the hub                        language_model.model.layers.…     vision_tower.…          mm_projector.…
    as the modules are called now     model.language_model.layers.…     model.vision_tower.…    model.mm_projector.…
"""

from checkpoints.families.deepseek import DEEPSEEK_V3
from checkpoints.families.multimodal import TextInside, inside

KIMI_K25 = TextInside.of(
    DEEPSEEK_V3, "kimi_k2", "deepseek_v3", names=inside(DEEPSEEK_V3.names),
    irrelevant=DEEPSEEK_V3.irrelevant | {
        "vision_config", "projection_hidden_size", "projection_layer_norm_eps", "ignore_index",
        "use_unified_vision_chunk", "video_placeholder",
    },
    left_out=("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector."),
)
FAMILIES = {"kimi_k25": KIMI_K25}
