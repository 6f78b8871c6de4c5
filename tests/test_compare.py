"""python -m checkpoints.compare: equal models are found equal, and of one that is broken in one place that place is
named.

Each mutant is made by hand in the files, or in transformers' model, and the report has to name the block and the
part. That the parts of equal models are found equal, in every family, is what makes a named part mean something.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import compare, tracing
from checkpoints.between import fields, weights
from checkpoints.compare import Report, compare_folders, random_tokens, run_both, transformers_side
from checkpoints.convert import convert, plan
from checkpoints.source import open_source
from checkpoints.storage import stream
from checkpoints.tracing import Gap, gap, look_inside, outline, parts_of, side
from nanollm.errors import CheckpointError, ConfigError, InputError, NanollmError
from tests.fixtures import FIXTURES
from tests.meta_folders import write_meta, write_mistral
from tests.oracles import difference, tokens, write
from tests.test_inspect import MISTRAL, PARAMS

NO_CLASS = {
    "yi-early", "aquila-7b", "aquila-34b-16k", "xverse", "phi-3-mini-128k", "falcon-7b", "falcon-40b-first",
    "falcon-rw-6-heads", "mamba-original", "mamba2-130m", "mimo-v2-flash",
}                       # transformers has none of that model_type, or wants another dialect
# takes the short list of LongRoPE at lengths that are for the long one; passes over the base of the rotation; divides
# by a window that is null
WRONG = {"phi-3.5-moe", "dbrx-132b", "exaone-4-1.2b"}
# adds the bias of the last layer's output projection outside that module: its logits are ours, that part of it is not
OUTSIDE = {"gpt-neox-japanese-2.7b"}
LEFT_OUT = NO_CLASS | WRONG | OUTSIDE
NATIVE = {name: fixture for name, fixture in FIXTURES.items() if fixture.oracle == "native" and name not in LEFT_OUT}
FIRST = {
    "llama-3", "phi-3-mini-4k", "gpt2", "mixtral-8x7b", "bloom-7b1", "mamba-130m", "rwkv-4",
}  # of the quick half: packed q k v, names
# without their prefix, experts under other names, a residual that is handed on, scans, a norm in block 0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama-3", "phi-3-mini-4k", "mixtral-8x7b", "qwen3-0.6b", "mistral-v0.1"):
        write(FIXTURES[name], folder / name)
    return folder


def mutant(original: Path, folder: Path, change=None, **config) -> Path:
    """A copy of a folder, with tensors changed in place, and config keys replaced."""
    shutil.copytree(original, folder)
    if change is not None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(
            {name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors",
            {"format": "pt"},
        )
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def against_transformers(ours: Path, theirs: Path, bound: float = 1e-5, dtype: torch.dtype = torch.float32) -> Report:
    """Our model of one folder with transformers' of another."""
    source = open_source(ours)
    blocks = outline(source.steps, len(source.config.layers))
    parts = {block.ours[0]: parts_of(source.steps, block) for block in blocks if block.ours[0].startswith("layers.")}
    x = random_tokens(source.config.vocab, 2, 48, 0)
    return run_both(side(source.fill(dtype)), transformers_side(theirs, dtype)[0], blocks, parts, x, bound)


def ran(monkeypatch, capsys, *args: object) -> tuple[int, str]:
    """Exit code, and what was printed."""
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, args)])
    try:
        compare.run()
        return 0, capsys.readouterr().out
    except SystemExit as end:
        return end.code, capsys.readouterr().out


# ---- equal models

def names_that_run(name: str):
    return pytest.param(name, marks=() if name in FIRST else pytest.mark.slow)


@pytest.mark.parametrize("name", [names_that_run(name) for name in NATIVE])
def test_every_block_and_every_part_of_equal_models_is_equal(name, tmp_path):
    fixture = NATIVE[name]
    write(fixture, tmp_path)
    source, theirs = open_source(tmp_path), transformers_side(tmp_path, torch.float32)[0]
    ours, x, blocks = (
        side(source.fill(torch.float32)), tokens(fixture), outline(source.steps, len(source.config.layers)),
    )
    depths = dict(tracing.by_depth(ours, theirs, blocks, x))
    layers = [f"layers.{i}" for i in range(len(source.config.layers))]
    assert [*depths] == ["embedding", *layers, *(["norm"] if ours.model.norm.state_dict() else []), "logits"]
    assert all(found.within(fixture.bound) for found in depths.values())
    with torch.inference_mode():
        assert depths["logits"].relative == pytest.approx(difference(ours.run(x), theirs.run(x)), rel=1e-6)
    for block in blocks:
        if block.ours[0] in layers:
            inside = look_inside(ours, theirs, parts_of(source.steps, block), x)
            assert len(inside.lines) >= 4 and all(
                line.read.within(1e-5) and line.gave.within(1e-5) for line in inside.lines
            )


def test_the_parts_that_are_compared(written, tmp_path):
    """What is packed is taken apart; what has another name in memory is passed over, and that is said."""
    for name, extra, skipped in (
        ("llama-3", [], []), ("phi-3-mini-4k", [], []), ("qwen3-0.6b", ["mixer.q_norm", "mixer.k_norm"], []),
        (
            "mixtral-8x7b", [],
            [
                "ffn.router: no model.layers.1.block_sparse_moe.gate there",
                "ffn: no model.layers.1.block_sparse_moe there",
            ],
        ),
    ):
        source = open_source(written / name)
        block = outline(source.steps, 3)[1]
        sides = side(source.fill(torch.float32)), transformers_side(written / name, torch.float32)[0]
        inside = look_inside(*sides, parts_of(source.steps, block), random_tokens(131, 2, 48, 0))
        names = [line.name.removeprefix("layers.1.") for line in inside.lines]
        ffn = [] if skipped else ["ffn.gate", "ffn.up", "ffn.down", "ffn"]
        assert sorted(names) == sorted(
            ["pre_mixer", "mixer.q", "mixer.k", "mixer.v", "mixer.o", "mixer", "pre_ffn", *ffn, *extra]
        )
        assert [reason.replace("layers.1.", "", 1) for reason in inside.skipped] == skipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_have_a_bound_of_their_own(written, dtype):
    found = against_transformers(written / "llama-3", written / "llama-3", compare.BOUNDS[dtype], dtype)
    assert found.same and found.lines[-1].startswith("equal within 0.05")


# ---- one thing broken at a time

def flipped(name: str):
    def change(found):
        found[name] = found[name].flip(0)
    return change


def stretched(name: str):
    def change(found):
        found[name][3] *= 1.5
    return change


def scaled_rows(name: str, first: int, last: int):
    def change(found):
        found[name][first:last] *= 1.01
    return change


L = "model.layers.{}.{}.weight"
MUTANTS = {  # fixture, what is broken in the files, config keys → the block and the part
    "q permuted": ("llama-3", flipped(L.format(1, "self_attn.q_proj")), {}, "layers.1", "mixer.q"),
    "k permuted": ("llama-3", flipped(L.format(0, "self_attn.k_proj")), {}, "layers.0", "mixer.k"),
    "v permuted": ("llama-3", flipped(L.format(2, "self_attn.v_proj")), {}, "layers.2", "mixer.v"),
    "o permuted": ("llama-3", flipped(L.format(2, "self_attn.o_proj")), {}, "layers.2", "mixer.o"),
    "gate": ("llama-3", scaled_rows(L.format(1, "mlp.gate_proj"), 0, 96), {}, "layers.1", "ffn.gate"),
    "up": ("llama-3", scaled_rows(L.format(1, "mlp.up_proj"), 4, 5), {}, "layers.1", "ffn.up"),
    "down": ("llama-3", flipped(L.format(1, "mlp.down_proj")), {}, "layers.1", "ffn.down"),
    "a gain of the second norm": (
        "llama-3", stretched(L.format(2, "post_attention_layernorm")), {}, "layers.2", "pre_ffn",
    ),
    "a gain of the first norm": ("llama-3", stretched(L.format(1, "input_layernorm")), {}, "layers.1", "pre_mixer"),
    "a gain of the last norm": ("llama-3", stretched("model.norm.weight"), {}, "norm", None),
    "the head": ("llama-3", flipped("lm_head.weight"), {}, "logits", None),
    "the embedding": ("llama-3", flipped("model.embed_tokens.weight"), {}, "embedding", None),
    "theta": (
        "llama-3", None, {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}, "layers.0", "mixer.o",
    ),
    "scaled rope": (
        "llama-3", None, {"rope_parameters": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.0}},
        "layers.0", "mixer.o",
    ),
    "eps": ("llama-3", None, {"rms_norm_eps": 1e-6}, "layers.0", "pre_mixer"),
    "the activation": ("llama-3", None, {"hidden_act": "gelu"}, "layers.0", "ffn.down"),
    "the window": ("mistral-v0.1", None, {"sliding_window": 12}, "layers.0", "mixer.o"),
    "a gain of q's norm": ("qwen3-0.6b", stretched(L.format(1, "self_attn.q_norm")), {}, "layers.1", "mixer.q_norm"),
    "v, packed with q and k": (
        "phi-3-mini-4k", scaled_rows(L.format(1, "self_attn.qkv_proj"), 96, 128), {}, "layers.1", "mixer.k, mixer.v",
    ),
    "up, packed with gate": (
        "phi-3-mini-4k", scaled_rows(L.format(2, "mlp.gate_up_proj"), 96, 192), {}, "layers.2", "ffn.up",
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
@pytest.mark.parametrize("other", ["transformers", "nanollm"])
def test_what_is_broken_is_named(what, other, written, tmp_path):
    name, change, config, block, part = MUTANTS[what]
    broken = mutant(written / name, tmp_path / "broken", change, **config)
    if other == "transformers":
        found = against_transformers(broken, written / name)
    else:
        found = both_in_our_decoder(broken, written / name)
    assert not found.same
    ending = found.lines[-1]
    if part is None:
        assert ending.startswith(f"different from {block} on, which is ")
    else:
        assert any(ending.startswith(f"different from {block} on, at {one}: ") for one in part.split(", "))
        marked = [line for line in found.lines if line.endswith("←")]
        assert len(marked) == 1 and marked[0].split()[0] in part
    first = next(line for line in found.lines if "the first above 1e-05" in line)
    assert first.split()[0] == block


def both_in_our_decoder(a: Path, b: Path) -> Report:
    class Args:
        batch, tokens, seed, dtype, plot = 2, 48, 0, "float32", None
    return compare.in_our_decoder(open_source(a), open_source(b), Args, torch.float32, 1e-5)


def test_what_the_verdict_means(written, tmp_path):
    for what, meaning in (
        ("theta", "all that ran before it agrees; between them is attention itself: rotation, mask, scale"),
        ("eps", "its gain, its bias or its ε"), ("q permuted", "its weights, or the order of their rows"),
        ("the activation", "between them is the activation"),
    ):
        name, change, config, _, _ = MUTANTS[what]
        assert (
            meaning
            in against_transformers(mutant(written / name, tmp_path / what, change, **config), written / name).lines[-1]
        )


def test_a_cause_among_what_cannot_be_compared_is_not_guessed(written, tmp_path):
    broken = mutant(
        written / "mixtral-8x7b", tmp_path / "broken", flipped("model.layers.1.block_sparse_moe.experts.2.w2.weight")
    )
    found = against_transformers(broken, written / "mixtral-8x7b")
    assert found.lines[-1].startswith(
        "different from layers.1 on: no part that was compared differs"
    ) and "not compared: ffn: no " in "\n".join(found.lines)
    assert (
        "at ffn.experts: it reads the same and gives something else: its weights"
        in both_in_our_decoder(broken, written / "mixtral-8x7b").lines[-1]
    )


# ---- two folders

def test_the_same_weights_in_other_layouts_are_equal(written, tmp_path, monkeypatch, capsys):
    theirs = write(FIXTURES["llama-3"], tmp_path / "hf")
    write_meta(theirs, tmp_path / "meta", PARAMS)
    write_mistral(write(FIXTURES["mistral-v0.1"], tmp_path / "hf2"), tmp_path / "mistral", MISTRAL)
    convert(plan(open_source(tmp_path / "hf2"), "nanollm"), tmp_path / "own")
    for a, b in (("hf", "meta"), ("meta", "hf"), ("mistral", "own"), ("own", "hf2"), ("hf2", "mistral")):
        code, out = ran(monkeypatch, capsys, tmp_path / a, tmp_path / b, "--run", "--allow-pickle")
        assert code == 0 and "weights: 30 of 30 parameters are equal" in out, out
        assert "(no logit depends on it)" in out or "configs: no differences" in out
        inside = look_in_layer(tmp_path / a, tmp_path / b)  # also where the rows of q and k stand in another order
        assert all(line.gave.within(1e-5) for line in inside.lines) and not inside.skipped and len(inside.lines) == 11


def look_in_layer(a: Path, b: Path) -> tracing.Inside:
    sources = [open_source(one, allow_pickle=True) for one in (a, b)]
    parts = compare.between.same_names(*sources)[1]["layers.1"]
    return look_inside(*(side(source.fill(torch.float32)) for source in sources), parts, random_tokens(131, 2, 48, 0))


def test_differences_of_configs_are_listed_by_field(written, tmp_path):
    a = open_source(written / "llama-3").config
    b = open_source(
        mutant(
            written / "llama-3", tmp_path / "b", rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=64,
        )
    ).config
    found = {one.name: (one.a, one.b, one.counts) for one in fields(a, b)}
    assert found == {
        "layers.{0..2}.pre_mixer.eps": ("0.01", "1e-06", True), "layers.{0..2}.pre_ffn.eps": ("0.01", "1e-06", True),
        "final_norm.eps": ("0.01", "1e-06", True), "layers.{0..2}.mixer.rope.theta": ("500000.0", "10000.0", True),
        "layers.{0..2}.mixer.rope.scaling": ("None", "Linear(factor=2)", True), "context": ("128", "64", False),
    }
    assert not fields(a, a)
    other = open_source(written / "mixtral-8x7b").config
    assert {one.name for one in fields(a, other)} >= {"layers.{0..2}.ffn", "layers.{0..2}.mixer.rope.theta"}


def test_differences_of_weights_are_those_of_numpy(written, tmp_path):
    def change(found):
        found["model.layers.1.mlp.up_proj.weight"][7, 5] += 0.5
        found["model.layers.2.mlp.up_proj.weight"][7, 5] += 0.125
        found["model.norm.weight"] = found["model.norm.weight"].bfloat16()
        found["lm_head.weight"] = found["lm_head.weight"].half()
    b = mutant(written / "llama-3", tmp_path / "b", change)
    found = {one.name: one for one in weights(open_source(written / "llama-3"), open_source(b))}
    numbers = (
        {name: tensor.float().numpy() for name, tensor in load_file(written / "llama-3" / "model.safetensors").items()},
        {name: tensor.float().numpy() for name, tensor in load_file(b / "model.safetensors").items()},
    )
    for name, theirs in (
        ("layers.1.ffn.up.weight", "model.layers.1.mlp.up_proj.weight"), ("norm.gain", "model.norm.weight"),
        ("head.weight", "lm_head.weight"),
    ):
        x, y = (side[theirs] for side in numbers)
        largest = np.abs(x - y).max()
        assert found[name].gap == pytest.approx((largest, largest / (y.max() - y.min())), rel=1e-6)
    assert found["norm.gain"].how == "equal as bfloat16" and found["head.weight"].how == "equal as float16"
    assert {
        one.how
        for name, one in found.items()
        if name not in ("layers.1.ffn.up.weight", "layers.2.ffn.up.weight", "norm.gain", "head.weight")
    } == {"equal"}
    report = compare_folders(open_source(written / "llama-3"), open_source(b), 1e-5)
    rows = [line for line in report.lines if line.startswith("  ")]
    assert rows[1].split()[:5] == ["layers.{0..2}.ffn.up.weight", "1", "equal,", "2", "different"] and rows[1].endswith(
        "worst in layers.1.ffn.up.weight"
    )
    assert (
        not report.same
        and report.lines[-1] == "different: 0 fields of the config, 2 of 30 parameters by more than 1e-05"
    )


def test_packed_weights_are_compared_part_by_part(written, tmp_path):
    """One folder has q k v in one tensor, the other apart: the same model as a Phi-3 and in our own layout, with
    k changed."""
    convert(plan(open_source(written / "phi-3-mini-4k"), "nanollm"), tmp_path / "own")
    found = load_file(tmp_path / "own" / "model.safetensors")
    found["layers.1.mixer.k.weight"][0, 0] += 1
    save_file(found, tmp_path / "own" / "model.safetensors", {"format": "pt"})
    for a, b in ((written / "phi-3-mini-4k", tmp_path / "own"), (tmp_path / "own", written / "phi-3-mini-4k")):
        assert [one.name for one in weights(open_source(a), open_source(b)) if not one.same] == [
            "layers.1.mixer.k.weight"
        ]


def test_what_only_one_has_and_what_has_another_shape(written, tmp_path):
    def shorter(found):
        for name in [name for name in found if name.startswith("model.layers.2.")]:
            del found[name]
        found["lm_head.weight"] = found["lm_head.weight"][:100]
        found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"][:100]
    b = mutant(written / "llama-3", tmp_path / "b", shorter, num_hidden_layers=2, vocab_size=100)
    sources = open_source(written / "llama-3"), open_source(b)
    found = {one.name: one.how for one in weights(*sources)}
    assert (
        found["layers.2.mixer.q.weight"] == "only in the first"
        and found["embed.weight"] == "131×64 and 100×64"
        and found["norm.gain"] == "equal"
    )
    assert {one.how for one in weights(*sources[::-1]) if one.name.startswith("layers.2.")} == {"only in the second"}
    text = "\n".join(compare_folders(*sources, 1e-5).lines)
    assert "layers 3 of them ≠ 2 of them" in " ".join(text.split())
    assert "1 131×64 and 100×64" in text and "–" in text
    with pytest.raises(ConfigError, match="vocab is 100, and 131 in"):
        both_in_our_decoder(written / "llama-3", b)


def test_one_rule_at_a_time(written, monkeypatch):
    """The first weight is told when nothing but its rule has been read, on either side."""
    read = []
    load_step = stream.load_step
    monkeypatch.setattr(stream, "load_step", lambda step, *more: read.append(step) or load_step(step, *more))
    found = weights(open_source(written / "llama-3"), open_source(written / "llama-3"))
    for count in (2, 4, 6):
        next(found)
        assert len(read) == count


# ---- numbers

@pytest.mark.parametrize("a, b, expected", [
    ([1.0, 2.0, 3.0], [1.0, 2.5, 3.0], (0.5, 0.25)),
    ([1.0, 1.0], [1.0, 1.0], (0.0, 0.0)),
    ([1.0, 2.0], [1.0, 1.0], (1.0, math.inf)),
    ([-3.0, 0.0], [-4.0, 4.0], (4.0, 0.5)),
])
def test_gap(a, b, expected):
    assert gap(torch.tensor(a), torch.tensor(b)) == expected


def test_a_nan_is_never_within_a_bound():
    for a, b in (
        ([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.0], [math.nan, 2.0]), ([math.inf, 1.0], [1.0, 2.0]),
        ([1.0, 2.0], [math.inf, 2.0]),
    ):
        assert not gap(torch.tensor(a), torch.tensor(b)).within(1e9)


def test_a_gap_of_many_runs_is_that_of_one(monkeypatch):
    a, b = torch.randn(7, 33), torch.randn(7, 33)
    whole = gap(a, b)
    monkeypatch.setattr(stream, "RUN", 10)
    assert (
        gap(a, b)
        == whole
        == Gap((a - b).abs().max().item(), (a - b).abs().max().item() / (b.max().item() - b.min().item()))
    )


# ---- the command

def test_the_command(written, tmp_path, monkeypatch, capsys):
    code, out = ran(monkeypatch, capsys, written / "llama-3", "--plot", tmp_path / "depth.png")
    assert (
        code == 0 and "(llama, hf) and transformers 5." in out and out.splitlines()[-1].startswith("equal within 1e-05")
    )
    assert (tmp_path / "depth.png").read_bytes()[:4] == b"\x89PNG"
    code, out = ran(
        monkeypatch, capsys, written / "llama-3", "--dtype", "bfloat16", "--tokens", 7, "--batch", 1, "--seed", 3,
        "--bound", 0.5,
    )
    assert code == 0 and "1 × 7 tokens, bfloat16" in out and "equal within 0.5" in out
    broken = mutant(written / "llama-3", tmp_path / "broken", flipped(L.format(1, "self_attn.q_proj")))
    code, out = ran(monkeypatch, capsys, broken, written / "llama-3")
    assert code == 1 and "both in our decoder" not in out
    code, out = ran(monkeypatch, capsys, broken, written / "llama-3", "--run", "--plot", tmp_path / "both.png")
    assert code == 1 and "different from layers.1 on, at mixer.q" in out and (tmp_path / "both.png").exists()


def test_a_change_of_transformers_is_found_by_the_command(written, monkeypatch, capsys):
    """The folder is the same for both: the mutant is their model in memory."""
    original = compare.transformers_side

    def broken(folder, dtype):
        theirs, version, notes = original(folder, dtype)
        theirs.model.model.layers[2].post_attention_layernorm.variance_epsilon = 1e-5
        return theirs, version, notes
    monkeypatch.setattr(compare, "transformers_side", broken)
    code, out = ran(monkeypatch, capsys, written / "llama-3")
    said = "at pre_ffn: it reads the same and gives something else: its gain, its bias or its ε"
    assert code == 1 and said in out


def test_what_cannot_be_compared_is_said(written, tmp_path, monkeypatch, capsys):
    convert(plan(open_source(written / "llama-3"), "nanollm"), tmp_path / "own")
    with pytest.raises(CheckpointError, match="own: transformers does not read it: .*Give a second folder"):
        ran(monkeypatch, capsys, tmp_path / "own")
    assert ran(monkeypatch, capsys, written / "llama-3", "--tokens", 0)[0] == 2      # argparse names the bounds
    with pytest.raises(InputError, match="--plot draws models that run: add --run"):
        ran(monkeypatch, capsys, written / "llama-3", written / "llama-3", "--plot", "x.png")
    with pytest.raises(NanollmError, match="no such folder"):
        ran(monkeypatch, capsys, tmp_path / "no" / "where")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="--plot needs matplotlib"):
        ran(monkeypatch, capsys, written / "llama-3", "--plot", tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[test\]"'):
        ran(monkeypatch, capsys, written / "llama-3")


def test_tensors_that_transformers_draws_at_random_are_noted(written, tmp_path):
    broken = mutant(written / "llama-3", tmp_path / "broken", lambda found: found.pop("lm_head.weight"))
    _, _, notes = transformers_side(broken, torch.float32)
    assert notes == ["transformers found no lm_head.weight (1 such), and has drawn it at random"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NO_CLASS))
def test_what_transformers_does_not_read_is_said(name, tmp_path):
    write(FIXTURES[name], tmp_path)
    with pytest.raises(CheckpointError, match="transformers does not read it"):
        transformers_side(tmp_path, torch.float32)
