"""The families, by the `model_type` of their config.json; beside them nanollm's own layout, which is for all.

A model that was trained here has no family. It is written as the first in this list that can say all of it, which is
found out by reading back what was written.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from checkpoints.families.baichuan import BAICHUAN
from checkpoints.families.bloom import BLOOM
from checkpoints.families.chatglm import CHATGLM
from checkpoints.families.cohere import COHERE, COHERE2
from checkpoints.families.deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3
from checkpoints.families.falcon import FALCON, TWO_NORMS
from checkpoints.families.family import Family
from checkpoints.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_VISION
from checkpoints.families.glm import GLM, GLM4
from checkpoints.families.gpt2 import GPT2, GPT_BIGCODE
from checkpoints.families.gpt_neox import GPT_NEOX
from checkpoints.families.gpt_oss import GPT_OSS
from checkpoints.families.internlm import INTERNLM, INTERNLM2, INTERNLM3
from checkpoints.families.jamba import JAMBA
from checkpoints.families.llama import LLAMA
from checkpoints.families.mamba import FALCON_MAMBA, MAMBA
from checkpoints.families.mamba2 import MAMBA2, ORIGINAL
from checkpoints.families.mistral import MISTRAL
from checkpoints.families.mixtral import MIXTRAL
from checkpoints.families.mpt import MPT
from checkpoints.families.nanollm import NANOLLM
from checkpoints.families.olmo import OLMO, OLMO2, OLMOE
from checkpoints.families.persimmon import PERSIMMON
from checkpoints.families.phi import PHI
from checkpoints.families.phi3 import PHI3
from checkpoints.families.phimoe import PHIMOE
from checkpoints.families.qwen import QWEN2, QWEN3
from checkpoints.families.qwen1 import QWEN1
from checkpoints.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from checkpoints.families.qwen_vl import QWEN2_VL
from checkpoints.families.recurrent_gemma import RECURRENT_GEMMA
from checkpoints.families.rwkv import RWKV4
from checkpoints.families.stablelm import STABLELM
from checkpoints.families.starcoder import STARCODER2
from checkpoints.families.stripedhyena import STRIPEDHYENA
from checkpoints.families.yuan import YUAN
from checkpoints.names.reader import Reader, brief
from nanollm.config import ModelConfig
from nanollm.errors import ConfigError

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mamba": MAMBA,
    # the same block, with parts of its own
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi": PHI,
    "phi3": PHI3,
    "gpt_neox": GPT_NEOX,                        # before falcon, which could write some of it too
    "RefinedWeb": TWO_NORMS,                     # Falcon under its first names; before falcon, which could write it too
    "falcon": FALCON,
    "RefinedWebModel": FALCON,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "bloom": BLOOM,
    "mpt": MPT,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "starcoder2": STARCODER2,
    "stablelm": STABLELM,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "persimmon": PERSIMMON,
    "glm": GLM,
    "glm4": GLM4,
    "chatglm": CHATGLM,
    "internlm": INTERNLM,
    "internlm2": INTERNLM2,
    "internlm3": INTERNLM3,
    "baichuan": BAICHUAN,
    "qwen": QWEN1,
    # experts
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "deepseek": DEEPSEEK,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "olmoe": OLMOE,
    "phimoe": PHIMOE,
    "gpt_oss": GPT_OSS,
    # other mixers
    "falcon_mamba": FALCON_MAMBA,
    "mamba2": MAMBA2,
    "state-spaces": ORIGINAL,                    # its configs have no model_type, see read_config
    "jamba": JAMBA,
    "recurrent_gemma": RECURRENT_GEMMA,
    "rwkv": RWKV4,
    "stripedhyena": STRIPEDHYENA,
    "yuan": YUAN,
    # the language model alone
    "gemma3": GEMMA3_WITH_VISION,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    # Llama under other names
    "aquila": LLAMA,
    "xverse": LLAMA,
    "Yi": LLAMA,
}


def read_config(
    values: dict[str, Any], where: str = "config.json", ignore: Collection[str] = (), most: int = 10_000
) -> tuple[Family, ModelConfig]:
    """A config.json as a ModelConfig, and its family. `most` bounds layers and experts.

    Raises ConfigError on an unknown model_type, an impossible value, or a key that nothing read."""
    kind = values.get("model_type", "state-spaces" if "ssm_cfg" in values else None)
    known = {**FAMILIES, NANOLLM.name: NANOLLM}
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{where}: model_type is {brief(kind)}; supported are {', '.join(known)}")
    family = known[kind]
    reader = Reader(values, where, ignore, most)
    try:
        config = family.read(reader)
    except ConfigError as error:                 # a combination that the dataclasses refuse does not know its file
        raise ConfigError(str(error) if where in str(error) else f"{where}: {error}") from None
    reader.close(family.irrelevant)
    return family, config


def write_config(config: ModelConfig, family: Family | None = None) -> tuple[Family, dict[str, Any]]:
    """A config.json for this model: of `family`, or else of the first that can express it.

    Raises ConfigError with what stands in the way, family by family."""
    reasons = []
    for candidate in [family] if family else dict.fromkeys(one for one in FAMILIES.values() if not one.left_out):
        try:
            values = candidate.write(config)
            again = read_config(values, where=f"as {candidate.name}")[1]
        except ConfigError as error:
            reasons.append(f"{candidate.name}: {error}")
            continue
        if again == config:
            return candidate, values
        reasons.append(f"{candidate.name}: {difference(config, again, 'config')}")
    raise ConfigError("no family can express this model:\n  " + "\n  ".join(reasons))


def difference(ours: Any, read: Any, path: str) -> str:
    """The first place where two configs part, as a sentence."""
    pairs: list[tuple[str, Any, Any]] = []
    if dataclasses.is_dataclass(ours) and type(ours) is type(read):
        pairs = [(f".{field.name}", getattr(ours, field.name), getattr(read, field.name)) for field in dataclasses.fields(ours)]
    elif isinstance(ours, tuple) and isinstance(read, tuple) and len(ours) == len(read):
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(zip(ours, read))]
    for part, a, b in pairs:
        if a != b:
            return difference(a, b, path + part)
    return f"{path} is {ours!r}, and would be read as {read!r}"
