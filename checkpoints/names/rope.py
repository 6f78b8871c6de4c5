"""RoPE in config.json: two dialects, one meaning.

    hub, until 2025      "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}
    transformers 5       "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}

`type` is the older word for `rope_type`. Where both objects stand, transformers reads rope_scaling alone; the base, and
the part of a head that turns, come from inside the object it reads, else from the top level, else from the family. We
follow, and write both dialects.

SCALINGS is the table of formulas, read in both directions. The formulas themselves are in nanollm/layers/scaling.py.
"""

import math
from typing import Any

from checkpoints.names.reader import Reader, brief, is_number
from nanollm.config import DynamicNTK, Linear, Llama3, LongRope, Proportional, Rope, Scaling, Yarn
from nanollm.errors import ConfigError

ORIGINAL = "original_max_position_embeddings"
SCALINGS = {  # our field → their key; a field that is not named follows from the context
    "linear": (Linear, {"factor": "factor"}),
    "proportional": (Proportional, {"share": "partial_rotary_factor"}),
    "dynamic": (DynamicNTK, {"factor": "factor"}),
    "llama3": (Llama3, {"factor": "factor", "original": ORIGINAL,
                        "low": "low_freq_factor", "high": "high_freq_factor"}),
    "yarn": (Yarn, {"factor": "factor", "original": ORIGINAL, "fast": "beta_fast", "slow": "beta_slow",
                    "truncate": "truncate", "attention_factor": "attention_factor"}),
    "longrope": (LongRope, {"short": "short_factor", "long": "long_factor", "original": ORIGINAL,
                            "attention_factor": "attention_factor"}),
}
OLD_WORDS = {"su": "longrope"}                   # Phi-3 before it was named in transformers


def read_rope(
    r: Reader, theta: float, context: int, fraction: float | None = None, original: int | None = None,
    theta_key: str = "rope_theta", fraction_key: str = "partial_rotary_factor",
) -> Rope:
    """theta       the family's base where no key says it
    context     what max_position_embeddings says
    fraction    the part of a head that turns where no key says it; None: there is no such key, and all of it turns
    original    the context before the stretch, in families that say it outside the object
    """
    theta = r.number(theta_key, theta, above=1)
    whole = fraction is None
    turned = 1.0 if fraction is None else r.number(fraction_key, fraction)
    old, new = r.inside("rope_scaling"), r.inside("rope_parameters")
    inner = old or new
    if inner is None:
        return Rope(theta, fraction=turned)
    if old and new and "rope_theta" in new.values and "rope_theta" not in old.values and theta_key not in r.values:
        # transformers would fall back to the family's base in silence
        raise r.error("rope_parameters", "rope_theta beside or inside rope_scaling, which is read in place of this")
    theta = inner.number("rope_theta", theta, above=1)
    older = inner.get("type", "default")
    kind = inner.get("rope_type", older)
    kind = OLD_WORDS.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ("default", *SCALINGS):
        raise ConfigError(f"{r.where}: {inner.prefix}rope_type is {brief(kind)}; "
                          f"expected default, {', '.join(SCALINGS)}")
    scaling = None if kind == "default" else _read_scaling(inner, kind, context, original)
    if isinstance(scaling, Proportional):
        turned = 1.0
    elif whole:
        inner.must("partial_rotary_factor", 1.0)
    else:
        turned = inner.number("partial_rotary_factor", turned)
    inner.close((ORIGINAL,) if original else ())         # transformers copies it inside whatever the type is
    return Rope(theta, fraction=turned, scaling=scaling)


def _read_scaling(inner: Reader, kind: str, context: int, original: int | None) -> Scaling:
    cls, keys = SCALINGS[kind]
    values: dict[str, Any] = {}
    for field, key in keys.items():
        if field == "original":
            values[field] = inner.must(key, original) if original else inner.size(key, context)
        elif field == "truncate":
            values[field] = inner.flag(key, True)
        elif field in ("short", "long"):
            values[field] = _numbers(inner, key)
        elif field in ("factor", "low", "high"):
            values[field] = inner.number(key)
        elif field == "share":
            values[field] = inner.number(key, 1.0)
        elif (value := inner.number(key, None)) is not None:     # beta_fast, beta_slow, attention_factor
            values[field] = value
    if cls is DynamicNTK:
        values["original"] = context
    if cls is Yarn and "attention_factor" not in values:
        one, other = (inner.number(key, None, above=-1) for key in ("mscale", "mscale_all_dim"))        # DeepSeek
        if (one is None) != (other is None):
            key = "mscale" if other is None else "mscale_all_dim"
            raise inner.error(key, "mscale and mscale_all_dim together, or neither")
        if one and other:
            values["attention_factor"] = temperature(values["factor"], one) / temperature(values["factor"], other)
    if cls is LongRope:
        factor, original = inner.number("factor", context / values["original"]), values["original"]
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        values.setdefault("attention_factor", grown)
    return cls(**values)


def temperature(factor: float, mscale: float) -> float:
    """YaRN's, as DeepSeek has it: 0.1 m ln(s) + 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _numbers(inner: Reader, key: str) -> tuple[float, ...]:
    value = inner.get(key)
    if not isinstance(value, list) or not all(map(is_number, value)):
        raise inner.error(key, "a list of finite numbers above 0")
    return tuple(map(float, value))


def write_rope(rope: Rope) -> dict[str, Any]:
    """Both dialects, with the same meaning."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    for kind, (cls, keys) in SCALINGS.items():
        if type(rope.scaling) is cls:
            fields = {key: getattr(rope.scaling, field) for field, key in keys.items()}
            given = {key: list(value) if isinstance(value, tuple) else value
                     for key, value in fields.items() if value is not None}
            scaling = {"rope_type": kind, **given}
    old = {"type": scaling["rope_type"], **scaling} if rope.scaling else None
    part = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    new = {"rope_theta": rope.theta, **part, **scaling}
    return {"rope_theta": rope.theta, **part, "rope_scaling": old, "rope_parameters": new}
