"""The decoder with its kernels and without: the same logits, gradients, tokens and losses; and the kernels did run."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import checkpoints
import kernels
from nanollm import ops
from nanollm.cache import Cache
from nanollm.config import (
    MLP,
    Alibi,
    Attention,
    GatedAttention,
    GatedDeltaNet,
    Layer,
    Mamba,
    ModelConfig,
    MoE,
    Norm,
    Rope,
)
from nanollm.inference.generation import generate, generate_batch
from nanollm.model import Decoder
from nanollm.presets import transformer
from nanollm.training.losses import token_loss
from tests import forked
from tests.fixtures import slow_but
from tests.kernels.checks import DEVICE, INTERPRETED
from tests.tok_folders import byte_bpe, write

PLAIN, GEMMA, SHIFT = Norm(), Norm(offset=1.0, cast_after_gain=True), Norm("layer", bias=True)


def config(mixer, ffn, norm=PLAIN, layers=1, **layer) -> ModelConfig:
    return ModelConfig(61, 32, (Layer(mixer, ffn, norm, **({"pre_ffn": norm} | layer)),) * layers, norm)


MODELS = {      # name → (config, the operations that must have run as kernels)
    "llama": (config(Attention(4, 2, 16, Rope()), MLP(48), layers=2),
              {"rms_norm", "add_rms_norm", "rotate", "attend", "gated"}),
    "window, head norms, biases": (
        config(Attention(4, 4, 24, Rope(theta=1e6), 7, qk_norm=Norm(), qkv_bias=True), MLP(48)),
        {"rms_norm", "rotate", "attend", "gated"}),
    "interleaved, partial, geglu, gemma's norms, soft cap": (
        config(Attention(4, 1, 16, Rope(layout="interleaved", fraction=0.5), softcap=5.0, scale=0.3),
               MLP(40, "gelu_tanh"), GEMMA, post_mixer=GEMMA, post_ffn=GEMMA),
        {"rms_norm", "add_rms_norm", "rotate", "attend", "gated"}),
    "alibi, layer norm": (
        config(Attention(6, 6, 16, alibi=Alibi(), qkv_bias=True, out_bias=True),
               MLP(64, "gelu", gated=False, bias=True), SHIFT),
        {"layer_norm", "attend"}),
    "parallel": (
        config(Attention(4, 2, 16, Rope(fraction=0.25)), MLP(48), SHIFT, pre_ffn=None, parallel=True),
        {"layer_norm", "rotate", "attend", "gated"}),
    "experts": (
        config(Attention(4, 2, 16, Rope()), MoE(4, 2, MLP(24), renormalize=True, shared=MLP(32), shared_gate=True)),
        {"rms_norm", "add_rms_norm", "attend", "gated", "expert_mlp"}),
    "delta rule, gated attention": (
        ModelConfig(61, 32, (Layer(GatedDeltaNet(4, 2, 16, 8, 4), MLP(48), Norm()),
                             Layer(GatedAttention(Attention(4, 2, 16, Rope(fraction=0.25), qk_norm=Norm())), MLP(48))),
                    Norm()),
        {"rms_norm", "causal_conv", "delta_walk", "attend", "rotate", "gated"}),
    "mamba": (
        ModelConfig(61, 32, (Layer(Mamba(64, 4, 4, 2), None, Norm(), pre_ffn=None),) * 2, Norm(),
                    float32_residual=True),
        {"rms_norm", "mamba_scan", "causal_conv"}),
}


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """Kernels wherever they support the arguments, also on tensors of a CPU; counts which ran."""
    count = Counter()

    def counted(name):
        kernel = getattr(kernels, name)

        def run(*args, **kwargs):
            count[name] += 1
            return kernel(*args, **kwargs)
        run.refuses, run.unchecked = kernel.refuses, run
        return run
    for name in kernels.OPERATIONS:
        monkeypatch.setattr(kernels, name, counted(name))
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    return count


def loud(config: ModelConfig) -> Decoder:
    torch.manual_seed(1)
    model = Decoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(DEVICE)


def near(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-5, least: float = 1e-30) -> None:
    """Relative to b, or to `least` where b is 0 but for rounding (the gradient of a key's bias)."""
    assert float((a - b).detach().norm() / b.detach().norm().clamp(min=least)) < bound


@pytest.mark.parametrize("name", slow_but(("experts",), MODELS))
def test_logits_and_gradients(name, ran):
    config, expected = MODELS[name]
    model, tokens = loud(config), torch.randint(0, 61, (2, 21), device=DEVICE)
    packed = torch.tensor([[*range(9), *range(8), *range(4)], [*range(15), 0, 1, 2, -1, -1, -1]], device=DEVICE)
    for positions in (None, packed):
        targets = torch.randint(0, 61, (2, 21), device=DEVICE)
        if positions is not None:
            targets[positions < 0] = -100
        found = []
        for mode in ("torch", "auto"):
            with ops.using(mode):
                hidden = model.hidden(tokens, positions)
                loss, nats, _ = token_loss(model.head, hidden, targets, 1e-3)
                found.append((hidden[targets >= 0], loss, nats, *torch.autograd.grad(loss, list(model.parameters()))))
        size = max(float(x.norm()) for x in found[0][3:])
        for a, b in zip(*found, strict=True):
            near(b, a, least=1e-2 * size)
    assert expected | {"linear_cross_entropy"} <= set(ran), f"{sorted(ran)} ran"


@pytest.mark.parametrize("name", slow_but(("experts", "mamba"), MODELS))
@torch.inference_mode()
def test_caches(name, ran):
    """A prompt in chunks, ragged rows, then token by token, past the end of a window's ring."""
    config, _ = MODELS[name]
    model = loud(config)
    feed = [torch.randint(0, 61, (2, n), device=DEVICE) for n in (5, 6, 1, 1, 1)]
    lengths = torch.tensor([[5, 3], [6, 2], [1, 1], [1, 0], [1, 1]], device=DEVICE)
    for ragged in (False, True):
        found = []
        for mode in ("torch", "auto"):
            cache, logits = Cache(config, 2, 16, device=DEVICE), []
            for tokens, count in zip(feed, lengths, strict=True):
                offsets = torch.arange(tokens.shape[1], device=DEVICE)
                places = cache.lengths[:, None] + offsets
                positions = torch.where(offsets < count[:, None], places, -1) if ragged else None
                with ops.using(mode):
                    out = model(tokens, positions, cache)
                logits.append(out[positions >= 0] if ragged else out)
            found.append(logits)
        for a, b in zip(*found, strict=True):
            near(b, a)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "experts", "mamba"])
def test_greedy_tokens(name, ran):
    config, _ = MODELS[name]
    model = loud(config)
    found = []
    for mode in ("torch", "auto"):
        with ops.using(mode):
            alone = list(generate(model, [3, 1, 4, 1, 5], 12))
            found.append((alone, generate_batch(model, [[9, 2, 6], [5], [3, 5, 8, 9, 7]], 8)))
    assert found[0] == found[1] and ran


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "experts", "mamba"])
def test_a_layer_compiles_whole_with_its_kernels(name, monkeypatch):
    """torch.compile of a block, as train.py --compile does it, meets no break."""
    config, _ = MODELS[name]
    model, tokens = loud(config), torch.randint(0, 61, (2, 13), device=DEVICE)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    plain = model(tokens)
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    traced = model(tokens)
    near(traced, plain, 1e-6)
    near(*(torch.autograd.grad(out.square().sum(), model.embed.weight)[0] for out in (traced, plain)), 1e-5)


def test_recomputed_layers_keep_what_attention_gave(ran, monkeypatch):
    import kernels.attention
    from nanollm.training.distributed import recomputed

    launched = []

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return launch[grid]

    launch = kernels.attention.forward_kernel
    monkeypatch.setattr(kernels.attention, "forward_kernel", Counted())
    config, _ = MODELS["llama"]
    model, tokens = loud(config), torch.randint(0, 61, (1, 9), device=DEVICE)
    counts, gradients, forwards = {}, {}, [layer.forward for layer in model.layers]
    for how in ("none", "selective", "full"):
        for layer, forward in zip(model.layers, forwards, strict=True):
            layer.forward = recomputed(forward, how)
        launched.clear()
        gradients[how] = torch.autograd.grad(model(tokens).square().sum(), model.embed.weight)[0]
        counts[how] = len(launched)
    assert counts == {"none": 2, "selective": 2, "full": 4}
    assert torch.equal(gradients["none"], gradients["selective"]) and torch.equal(gradients["none"], gradients["full"])


# ---- the two scripts, in processes of their own

def run_in_mode() -> None:
    """The main function of a forked process: the mode, the script and its arguments are on the command line."""
    _, mode, name = sys.argv[:3]
    sys.argv = [f"{name}.py", *sys.argv[3:]]
    if INTERPRETED and mode == "triton":
        from tests.kernels.interpreter import hasten

        hasten()
    with ops.using(mode):
        importlib.import_module(name).run()


def script(mode: str, name: str, *words: str) -> str:
    """What it says, with kernels or without."""
    ended = forked.start(1, run_in_mode, mode, name, *words).end(600)
    assert ended.codes == [0], ended.said
    return ended.out


def losses(folder: Path, mode: str, *options: str) -> list[float]:
    script(mode, "train", "--out", str(folder), *options)
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
def test_train_and_generate_with_kernels_and_without(tmp_path):
    """The same curve from train.py, and from generate.py the same text; of a tiny model, for the interpreter's sake."""
    tokenizer, folder = byte_bpe(("</s>",)), tmp_path / "tiny"
    checkpoints.save(Decoder(transformer(tokenizer.get_vocab_size(), 32, 2, 4, 2, 48, context=64)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config={"eos_token": "</s>"})
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / f"text/{i}.py").write_text(f"def name{i}(x):\n    return x + {i}\n\n" * 4)
    options = [
        "--data", str(tmp_path / "text"), "--init", str(folder), "--steps", "3", "--sample-every", "0", "--context",
        "16", "--batch-size", "1", "--lr", "0.003", "--device", DEVICE,
        *(["--dtype", "float32"] if INTERPRETED else []),
    ]
    curves = {mode: losses(tmp_path / mode, mode, *options) for mode in ("torch", "triton")}
    assert len(curves["torch"]) == 3
    assert curves["triton"] == pytest.approx(curves["torch"], abs=1e-5 if INTERPRETED else 1e-3)
    options = [
        "--model", str(tmp_path / "torch"), "--prompt", "def ", "--max-new-tokens", "6", "--temperature", "0",
        "--device", DEVICE,
    ]
    texts = {mode: script(mode, "generate", *options) for mode in ("torch", "triton")}
    assert texts["torch"] == texts["triton"] and texts["torch"].startswith("def ")
