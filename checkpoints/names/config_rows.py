"""Rows of config_table.py in which several keys or fields are one thing.

    how many layers, and of which parts    LayerCount, Kinds; layer_kinds.py
    heads                                  Heads, HeadDim, DividingHeads
    positions                              RopeKeys; Windows, Periodic, OneWindow
    how wide a scan is                     Expand, Rank
    an object inside config.json           Inside

and at the end a few meanings and checks that several families share.
"""

import math
from collections.abc import Callable
from typing import Any

from checkpoints.names.config_table import ABSENT, Draft, Key, Keys, Part, Row, one_name
from checkpoints.names.reader import IRRELEVANT, Reader
from checkpoints.names.rope import read_rope, write_rope
from nanollm.config import Rope
from nanollm.errors import ConfigError

ReadKinds = Callable[[Reader, int], list[str]]
WriteKinds = Callable[[list[str]], dict[str, Any]]
FULL, SLIDING = "full_attention", "sliding_attention"


class LayerCount(Row):
    """How many layers there are. It stands first of the rows that decide about parts."""
    shapes = True

    def __init__(self, also: tuple[str, ...] = ()) -> None:
        self.also = also

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        number = r.count(one_name(r, key, *self.also))
        draft.layers = [draft.layers[0].copy() for _ in range(number)]

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: len(draft.layers)}

    def says(self) -> str:
        return "layers"


class Kinds(Row):
    """Which of several parts stands in a slot of each layer: attention or a scan, an MLP or experts.

    parts          a name for each kind → the part
    read_kinds     (Reader, number of layers) → the name of each layer's kind
    write_kinds    names → the keys that say so
    """
    shapes = True

    def __init__(
        self, slot: str, parts: dict[str, Part], read_kinds: ReadKinds, write_kinds: WriteKinds
    ) -> None:
        self.slot, self.parts, self.read_kinds, self.write_kinds = slot, parts, read_kinds, write_kinds

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        for layer, kind in zip(draft.layers, self.read_kinds(r, len(draft.layers)), strict=True):
            layer.set(self.slot, self.parts[kind])

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        names = {each.kind: name for name, each in self.parts.items()}
        return self.write_kinds([names[layer.get(self.slot).kind] for layer in draft.layers])

    def kinds_in(self, slot: str) -> list[type] | None:
        """What may stand in a slot of a layer; None: this row does not say."""
        return [each.kind for each in self.parts.values()] if slot == self.slot else None

    def says(self) -> str:
        return f"{self.slot}: {' or '.join(each.kind.__name__ for each in self.parts.values())}"


class Heads(Row):
    """The number of query heads, each dim / heads wide. `alone`: key/value heads have no key, there are as many."""

    def __init__(self, also: tuple[str, ...] = (), alone: bool = True, missing: int | None = None) -> None:
        self.also, self.alone, self.missing = also, alone, missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        key, dim = one_name(r, key, *self.also), draft["dim"]
        heads = r.size(key) if self.missing is None else r.size(key, self.missing)
        if dim % heads:
            raise r.error(key, f"a divisor of the model's width ({dim})")
        draft["mixer.heads"], draft["mixer.head_dim"] = heads, dim // heads
        if self.alone:
            draft["mixer.kv_heads"] = heads

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.heads"]} if "mixer.heads" in draft else {}

    def says(self) -> str:
        return "mixer.heads, mixer.head_dim" + (", mixer.kv_heads" if self.alone else "")


class HeadDim(Row):
    """How wide a head is; null, and a missing key without a default, mean dim / heads."""

    def __init__(self, missing: int | None = None) -> None:
        self.missing = missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        dim, heads = draft["dim"], draft["mixer.heads"]
        width = r.size(key, self.missing, or_null=True)
        if width is None and dim % heads:
            raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim}) where there is no {key}")
        draft["mixer.head_dim"] = width or dim // heads

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.head_dim"]}

    def says(self) -> str:
        return "mixer.head_dim"


class DividingHeads(Key):
    """The number of query heads, whose width is another key's. Even so transformers wants it to divide dim."""

    def __init__(self, **more: Any) -> None:
        super().__init__(Reader.size, "mixer.heads", **more)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        dim, heads = draft["dim"], draft["mixer.heads"]
        if heads is not ABSENT and dim % heads:
            raise ConfigError(f"transformers wants dim ({dim}) to be a multiple of heads ({heads}) here")
        return super().write(draft, key)


class RopeKeys(Row):
    """RoPE in both dialects (names/rope.py): base, part of a head that turns, scaling.

    theta, fraction            the family's base, and its part of a head that turns where their keys are missing;
                               fraction None: there is no such key, and all of the head turns
    theta_key, fraction_key    what the family calls the two at the top level
    path                       of the RoPE in a layer

    A family that says it otherwise has a subclass with its own `rope` or `original`.
    """

    def __init__(
        self, theta: float = 10_000.0, fraction: float | None = None,
        theta_key: str = "rope_theta", fraction_key: str = "partial_rotary_factor", path: str = "mixer.rope",
    ) -> None:
        self.theta, self.fraction, self.path = theta, fraction, path
        self.theta_key, self.fraction_key = theta_key, fraction_key

    def original(self, r: Reader, draft: Draft) -> int | None:
        """The context before a stretch, in families that say it outside the object."""
        return None

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """What config.json says; the layout and the rounding are the family's own."""
        return read_rope(r, self.theta, draft["context"], self.fraction, self.original(r, draft),
                         theta_key=self.theta_key, fraction_key=self.fraction_key)

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Base, part and scaling, into each layer that has RoPE."""
        rope = self.rope(r, draft)
        for general, own, value in (("rope_theta", self.theta_key, rope.theta),
                                    ("partial_rotary_factor", self.fraction_key, rope.fraction)):
            if general != own:
                r.must(general, value, None)     # transformers' name beside the family's own: they must agree
        for name in ("theta", "fraction", "scaling"):
            draft[f"{self.path}.{name}"] = getattr(rope, name)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The keys in both dialects; none where no layer has RoPE."""
        found = next((rope for rope in draft.each(self.path) if isinstance(rope, Part)), None)
        if found is None:
            return {}
        rope: Rope = found.build()
        values = write_rope(rope)
        values[self.theta_key] = values.pop("rope_theta")
        if self.fraction is not None:  # a 1 is written too, since a missing key means `fraction`
            values.pop("partial_rotary_factor", None)
            values[self.fraction_key] = values["rope_parameters"]["partial_rotary_factor"] = rope.fraction
        return values

    def says(self) -> str:
        return f"{self.path}: base {self.theta:g}" + ("" if self.fraction is None else f", part {self.fraction:g}")


class Windows(Row):
    """Which layers have a sliding window: those that `layer_types` names, or else those of the family's pattern.

    default     what a missing `sliding_window` means
    switch      whether the window counts only with `use_sliding_window`
    or_null     whether a null means that no layer has a window
    full        what else is so in the layers without a window: path → value
    """
    shapes = True

    def __init__(
        self, default: int | None = 4096, switch: bool = False, or_null: bool = False,
        full: dict[str, Any] | None = None,
    ) -> None:
        self.default, self.switch, self.or_null, self.full = default, switch, switch or or_null, full or {}

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        """Which layers slide where there is no `layer_types`."""
        raise NotImplementedError

    def pattern_keys(self, slides: list[bool]) -> dict[str, Any]:
        """The keys, if there are any, that say so."""
        return {}

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Give each layer its window or None, by `layer_types`, or else by the family's pattern."""
        number, window = len(draft.layers), r.get("sliding_window", self.default)
        if self.switch and not r.flag("use_sliding_window", False):
            window = None
        elif window is not None or not self.or_null:
            window = r.size("sliding_window", self.default)
        slides, types = self.pattern(r, number), r.get("layer_types", None)
        if types is None:
            types = [SLIDING if window and each else FULL for each in slides]
        known = (FULL, SLIDING) if window else (FULL,)
        if not isinstance(types, list) or len(types) != number or not all(one in known for one in types):
            raise r.error("layer_types", f"{number} times {' or '.join(known)}")
        for layer, kind in zip(draft.layers, types, strict=True):
            layer.set("mixer.window", window if kind == SLIDING else None)
            for path, value in self.full.items() if kind == FULL else ():
                layer.set(path, value)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The window, which layers have it, and the keys of the family's pattern."""
        windows = [None if window is ABSENT else window for window in draft.each("mixer.window")]
        slides = [window is not None for window in windows]
        used = next((window for window in windows if window is not None), None)
        values = {
            "sliding_window": used or (None if self.or_null else self.default),
            "layer_types": [SLIDING if each else FULL for each in slides],
        }
        return values | ({"use_sliding_window": used is not None} if self.switch else {}) | self.pattern_keys(slides)

    def says(self) -> str:
        return "mixer.window"


class Periodic(Windows):
    """All but every n-th layer slide. `key` says n, where there is such a key."""

    def __init__(self, period: int, key: str | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.period, self.key = period, key

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        period = r.size(self.key, self.period) if self.key else self.period
        if r.get("layer_types", None) is None:
            r.must("_sliding_window_pattern", period)  # transformers writes it, and reads layer_types
        return [(i + 1) % period != 0 for i in range(layers)]

    def pattern_keys(self, slides: list[bool]) -> dict[str, Any]:
        return {self.key: [*slides, False].index(False) + 1} if self.key else {}


class OneWindow(Row):
    """A window for all layers or none: `sliding_window`, which counts only with `use_sliding_window`."""

    def __init__(self, default: int = 4096) -> None:
        self.default = default

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        window = r.size("sliding_window", self.default, or_null=True)
        draft["mixer.window"] = window if r.flag("use_sliding_window", False) else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        window = draft["mixer.window"]
        return {"use_sliding_window": window is not None, "sliding_window": window}

    def says(self) -> str:
        return "mixer.window"


class Expand(Row):
    """How many times wider than the model a scan is, or what else stands at `path`: a whole number."""

    def __init__(self, missing: int, path: str = "mixer.inner") -> None:
        self.missing, self.path = missing, path

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        draft[self.path] = r.size(key, self.missing) * draft["dim"]

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: whole_multiple(draft[self.path], draft["dim"])} if self.path in draft else {}


def whole_multiple(inner: int, dim: int) -> int:
    """inner / dim. Raises ConfigError if it is no whole number."""
    if inner % dim:
        raise ConfigError(f"inner width ({inner}) is no multiple of dim ({dim}), as it must be here")
    return inner // dim


class Rank(Key):
    """The rank of a scan's Δ: a number, or "auto" for dim / 16 rounded up."""

    def __init__(self) -> None:
        super().__init__(Reader.size, "mixer.dt_rank", missing=lambda draft: math.ceil(draft["dim"] / 16))

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        if r.get(key, "auto") == "auto":
            draft["mixer.dt_rank"] = self.missing(draft)
        else:
            super().read(r, draft, key)


class Inside(Row):
    """An object with keys of its own; where it is missing, null or empty, all of them are missing."""

    def __init__(self, keys: Keys, irrelevant: frozenset[str] = frozenset()) -> None:
        self.keys, self.irrelevant = keys, irrelevant

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        inner = r.inside(key) or r.of({}, f"{r.prefix}{key}.")
        for name, row in self.keys.items():
            row.read(inner, draft, name)
        inner.close(IRRELEVANT | self.irrelevant)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, row in self.keys.items():
            values |= row.write(draft, name)
        return {key: values}

    def says(self) -> str:
        return "; ".join(f"{name}: {row.says()}" for name, row in self.keys.items())


def four_widths(draft: Draft) -> int:
    """As `missing`: a feed-forward four times as wide as the model."""
    return 4 * draft["dim"]


def even_share(draft: Draft) -> int:
    """As `missing`: how wide a head is where heads share dim, and need not fill it."""
    return draft["dim"] // draft["mixer.heads"]


def whole(r: Reader, key: str, missing: int) -> int:
    """A whole number, 0 included."""
    value = r.get(key, missing)
    if type(value) is not int or value < 0:
        raise r.error(key, "a whole number")
    return value


def roundest(function: Callable[[float], float], wanted: float, near: float) -> float | None:
    """The number with the fewest digits, beside one that is near, for which the function is exactly `wanted`."""
    return next((round(near, digits) for digits in range(18) if function(round(near, digits)) == wanted), None)


def halved(*paths: str, **more: Any) -> Key:
    """An even number, of which a half is ours."""
    def check(r: Reader, key: str) -> int:
        value = r.size(key)
        if value % 2:
            raise r.error(key, "an even number, of which a half is the width")
        return value

    return Key(check, *paths, to=lambda value: value // 2, of=lambda ours: 2 * ours, **more)


def reciprocal(*paths: str, **more: Any) -> Key:
    """A number that divides, where our field multiplies."""
    return Key(Reader.number, *paths, to=lambda value: 1 / value, of=lambda ours: 1 / ours, **more)


def base(*paths: str, **more: Any) -> Key:
    """A finite number above 1: of RoPE's θ."""
    return Key(lambda r, key: r.number(key, above=1), *paths, **more)
