"""Which of transformers' text decoders load here: `python -m tests.model_types` counts them and names the others.

A text decoder is a model_type of transformers' MODEL_FOR_CAUSAL_LM_MAPPING_NAMES that is not in its lists of encoders
(MASKED_LM) and of encoders with a decoder (SEQ_TO_SEQ_CAUSAL_LM), and not in NO_TEXT_DECODER, each with its reason. Of
a multimodal folder the text model counts. It loads if checkpoints/families/ has its model_type, which a fixture proves
(tests/test_families_table.py).
"""

from typing import NamedTuple

import transformers
from transformers.models.auto import modeling_auto as auto

from checkpoints.families import FAMILIES

NO_TEXT_DECODER = {
    "bert-generation": "an encoder's weights, run as a decoder",
    "emu3": "its tokens are pieces of pictures",
    "gemma4_assistant": "drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "drafts for another model, whose cache it reads",
    "git": "a picture's caption",
    "got_ocr2": "reads the text of a picture",
    "gpt-sw3": "a tokenizer's name; its configs say gpt2",
    "mllama": "reads pictures by cross attention between the layers",
    "moshi": "speech in and out, two streams at once",
    "musicgen": "music from a text",
    "musicgen_melody": "music from a text and a melody",
    "trocr": "the decoder behind a picture's encoder",
    "whisper": "writes down speech",
    "xlnet": "predicts in any order; an encoder in practice",
}


class Coverage(NamedTuple):
    """model_types, in transformers' order."""
    loaded: list[str]
    missing: list[str]

    def __str__(self) -> str:
        return (f"{len(self.loaded)} of the {len(self.loaded) + len(self.missing)} text decoders of transformers "
                f"{transformers.__version__} load")


def coverage() -> Coverage:
    """Those that load here, and those that do not."""
    others = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
              *NO_TEXT_DECODER}
    decoders = [kind for kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in others]
    loaded = [kind for kind in decoders if kind in FAMILIES]
    return Coverage(loaded, [kind for kind in decoders if kind not in loaded])


if __name__ == "__main__":
    found = coverage()
    beside = [kind for kind in FAMILIES if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    print(f"{found}.\n\nbeside them, of code on the hub or of multimodal classes: {', '.join(beside)}\n\n"
          f"not there: {', '.join(found.missing)}")
