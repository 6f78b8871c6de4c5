"""Ops are inverses; tables are one-to-one; a plan lists everything that is wrong at once."""

import random
from pathlib import Path

import pytest
import torch

from checkpoints.families import FAMILIES
from checkpoints.names.ops import Blocks, Groups, Halving, Interleaving, Same, Stack, Transposed
from checkpoints.names.table import check, either, expand, moved, override, rule, under
from checkpoints.storage.files import Stored
from nanollm.config import MLP, Attention, Layer, ModelConfig
from nanollm.errors import CheckpointError
from tests.arranged import fill, stored_tensors

LAYER = Layer(Attention(heads=6, kv_heads=3, head_dim=2), MLP(4))


def shapes_for(op, rng: random.Random) -> list[tuple[int, ...]]:
    """Shapes that our side of an op may have."""
    def size():
        return rng.randint(1, 7)
    op = getattr(op, "op", op)
    if op in (Interleaving, Halving):
        return [(2 * size(), *(size() for _ in range(rng.randint(0, 1))))]
    if op in (Blocks, Groups):
        rest = tuple(size() for _ in range(rng.randint(0, 1)))
        return [(rows, *rest) for rows in ((12, 6, 6) if op is Groups else (size(), size(), size()))]
    return [(size(), size(), size())] if op is Stack else [tuple(size() for _ in range(rng.randint(1, 3)))]


@pytest.mark.parametrize(
    "op", [Same, Stack, Blocks, Groups, Interleaving, Halving, Transposed(Same), Transposed(Blocks)],
    ids="same stack blocks groups interleaving halving transposed transposed-blocks".split(),
)
@pytest.mark.parametrize("seed", range(20))
def test_ops_are_inverses(op, seed):
    rng, dtype = random.Random(seed), [torch.float32, torch.bfloat16][seed % 2]
    ours = [torch.randn(shape).to(dtype) for shape in shapes_for(op, rng)]
    stored = stored_tensors(op, ours, LAYER)

    again = [torch.full_like(tensor, torch.nan) for tensor in ours]
    fill(op, stored, again, LAYER)                                                      # load ∘ save = 1 …
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(stored, stored_tensors(op, again, LAYER), strict=True)
    )  # … and save ∘ load = 1

    meta = op.shapes([tensor.to("meta") for tensor in ours], LAYER)                      # the plan says what is written
    assert meta == [tuple(one.shape) for one in stored]


def test_under_puts_both_prefixes_before_each_pair():
    pairs = {"q_proj": "q", "experts.{e}.w": "experts.up"}
    assert under("h.{i}", "layers.{i}", pairs, Stack) == [
        rule("h.{i}.q_proj", "layers.{i}.q", Stack), rule("h.{i}.experts.{e}.w", "layers.{i}.experts.up", Stack),
    ]
    assert under("", "", {"wte": "embed"}) == [rule("wte", "embed")]
    assert under("transformer", "", {"ln_f": "norm"}) == [rule("transformer.ln_f", "norm")]


def test_pieces_are_views():
    """Nothing of ours is held twice while it is written."""
    ours = [torch.zeros(12, 2), torch.zeros(6, 2), torch.zeros(6, 2)]
    memory = {tensor.untyped_storage().data_ptr() for tensor in ours}
    for op in (Same, Stack, Blocks, Groups, Interleaving, Halving, Transposed(Blocks)):
        for _, piece in op.pieces(ours, LAYER):
            assert all(view.untyped_storage().data_ptr() in memory for view in getattr(piece, "views", [piece]))


def test_orders_within_a_head():
    """The drawing in ops.py, for two heads of four channels; and one undoes the other."""
    layer = Layer(Attention(heads=2, kv_heads=2, head_dim=4), MLP(4))
    rows = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    pairs, halves = (stored_tensors(op, [rows], layer)[0] for op in (Interleaving, Halving))
    assert pairs[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7] and halves[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    layer = Layer(Attention(heads=1, kv_heads=1, head_dim=6), MLP(4))
    pairs = stored_tensors(Interleaving, [torch.arange(6.0)], layer)[0]
    assert pairs.tolist() == [0, 3, 1, 4, 2, 5] and stored_tensors(Halving, [pairs], layer)[0].tolist() == [
        0, 1, 2, 3, 4, 5,
    ]


def test_a_table_is_one_to_one():
    base = override({}, rule("a", "x"), rule("b", "y"))
    assert override(base, rule("c", "y"))["y"].theirs == ("c",)
    with pytest.raises(AssertionError, match="named twice"):
        override(base, rule("a", "z"))
    fused = override({}, rule("qkv", ["q", "k", "v"]))
    with pytest.raises(AssertionError, match="in part"):
        override(fused, rule("q_proj", "q"))


def test_one_stored_name_may_be_either_of_two_parameters_but_is_said_so():
    both = [rule("layers.{i}.norm", f"layers.{{i}}.{ours}") for ours in ("pre_mixer", "pre_ffn")]
    with pytest.raises(AssertionError, match="named twice: .*layers"):
        override({}, *both)
    table = override({}, *either("layers.{i}.norm", "layers.{i}.pre_mixer", "layers.{i}.pre_ffn"))
    assert table.keys() == {"layers.{i}.pre_mixer", "layers.{i}.pre_ffn"}
    assert moved(table, "layers.", "model.layers.")["layers.{i}.pre_ffn"].theirs == ("model.layers.{i}.norm",)
    with pytest.raises(AssertionError, match="named twice"):
        override(table, rule("layers.{i}.norm", "layers.{i}.post_ffn"))


@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES.values()), ids=lambda family: family.name)
def test_family_tables_name_nothing_twice(family):
    for table in family.names:
        theirs = [name for each in dict.fromkeys(table.values()) for name in each.theirs if not each.either]
        assert len(theirs) == len(set(theirs)) and {"embed", "head"} <= table.keys()
        assert all(("{i}" in name) == ("{i}" in each.theirs[0]) for name, each in table.items())


TABLE = override(
    {},
    rule("emb", "embed"),
    rule("h.{i}.ln", "layers.{i}.pre_mixer"),
    rule("h.{i}.fc", "layers.{i}.mixer.q"),
    rule("h.{i}.moe.{e}.w.weight", "layers.{i}.ffn.experts.gate", Stack),
)


def meta(**shapes):
    return {name.replace("__", "."): torch.empty(shape, device="meta") for name, shape in shapes.items()}


def stored(names: dict[str, tuple], dtype=torch.float32) -> dict[str, Stored]:
    return {name: Stored(Path("x"), dtype, shape, 0, 0) for name, shape in names.items()}


CONFIG = ModelConfig(5, 3, (LAYER,) * 12)
PARAMETERS = meta(
    embed__weight=(5, 3), layers__0__pre_mixer__gain=(3,), layers__0__mixer__q__weight=(4, 3),
    layers__0__mixer__q__bias=(4,),
    layers__11__ffn__experts__gate=(2, 6, 3),
)
ON_DISK = {
    "emb.weight": (5, 3), "h.0.ln.weight": (3,), "h.0.fc.weight": (4, 3), "h.0.fc.bias": (4,),
    "h.11.moe.0.w.weight": (6, 3), "h.11.moe.1.w.weight": (6, 3),
}


def test_weight_and_bias_follow_their_module():
    steps = expand(TABLE, PARAMETERS, CONFIG)
    assert {theirs for step in steps for theirs in step.theirs} == set(ON_DISK)
    check(steps, PARAMETERS, stored(ON_DISK))


def test_a_parameter_without_a_name_is_refused():
    with pytest.raises(CheckpointError, match="1 parameters.*no name for(.|\n)*layers.0.mixer.sink"):
        expand(TABLE, PARAMETERS | meta(layers__0__mixer__sink=(3,)), CONFIG)


def test_every_discrepancy_is_in_one_error():
    disk = stored(
        {**ON_DISK, "h.0.fc.weight": (3, 4), "extra": (1,), "h.0.attn.bias": (1,), "h.5.attn.bias": (1,), "known": (2,)}
    )
    del disk["emb.weight"]
    disk |= stored({"h.0.ln.weight": (3,)}, torch.int8)
    with pytest.raises(CheckpointError) as error:
        check(expand(TABLE, PARAMETERS, CONFIG), PARAMETERS, disk, ["h.{i}.attn.bias"], ["known"])
    text = str(error.value)
    for line in (
        "1 missing", "emb.weight", "1 unexpected", "extra", "h.0.fc.weight: (3, 4) stored, (4, 3)",
        "h.0.ln.weight: int8",
    ):
        assert line in text, line
    assert "attn.bias" not in text and "known" not in text


def test_long_lists_are_counted_and_cut():
    with pytest.raises(CheckpointError) as error:
        check(
            expand(TABLE, PARAMETERS, CONFIG), PARAMETERS, stored(ON_DISK | {f"extra.{n}": (1,) for n in range(1000)})
        )
    assert "1000 unexpected" in str(error.value) and "988 more" in str(error.value) and len(str(error.value)) < 1000
