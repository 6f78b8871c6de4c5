"""LoRA, rsLoRA, DoRA, PiSSA, LoftQ beside Linears and experts: modules against peft's, and models with them."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nanollm import config as c
from nanollm.errors import NanollmError
from nanollm.inference.quantize import quantize
from nanollm.init import init_weights
from nanollm.layers.linear import Linear
from nanollm.model import Decoder
from nanollm.training import lora, lora_weights
from nanollm.training.lora import LoRA, LoRALinear

NAMES = ["q", "k", "v", "o", "gate", "up", "down"]
KINDS = {"LoRA": {}, "rsLoRA": dict(rslora=True), "DoRA": dict(dora=True),
         "DoRA with rsLoRA": dict(dora=True, rslora=True)}
EXPERTS = c.MoE(4, 2, c.MLP(24), renormalize=True)
LATENT = c.MoE(4, 2, c.LatentExpert(16, c.MLP(24, "relu2", gated=False)), renormalize=True)
CLIPPED = c.MoE(4, 2, c.ClippedGLU(24, 7.0, 1.702), renormalize=True, router_bias=True)


def toy(ffn=EXPERTS, **more) -> Decoder:
    mixer = c.Attention(4, 2, 8, c.Rope())
    layers = c.Layer(mixer, c.MLP(48), c.Norm(), pre_ffn=c.Norm()), c.Layer(mixer, ffn, c.Norm(), pre_ffn=c.Norm())
    return Decoder(c.ModelConfig(vocab=50, dim=32, layers=layers, final_norm=c.Norm(), **more))


def louder(model: nn.Module) -> nn.Module:
    for p in lora.adapters(model).values():
        p.data += 0.3 * torch.randn_like(p)
    return model


TOKENS = torch.arange(14).view(2, 7)


# ---- one module

@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_pefts(kind, dropout):
    """Output, and the gradients of x, A, B and m, also where dropout draws the same zeros."""
    pytest.importorskip("peft", reason="the extra `test` has peft")
    from tests.peft_models import peft_linear

    said = KINDS[kind]
    linear = nn.Linear(24, 40)
    theirs = peft_linear(copy.deepcopy(linear), use_dora="dora" in said, use_rslora="rslora" in said,
                         lora_dropout=dropout).train()
    base = Linear(24, 40)
    base.load_state_dict(linear.state_dict())
    ours = LoRALinear(base, 4, LoRA(4, 8, **said).scale_of("q"), dropout, "dora" in said).train()
    A, B = torch.randn(4, 24), torch.randn(40, 4)
    with torch.no_grad():
        for a, b in (ours.A, ours.B), (theirs.lora_A.default.weight, theirs.lora_B.default.weight):
            a.copy_(A)
            b.copy_(B)
        if ours.magnitude is not None:
            m = linear.weight.norm(dim=1) * (1 + 0.3 * torch.rand(40))
            ours.magnitude.copy_(m)
            theirs.lora_magnitude_vector.default.weight.copy_(m)
    found = []
    for module in (theirs, ours):
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(7)
        y = module(x)
        y.square().sum().backward()
        parts = [p for name, p in module.named_parameters() if "base" not in name]
        parts.sort(key=lambda p: (p.ndim, p.shape[-1]))
        found.append([y.detach(), x.grad, *(p.grad for p in parts)])
    assert len(found[0]) == len(found[1]) == 4 + ("dora" in said)
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape and (one - other).norm() <= 1e-6 * one.norm()


@pytest.mark.parametrize("wrong", ["dropout after A", "no s", "m not normed", "norm in the gradient"])
def test_a_wrong_module_is_found_out(wrong, monkeypatch):
    """Mutants: the comparison above has to fail."""
    pytest.importorskip("peft", reason="the extra `test` has peft")
    kind, dropout = ("DoRA", 0.0) if "norm" in wrong else ("LoRA", 0.5)
    if wrong == "dropout after A":
        def forward(self, x, expert=None):
            h = F.dropout(F.linear(x, self.A), self.dropout, self.training)
            return self.base(x) + self.scale * F.linear(h, self.B)
    elif wrong == "no s":
        def forward(self, x, expert=None):
            return self.base(x) + F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.A), self.B)
    else:
        def forward(self, x, expert=None):
            V = self.base.weight + self.scale * self.B @ self.A
            norm = self.base.weight.norm(dim=1) if wrong == "m not normed" else V.norm(dim=1)
            return F.linear(x, (self.magnitude / norm)[:, None] * V, self.bias)
    monkeypatch.setattr(LoRALinear, "forward", forward)
    with pytest.raises(AssertionError):
        test_a_module_is_pefts(kind, dropout)


def test_pissa_begins_as_pefts():
    """Up to the signs of the directions: A and B by their product, the rest of W by itself."""
    pytest.importorskip("peft", reason="the extra `test` has peft")
    from tests.peft_models import peft_linear

    linear = nn.Linear(24, 40)
    base = Linear(24, 40)
    base.load_state_dict(linear.state_dict())
    W = linear.weight.detach().clone()
    theirs = peft_linear(linear, init_lora_weights="pissa")
    ours = LoRALinear(base, 4, 2.0)
    lora_weights.begin({"q": ours}, "pissa")
    A, B = theirs.lora_A.default.weight, theirs.lora_B.default.weight
    assert torch.allclose(ours.B @ ours.A, B @ A, atol=1e-6)
    assert torch.allclose(ours.A.abs(), A.abs(), atol=1e-5) and torch.allclose(ours.B.abs(), B.abs(), atol=1e-5)
    assert torch.allclose(ours.base.weight, theirs.base_layer.weight, atol=1e-6)
    assert torch.allclose(ours.merged(), W, atol=1e-6)
    assert torch.linalg.svdvals(ours.base.weight)[0] < torch.linalg.svdvals(W)[3]


def test_loftq_loses_less_than_quantising_does():
    """W − Q − s B A is smaller than W − Q of W alone, and smaller still after several turns than after one."""
    W = torch.randn(64, 48) * torch.linspace(0.1, 2, 48)
    base = Linear(48, 64, bias=False)
    base.weight = nn.Parameter(W.clone())
    module = LoRALinear(base, 8, 2.0)
    lora_weights.begin({"q": module}, "loftq", quantise=lambda weight, bias: Rounded(weight))
    alone = (W - Rounded(W).dense()).norm()
    first = W - Rounded(W).dense()
    U, S, Vh = torch.linalg.svd(first)
    once = (first - U[:, :8] * S[:8] @ Vh[:8]).norm()
    assert (module.merged() - W).norm() < once < 0.95 * alone


class Rounded(nn.Module):
    """Quantised as roughly as can be: to multiples of ½."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("codes", (2 * weight).round())
        self.bias, self.shape = None, tuple(weight.shape)

    def dense(self):
        return self.codes / 2


# ---- a model

@pytest.mark.parametrize("ffn", [EXPERTS, CLIPPED, LATENT], ids=["experts", "clipped experts", "latent experts"])
def test_a_model_begins_as_it_was_and_merges_into_what_it_has_become(ffn):
    model = toy(ffn)
    before, names = model(TOKENS).detach(), list(dict(model.named_parameters()))
    lora.add(model, LoRA(3, 6))
    assert torch.equal(model(TOKENS), before)
    after = louder(model)(TOKENS).detach()
    assert (after - before).abs().max() > 0.1
    assert (lora.merge(model)(TOKENS) - after).abs().max() <= 1e-5
    assert list(dict(model.named_parameters())) == names
    assert type(model.layers[1].ffn.experts) is type(toy(ffn).layers[1].ffn.experts)


def test_an_expert_has_its_own_product():
    """Against the effective weights, expert by expert, in moe.py's own forward."""
    model = louder(lora.add(toy(), LoRA(3, 6, targets=("experts",))))
    plain = toy()
    for leaf in ("gate", "up", "down"):
        module = getattr(model.layers[1].ffn.experts, leaf)
        W = torch.stack([module.base.weight[e] + 2.0 * module.B[e] @ module.A[e] for e in range(4)])
        setattr(plain.layers[1].ffn.experts, leaf, nn.Parameter(W))
    assert (model(TOKENS) - plain(TOKENS)).abs().max() <= 1e-5


def test_only_adapters_are_trained():
    model = lora.add(toy(), LoRA(3, 6, targets=("q", "down")))
    model(TOKENS).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == moved == lora.adapters(model).keys()
    assert {name.split(".")[-2] for name in trained} == {"q", "down"} and len(trained) == 8
    assert all(name.endswith((".A", ".B")) for name in trained)
    assert {p.dtype for p in lora.adapters(lora.add(toy().bfloat16(), LoRA(3, 6))).values()} == {torch.float32}


def test_targets_ranks_and_alphas_go_by_parts_of_names():
    config = LoRA(8, 16, targets=("layers.0.mixer.q", "o", "experts"), ranks={"layers.1.mixer.o": 2}, alphas={"o": 4})
    found = lora.loras(lora.add(toy(), config))
    assert list(found) == ["layers.0.mixer.q", "layers.0.mixer.o", "layers.1.mixer.o", *(
        f"layers.1.ffn.experts.{leaf}" for leaf in ("gate", "up", "down"))]
    assert [module.A.shape[-2] for module in found.values()] == [8, 8, 2, 8, 8, 8]
    assert [module.scale for module in found.values()] == [2, 0.5, 2, 2, 2, 2]
    assert LoRA(9, 6, rslora=True).scale_of("q") == 6 / math.sqrt(9)
    assert {name.rpartition(".")[2] for name in lora.targets(toy())} == set(NAMES)       # and no router


def test_first_values_follow_from_seed_and_name():
    a, b, other = (lora.adapters(lora.add(toy(), LoRA(3, 6), seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    A = a["layers.0.ffn.down.A"]
    assert not torch.equal(A, other["layers.0.ffn.down.A"]) and not torch.equal(A, a["layers.1.mixer.q.A"][:, :48])
    bound = 48 ** -0.5
    assert A.abs().max() <= bound and abs(A.std() - bound / math.sqrt(3)) < 0.15 * bound
    reference = torch.empty(3, 48)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert reference.abs().max() <= bound < 1.1 * reference.abs().max()
    assert not a["layers.0.ffn.down.B"].any()


def test_on_the_meta_device_values_come_later():
    with torch.device("meta"):
        model = toy()
    lora.add(model, LoRA(3, 6, dora=True, targets=("q", "ffn.down")))
    assert all(p.is_meta for p in lora.adapters(model).values())
    model.to_empty(device="cpu")
    init_weights(model)                          # a row for each of A, B and m
    lora_weights.begin(lora.loras(model))
    module = model.layers[0].mixer.q
    assert torch.allclose(module.magnitude, module.base.weight.norm(dim=1)) and not module.B.any() and module.A.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_beside_quantised_weights(bits):
    """The same as beside what they stand for; gradients go through them to the layers below."""
    model = quantize(toy(c.MoE(4, 2, c.MLP(32), renormalize=True)), bits, None if bits == 8 else 32,
                     skip=("head", "router", "layers.0.ffn.down"))
    plain = toy(c.MoE(4, 2, c.MLP(32), renormalize=True))
    for name, module in model.named_modules():
        if hasattr(module, "dense"):
            value = nn.Parameter(module.dense())
            if "experts" in name:
                setattr(plain.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], value)
            else:
                plain.get_submodule(name).weight = value
    for each in (model, plain):
        lora.add(each, LoRA(3, 6))
        torch.manual_seed(5)
        louder(each)
    ours, theirs = model(TOKENS), plain(TOKENS)
    assert (ours - theirs).abs().max() <= 1e-5
    ours.square().sum().backward()
    theirs.square().sum().backward()
    other = lora.adapters(plain)
    for name, p in lora.adapters(model).items():
        assert (p.grad - other[name].grad).norm() <= 1e-5 * other[name].grad.norm(), name
    merged = lora.merge(model)
    assert (merged(TOKENS) - theirs).abs().max() <= 1e-5
    assert not any(hasattr(module, "dense") for module in merged.layers.modules())


def test_layers_that_read_a_weight_read_what_it_has_become():
    """Mamba takes dt_proj.weight and calls nothing."""
    layer = c.Layer(c.Mamba(inner=64, state=4, conv=4, dt_rank=2), None, c.Norm(), pre_ffn=None)
    model = Decoder(c.ModelConfig(vocab=50, dim=32, layers=(layer,), final_norm=c.Norm()))
    before = model(TOKENS).detach()
    louder(lora.add(model, LoRA(2, 4, targets=("dt_proj",))))
    after = model(TOKENS)
    after.sum().backward()
    assert (after - before).abs().max() > 1e-4 and model.layers[0].mixer.dt_proj.A.grad.any()
    assert (lora.merge(model)(TOKENS) - after).abs().max() <= 1e-6


REFUSED = {
    "another target": (dict(targets=("q", "qkv")), "no weight of the layers is called qkv.*there are q, k, v, o, gate"),
    "a target by its name in the folder": (dict(targets=("q_proj",)), "called q_proj .did you mean q.*there are q, k"),
    "another rank's target": (dict(ranks={"x": 3}), "no weight of the layers is called x"),
    "rank 0": (dict(rank=0), "an adapter of rank 0; expected 1 or more"),
    "dropout 1": (dict(dropout=1.0), "an adapter with dropout 1.0; expected 0 or more, below 1"),
    "alpha 0": (dict(alphas={"q": 0}), "an adapter with alpha 0; expected more than 0"),
    "DoRA of experts": (dict(dora=True), "layers.1.ffn.experts.gate: DoRA is for Linears"),
    "another beginning": (dict(init="eva"), "init 'eva'; expected one of zero, pissa, loftq"),
    "LoftQ without a quantiser": (dict(init="loftq"), "no quantise is given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_changes(case):
    model, (changes, message) = toy(), REFUSED[case]
    with pytest.raises(NanollmError, match=message):
        lora.add(model, LoRA(**{"rank": 4, "alpha": 8, **changes}))
    assert not lora.loras(model) and all(p.requires_grad for p in model.parameters())


def test_twice_and_after_quantising_are_refused():
    model = lora.add(toy(), LoRA(3, 6, targets=("q",)))
    with pytest.raises(NanollmError, match="layers.0.mixer.q has an adapter already"):
        lora.add(model, LoRA(3, 6, targets=("k",)))
    with pytest.raises(NanollmError, match="init pissa needs the weights as they were before they were quantised"):
        lora.add(quantize(toy(c.MLP(32)), 8), LoRA(3, 6, init="pissa"))
