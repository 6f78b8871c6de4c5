"""A plan counts what the code does: FLOPs as torch counts them, activations as a real run holds them, slices as FSDP2
cuts them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from nanollm.config import (
    MLP,
    SCANS,
    WITH_SCAN,
    ChunkedAttention,
    ClippedGLU,
    ExpertGroups,
    LatentExpert,
    Layer,
    Mamba2,
    ModelConfig,
    NarrowValueAttention,
    Norm,
    SharedBlockScan,
)
from nanollm.errors import InputError
from nanollm.layers import MODULES
from nanollm.layers.sparse_attention import SparseLatentAttention
from nanollm.model import Decoder
from nanollm.presets import preset, transformer
from nanollm.training import distributed, optim, plan
from nanollm.training import flops as speed
from nanollm.training.losses import token_loss
from nanollm.training.options import parse
from tests.test_consistency import KINDS, attention, shared

BF16 = torch.bfloat16
LLAMA_8B = 8_030_261_248
SHIFT = Norm("layer", bias=True)


def small(name: str, context: int = 128) -> Decoder:
    return Decoder(preset(name, vocab=300, context=context))


def report(*args: str, preset_name: str = "llama-8b") -> str:
    options = parse("", ["--plan", "--device", "h100", "--preset", preset_name, "--context", "128", *args])
    return plan.report(options, preset(options.preset, options.vocab, options.context))


def figure(text: str, line: str, column: int = 0) -> float:
    """A number of the line of a report that begins so."""
    found, = (row for row in text.splitlines() if row.strip().startswith(line))
    return float(found[60:].split()[column])


# ---- FLOPs

def counted(model: Decoder, context: int) -> FlopCounterMode:
    """What torch counts in a forward and backward pass over one row; attention as the plain products it is made of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, context, dtype=torch.long)).sum().backward()
    return counter


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_flops_are_those_that_torch_counts(name):
    model = small(name)
    assert speed.flops_per_token(model.config, 64) == counted(model, 64).get_total_flops() / 64


def test_a_window_counts_the_keys_inside_it_where_torch_counts_all():
    model = small("mistral")                        # 4 layers, 4 heads 32 wide, a window of 64
    assert speed.flops_per_token(model.config, 64) == counted(model, 64).get_total_flops() / 64
    assert speed.flops_per_token(model.config, 128) == counted(model, 128).get_total_flops() / 128 - 12 * 4 * 4 * 32 * (
        128 - 64
    )


def test_a_scan_counts_its_products_and_what_torch_does_not_count():
    model = small("mamba")                          # 3 layers; width 80, I = 160, N = 4, R = 5, k = 4
    flops = counted(model, 64).get_flop_counts()["Global"]
    products = (flops[torch.ops.aten.mm] + flops[torch.ops.aten.bmm]) / 64
    # of the 8 N operations that a channel takes, torch sees the 2 N of C·h; it sees neither D x (2) nor a
    # convolution in channels (2 k)
    assert speed.flops_per_token(model.config, 64) == products + 3 * 3 * 160 * (6 * 4 + 2 + 2 * 4)


def without_windows(layer: Layer) -> Layer:
    if isinstance(layer.mixer, NarrowValueAttention):
        inner = dataclasses.replace(layer.mixer.attention, window=None)
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, attention=inner))
    wide = 64 if isinstance(layer.mixer, ChunkedAttention) else None        # one chunk
    return (
        dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=wide))
        if getattr(layer.mixer, "window", None)
        else layer
    )


def ranking(layer: Layer, dim: int, context: int) -> int:
    """Multiply-adds of an index of keys: it has no backward pass, which flops_per_token counts all the same."""
    if not getattr(layer.mixer, "indexer", None):
        return 0
    plain = dataclasses.replace(layer.mixer, indexer=None)
    return SparseLatentAttention.multiply_adds(layer.mixer, dim, context) - SparseLatentAttention.multiply_adds(
        plain, dim, context)


@pytest.mark.parametrize("name", KINDS)
def test_flops_of_every_kind_of_layer(name):
    """As torch counts them, where nothing is masked or scanned. A scan takes the products with its weights, and
    more."""
    config = ModelConfig(97, 32, tuple(map(without_windows, KINDS[name])))
    flops = speed.flops_per_token(config, 64)
    if any(isinstance(layer.mixer, (*SCANS, *WITH_SCAN)) for layer in config.layers):
        met = sum(p.numel() for layer in Decoder(config).layers for p in layer.parameters() if p.ndim == 2)
        assert flops > 6 * met and speed.flops_per_token(config, 1) > 6 * met
    else:
        forward_only = sum(ranking(layer, 32, 64) for layer in config.layers)
        assert flops - 4 * forward_only == counted(Decoder(config), 64).get_total_flops() / 64


def test_flops_of_a_shared_block_are_those_that_torch_counts():
    """At each use, though its weights are there once: what layers take beyond their scan."""
    use = SharedBlockScan(shared(0), Mamba2(6, 8, 2, 5, 3), Norm(), 3, 2)
    of_use, of_scan = (Layer(mixer, None, None, pre_ffn=None) for mixer in (use, use.scan))
    with_blocks, scans = (ModelConfig(97, 32, (layer,) * 2) for layer in (of_use, of_scan))
    torchs = [counted(Decoder(config), 64).get_total_flops() / 64 for config in (with_blocks, scans)]
    ours = [speed.flops_per_token(config, 64) for config in (with_blocks, scans)]
    assert ours[0] - ours[1] == torchs[0] - torchs[1]


def test_what_a_plan_shares_out_has_each_block_once():
    config = ModelConfig(97, 32, (Layer(SharedBlockScan(shared(0), Mamba2(6, 8, 2, 5, 3), Norm()), None, None,
                                        pre_ffn=None),) * 3)
    model, mine = Decoder(config), plan.share(config, 1, 1, BF16, "adamw")
    once = sum(p.numel() for p in model.shared.parameters())
    assert mine.parameters == mine.whole == sum(p.numel() for p in model.parameters())
    assert sum(mine.groups) == mine.whole + 2 * once            # gathered at each use


def test_every_mixer_there_is_has_a_kind():
    def parts(value):
        return (
            [value, *(part for field in dataclasses.fields(value) for part in parts(getattr(value, field.name)))]
            if dataclasses.is_dataclass(value)
            else []
        )

    used = {type(part) for layers in KINDS.values() for layer in layers for part in parts(layer)}
    used |= {type(layer.mixer) for layers in KINDS.values() for layer in layers}        # there may be none
    assert used >= {*MODULES, ClippedGLU, ExpertGroups, LatentExpert}


def test_flops_of_the_published_shape_by_hand_and_the_published_mfu():
    flops = speed.flops_per_token(preset("llama-8b"), 8192)
    met = LLAMA_8B - 128256 * 4096 - 65 * 4096      # neither the embedding nor the gains
    assert flops == 6 * met + 12 * 32 * 32 * 128 * 8192
    # torchtitan publishes 6,667 tokens a second and H100 as 39 % MFU
    assert round(6667 * flops / speed.DEVICES["h100"].bfloat16, 2) == 0.39


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40)])
def test_flops_of_msign_are_those_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        optim.msign(torch.randn(shape), torch.float32)
    assert plan.msign_flops(torch.Size(shape)) == counter.get_total_flops()


# ---- activations

def wrapped(model: Decoder, recompute: str) -> Decoder:
    for layer in model.layers:
        layer.forward = distributed.recomputed(layer.forward, recompute)
    return model


@pytest.mark.parametrize("recompute", distributed.RECOMPUTE)
@pytest.mark.parametrize(
    "name, context",
    [
        ("llama", 128), pytest.param("qwen3", 100, marks=pytest.mark.slow), ("mixtral", 128),
        pytest.param("mistral", 64, marks=pytest.mark.slow), pytest.param("mamba", 176, marks=pytest.mark.slow),
    ],
)
def test_activations_are_those_that_a_real_run_holds(name, context, recompute):
    model = wrapped(small(name, context).to(BF16), recompute)
    tokens = torch.randint(300, (2, context))
    with plan.Live() as live:
        loss = token_loss(model.head, model.hidden(tokens), tokens)[0]
        kept = live.now - loss.nbytes
    assert plan.activations(model.config, 2, context, BF16, recompute)[0] == kept + tokens.nbytes


def test_layers_that_read_what_others_make_are_refused():
    with pytest.raises(InputError, match="here layers read keys of other layers"):
        plan.activations(ModelConfig(97, 32, KINDS["keys of a layer before"]), 2, 8, BF16, "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name != "keys of a layer before"])
def test_activations_of_every_kind_of_layer(name):
    model, tokens = Decoder(ModelConfig(97, 32, KINDS[name])).to(BF16), torch.randint(97, (2, 8))
    with plan.Live() as live:
        loss = token_loss(model.head, model.hidden(tokens), tokens)[0]
        kept = live.now - loss.nbytes
    chosen = [layer for layer in KINDS[name] if MODULES[type(layer.mixer)] is SparseLatentAttention]
    masks = (
        8 * 8 * (len({getattr(layer.mixer, "window", None) for layer in KINDS[name]}) + 2 * len(chosen))
    )  # the plan keeps them to the end of the step; a layer that chooses its keys has one of its own
    assert 0 <= plan.activations(model.config, 2, 8, BF16, "none")[0] - (kept + tokens.nbytes) <= masks


@pytest.mark.parametrize(
    "around",
    [
        {"positions": 100}, {"embed_norm": SHIFT},
        {"positions": 100, "embed_norm": SHIFT, "head_bias": True, "tied": True},
    ],
)
def test_activations_of_what_stands_around_the_layers(around):
    config = ModelConfig(97, 32, (Layer(attention(), MLP(48), SHIFT, parallel=True),) * 2, SHIFT, **around)
    model, tokens = wrapped(Decoder(config).to(BF16), "full"), torch.randint(97, (2, 100))
    with plan.Live() as live:
        loss = token_loss(model.head, model.hidden(tokens), tokens)[0]
        kept = live.now - loss.nbytes
    assert plan.activations(model.config, 2, 100, BF16, "full")[0] == kept + tokens.nbytes
    assert plan.share(model.config, 4, 1, BF16, "muon").parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_a_scan_is_followed_from_short_rows_to_long_ones(monkeypatch):
    config = ModelConfig(97, 32, KINDS["griffin"])
    whole = plan.activations(config, 2, 8, BF16, "none")[0]
    monkeypatch.setattr(plan, "SHORT", (2, 4))
    assert plan.activations(config, 2, 8, BF16, "none")[0] == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_activations_are_what_autograd_saves(name, dtype):
    model, tokens = small(name).to(dtype), torch.randint(300, (2, 128))
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage                 # held, so that no other takes its place
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_loss(model.head, model.hidden(tokens), tokens)[0]
    assert loss.requires_grad
    assert plan.activations(model.config, 2, 128, dtype, "none")[0] == sum(
        storage.nbytes() for storage in saved.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_activations_grow_in_a_straight_line_with_the_context(name):
    at = [plan.activations(preset(name, vocab=300, context=T), 1, T, BF16, "none")[0] for T in (256, 512, 768)]
    assert at[1] - at[0] == at[2] - at[1] > 0                   # a matrix of scores (T, T) would bend it


def test_a_window_that_slides_adds_the_mask_it_is_made_of():
    config = preset("mistral", vocab=300)                       # a window of 64
    bent = [plan.activations(config, 1, T, BF16, "none")[0] for T in (256, 512, 768)]
    # in T² numbers: the mask, one byte, for all layers; and for each of the 4 what fused attention makes of it,
    # in bfloat16
    assert bent[2] - 2 * bent[1] + bent[0] == (1 + 4 * 2) * (768**2 - 2 * 512**2 + 256**2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-8b", "mixtral-8x7b"])
def test_recomputation_keeps_less_but_needs_no_less_at_work(name):
    none, selective, full = (
        plan.activations(preset(name), 1, 4096, BF16, recompute) for recompute in distributed.RECOMPUTE
    )
    assert full[0] < selective[0] < none[0]
    assert min(selective[1], full[1]) >= none[1]
    shorter = dataclasses.replace(preset(name), layers=preset(name).layers[1:])
    assert full[0] - plan.activations(shorter, 1, 4096, BF16, "full")[0] == 4096 * 4096 * 2  # of each layer its input


def test_logits_in_pieces_take_no_more_for_more_rows():
    config = transformer(128256, 256, 1, 2, 2, 256)            # where the loss takes more than a layer
    one, two = (sum(plan.activations(config, rows, 8192, BF16, "full")) for rows in (1, 2))
    assert two - one < 8192 * 128256 / 10                      # a small part of the further logits


# ---- slices

@pytest.mark.parametrize("ranks", range(1, 8))
def test_rank_0_holds_the_larger_part_of_every_tensor(ranks):
    with torch.device("meta"):
        model = Decoder(preset("qwen3"))
    larger = sum(-(-p.shape[0] // ranks) * p[0].numel() for p in model.parameters())
    mine = plan.share(model.config, ranks, 1, BF16, "adamw")
    assert mine.weights == 4 * larger and sum(mine.groups) == ranks * larger >= mine.parameters
    assert mine.state == 2 * mine.weights + 4 * len(list(model.parameters()))  # two moments, a count of steps
    assert len(mine.groups) == 5 and mine.groups[-1] == ranks * sum(
        -(-n // ranks) * 128 for n in (4096, 4096)
    ) + ranks * -(-128 // ranks)


def test_published_shape_on_8_ranks_by_hand():
    adamw, muon = (plan.share(preset("llama-8b"), 8, 1, BF16, name) for name in ("adamw", "muon"))
    assert adamw.parameters == sum(adamw.groups) == LLAMA_8B and adamw.weights == muon.weights == LLAMA_8B * 4 // 8
    inside = 32 * (
        2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    )  # Muon's: one momentum, where AdamW has two moments
    assert len(muon.matrices) == 32 * 7 and sum(count for _, count in muon.matrices) == inside
    assert muon.state == (inside + 2 * (LLAMA_8B - inside)) * 4 // 8 + 4 * (2 * 32 + 3)


def test_replicas_make_slices_larger():
    config = preset("llama")
    assert plan.share(config, 8, 4, BF16, "muon") == plan.share(config, 2, 1, BF16, "muon")
    assert plan.share(config, 8, 8, BF16, "adamw").weights == 4 * sum(p.numel() for p in Decoder(config).parameters())


@pytest.mark.slow
def test_memory_is_that_of_a_sharded_run_as_torch_tracks_it():
    config, ranks = transformer(2000, 128, 6, 4, 2, 512), 4
    mine, (kept, more) = plan.share(config, ranks, 1, BF16, "adamw"), plan.activations(config, 2, 256, BF16, "none")
    dist.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=ranks
    )  # sends nothing, but all memory is real
    try:
        with torch.device("meta"):
            model = Decoder(config)
        distributed.shard(model, distributed.build_mesh("cpu", ranks, 1), BF16)
        model.to_empty(device="cpu")
        tokens, optimizers = torch.randint(2000, (2, 256)), optim.build(model, "adamw", 0.0, BF16)
        model.forward = lambda tokens: token_loss(model.head, Decoder.hidden(model, tokens), tokens)[0]
        with FSDPMemTracker(model, optimizers[0]) as tracker:
            for _ in range(2):
                model(tokens).backward()
                optim.step(optimizers, 0.0)
                model.zero_grad()
                tracker.reset_mod_stats()
        peak = {
            str(key).rpartition(".")[2]: size
            for key, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()
        }
    finally:
        dist.destroy_process_group()
    assert peak["SHARDED_PARAM"] == mine.weights and peak["OPT"] == mine.state
    assert peak["ACT"] + peak["TEMP"] == pytest.approx(kept + more, rel=1e-3)
    # the plan adds up what does not quite coincide: here the gradients' slices come after the peak, which is
    # that of the loss
    *layers, root = mine.groups
    planned = 2 * mine.weights + mine.state + kept + more + 2 * (root + 2 * max(layers)) + 4 * max(layers)
    assert peak["Total"] <= planned <= 1.1 * peak["Total"]


# ---- the report

def test_communication_and_memory_by_hand():
    text = report(
        "--world-size", "8", "--batch-size", "32", "--micro-batch", "2", "--optimizer", "adamw", "--recompute", "full"
    )
    root = 2 * 128256 * 4096 + 4096
    assert figure(text, "all-gather of weights") == round(2 * (2 * (LLAMA_8B - root) + root) * 2 * 7 / 8 / 1e9, 2)
    assert figure(text, "reduce-scatter of gradients") == round(LLAMA_8B * 4 * 7 / 8 / 1e9, 2)
    assert figure(text, "reduce-scatter of gradients", 1) == 450
    assert figure(text, "reduce-scatter of gradients", 2) == round(
        LLAMA_8B * 3.5 / 450e9, 3
    )
    assert figure(text, "whole float32 gradients, until 2 micro-batches") == round(4 * LLAMA_8B / 1e9, 2)
    layer = (LLAMA_8B - root) // 32
    assert figure(text, "gathered in bfloat16") == round(((root + 2 * layer) * 2 + layer * 4) / 1e9, 2)
    parts = [
        figure(text, part)
        for part in (
            "parameters", "gradients", "optimizer (adamw)", "gathered in", "whole float32", "activations kept",
            "activations and",
        )
    ]
    total, of_step = (float(row[60:].split()[0]) for row in text.splitlines() if row.strip().startswith("total"))
    assert sum(parts) == pytest.approx(total, abs=0.05) and "warning" not in text
    busy = speed.flops_per_token(preset("llama-8b"), 128) * 32 * 128 / 8 / (0.4 * 989.4e12)
    talk = sum(figure(text, line, 2) for line in ("all-gather of weights", "reduce-scatter of gradients"))
    assert talk > busy and "NOT hidden" in text  # rows of 128 tokens are too little work for what is sent
    assert of_step == pytest.approx(talk + figure(text, "optimizer, with"), abs=0.002)


def test_one_micro_batch_keeps_no_whole_gradients_and_one_rank_sends_nothing():
    text = report("--world-size", "1", "--batch-size", "1", preset_name="llama")
    assert (
        "whole float32" not in text
        and "all-gather of weights" not in text
        and "Muon" not in text
        and "hidden behind" in text
    )


def test_offload_moves_what_rests_to_the_cpu():
    args = "--world-size", "8", "--batch-size", "8", "--optimizer", "adamw"
    here, there = report(*args), report(*args, "--offload")
    assert figure(there, "in the memory of the CPU") == round(4 * LLAMA_8B * 4 / 8 / 1e9, 2)
    totals = [
        float(next(row for row in text.splitlines() if row.strip().startswith("total"))[60:].split()[0])
        for text in (here, there)
    ]
    assert totals[0] - totals[1] == pytest.approx(4 * LLAMA_8B * 4 / 8 / 1e9, abs=0.02)


def test_what_does_not_fit_is_said_with_what_helps():
    text = report(
        "--world-size", "8", "--batch-size", "64", "--micro-batch", "2", "--context", "8192", "--replicas", "2"
    )
    warning = text.splitlines()[-1]
    assert "do not fit into 80" in warning and all(
        word in warning
        for word in ("--recompute", "--micro-batch", "--batch-size", "--world-size", "--offload", "--replicas")
    )
    assert "warning" not in report("--world-size", "8", "--batch-size", "8", "--context", "8192", "--recompute", "full")


def test_slices_that_are_mostly_filling_are_said():
    assert "fewer rows than 1,024" in report("--world-size", "1024", "--batch-size", "1024", preset_name="llama")


def test_a_group_sends_over_all_adapters_that_it_has_in_a_machine():
    h100, l40s = speed.DEVICES["h100"], speed.DEVICES["l40s"]
    assert [h100.between(n) for n in (1, 2, 8, 16, 1024)] == [450e9, 450e9, 450e9, 400e9, 400e9]
    assert [h100.between(16, apart) for apart in (2, 4, 8, 64)] == [200e9, 100e9, 50e9, 50e9]
    assert h100.between(2, 4) == 450e9 and h100.between(4, 4) == 100e9 and l40s.between(64) == 32e9


BUDGET = """
import resource, time
from nanollm.training import plan
from nanollm import presets
from nanollm.training.options import parse
for name, ranks in (("llama-8b", 8), ("llama-8b", 64), ("llama-8b", 1024), ("mixtral-8x7b", 1024)):
    asked = f"--plan --device h100 --world-size {ranks} --batch-size 1024 --micro-batch 1 --context 8192".split()
    text = plan.report(parse("", asked), presets.preset(name))
    assert f"on {ranks:,} × h100" in text
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_8_billion_parameters_on_1024_ranks_take_seconds_and_no_memory():
    out = subprocess.run(
        [sys.executable, "-c", BUDGET], cwd=Path(plan.__file__).parents[1], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    seconds, kilobytes = map(float, out.stdout.split())
    assert seconds < 60 and kilobytes < 2e6


# ---- what is refused

@pytest.mark.parametrize("args, words", [
    (("--device", "h1000"), ["--device h1000", "h100", "l40s", "did you mean h100"]),
    (("--device", "cpu"), ["--device cpu", "name of a GPU", "b200"]),
    (("--world-size", "3", "--batch-size", "16"), ["--batch-size 16", "3 rank(s)"]),
    (("--world-size", "8", "--batch-size", "8", "--replicas", "3"), ["--replicas 3", "8"]),
    (("--mfu", "0"), ["--mfu 0", "above 0"]),
])
def test_what_does_not_go_together_is_refused_in_one_line(args, words):
    with pytest.raises(InputError) as error:
        report(*args, preset_name="llama")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not dist.is_initialized()


def test_a_process_that_has_a_group_is_refused_and_keeps_it():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(InputError, match="process group"):
            report(preset_name="llama")
        assert dist.get_world_size() == 2
    finally:
        dist.destroy_process_group()


def test_a_failure_leaves_no_group_behind(monkeypatch):
    monkeypatch.setattr(optim, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.share(preset("llama"), 4, 1, BF16, "muon")
    assert not dist.is_initialized()


# ---- the machine that is there

@pytest.mark.parametrize(
    "name, dtype, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12), ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12), ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA H100 PCIe", "bfloat16", None), ("Tesla T4", "float32", None),
    ],
)
def test_peak_of_a_gpu_is_found_by_its_whole_name(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert speed.peak_flops(torch.device("cuda:0"), dtype) == peak


def test_a_cpu_has_no_peak_but_a_largest_size():
    held = torch.ones(50_000_000)
    assert speed.peak_flops(torch.device("cpu"), "float32") is None
    assert held.nbytes < speed.peak_memory(torch.device("cpu")) < 1e12             # bytes, not kilobytes
