"""Adapters in peft's layout: what peft wrote is read, what is written peft reads, and merging is the same sum."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft", reason="the extra `test` has peft")

import checkpoints  # noqa: E402
from checkpoints.adapters import reading  # noqa: E402
from nanollm.errors import NanollmError  # noqa: E402
from nanollm.training import lora  # noqa: E402
from nanollm.training.lora import LoRA  # noqa: E402
from tests.oracles import difference  # noqa: E402
from tests.peft_models import ALL, EXPERTS, SAFE, Made, base, bit_equal, make, read  # noqa: E402

CONFIG = "adapter_config.json"
CASES = {  # fixture, peft's config
    "LoRA": ("llama-3.1", dict(target_modules=["q_proj", "v_proj", "down_proj"])),
    "rsLoRA with patterns": ("llama-3.1", dict(
        use_rslora=True, target_modules=ALL, rank_pattern={"o_proj": 2},
        alpha_pattern={"layers.1.self_attn.o_proj": 3})),
    "DoRA": ("llama-3.1", dict(use_dora=True, target_modules=ALL)),
    "DoRA with rsLoRA": ("llama-3.1", dict(use_dora=True, use_rslora=True, target_modules=["k_proj", "up_proj"])),
    "fused q, k, v and gate, up": ("phi-4", dict(target_modules=ALL)),
    "fused, DoRA": ("phi-4", dict(target_modules=["qkv_proj"], use_dora=True)),
    "by groups": ("pythia", dict(target_modules=ALL)),
    "matrices (in, out)": ("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "modules saved whole": ("gpt2", dict(
        target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f", "c_fc"])),
    "experts": ("mixtral-8x22b", dict(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "one weight of experts": ("qwen3-moe", dict(target_modules=["q_proj"], target_parameters=EXPERTS[1:])),
    "experts by their old names": ("mixtral-8x22b", dict(target_modules=["q_proj", "w1", "w2", "w3"])),
    "experts, rows in turn": ("gpt-oss-20b", dict(target_modules=["o_proj"], target_parameters=EXPERTS)),
    "experts of a hybrid": ("jamba-v0.1", dict(target_modules=["q_proj"], target_parameters=[
        "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"])),
    "a scan": ("mamba-130m", dict(target_modules=["in_proj", "x_proj"])),
}
QUICK = ("LoRA", "DoRA", "fused q, k, v and gate, up", "experts")


@pytest.fixture(scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                        for name in CASES])
def made(request, tmp_path_factory) -> Made:
    fixture, config = CASES[request.param]
    return make(fixture, tmp_path_factory.mktemp("peft"), **config)


def test_what_peft_wrote_is_read_written_and_merged(made, tmp_path):
    """Logits, the gradient of every part, the folder bit for bit, what peft reads from it, and the merged model."""
    model = checkpoints.load(made.base, adapter=made.adapter)
    expected = made.logits()
    assert difference(base(made.base)(made.x).logits.detach(), expected) > 0.1      # the adapter matters
    assert difference(model(made.x).detach(), expected) <= 1e-5

    checkpoints.save_adapter(model, tmp_path / "out")
    assert bit_equal(tmp_path / "out", made.adapter)
    with torch.no_grad():
        assert difference(read(made, tmp_path / "out")(made.x).logits, expected) <= 1e-5

    made.model.zero_grad()
    made.model(made.x).logits.square().mean().backward()
    model(made.x).square().mean().backward()
    theirs = torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])
    ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert len(ours) == len(theirs)
    assert abs(ours.norm() - theirs.norm()) <= 1e-5 * theirs.norm()
    same_gradients(model, made, tmp_path / "gradients")

    lora.merge(again := checkpoints.load(made.base, adapter=made.adapter))
    with torch.no_grad():
        assert difference(again(made.x), expected) <= 1e-5
    assert not lora.loras(again) and all(p.requires_grad for p in again.parameters())


def same_gradients(model, made: Made, folder: Path) -> None:
    """Compare the gradients of A, B and m with peft's, tensor by tensor: ours are written as if they were parts."""
    for p in lora.adapters(model).values():
        p.data = p.grad
    checkpoints.save_adapter(model, folder)
    ours = load_file(folder / SAFE)
    theirs = {name.replace(".default", ""): p.grad for name, p in made.model.named_parameters()
              if p.grad is not None and "lora_" in name}
    names = {name.removesuffix(".weight") if "magnitude" in name else name: name for name in theirs}
    assert names.keys() <= ours.keys()
    for name, key in names.items():
        # an A that several of our weights share has the sum of their gradients
        error = (ours[name] - theirs[key]).norm() / theirs[key].norm()
        assert error <= 5e-5, (name, error)      # the rounding of a loud model; of one layer 1e-6: test_lora.py


@pytest.mark.parametrize("fixture, config", [
    ("llama-3.1", dict(target_modules=["q_proj", "down_proj"], use_dora=True)),
    ("phi-4", dict(target_modules=["qkv_proj", "gate_up_proj"]))], ids=["DoRA", "fused"])
def test_ten_steps_of_training_are_pefts(fixture, config, tmp_path):
    made = make(fixture, tmp_path, loud=False, **config)
    model = checkpoints.load(made.base, adapter=made.adapter).train()
    targets = made.x.roll(-1, 1)
    theirs = [p for p in made.model.parameters() if p.requires_grad]
    for forward, parameters in ((lambda: made.model(made.x).logits, theirs),
                                (lambda: model(made.x), list(lora.adapters(model).values()))):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        for _ in range(10):
            torch.nn.functional.cross_entropy(forward().flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    made.model.save_pretrained(tmp_path / "theirs")
    checkpoints.save_adapter(model, tmp_path / "ours")
    folders = made.adapter, tmp_path / "theirs", tmp_path / "ours"
    before, after, ours = (load_file(folder / SAFE) for folder in folders)
    for name in after:
        assert (ours[name] - after[name]).norm() <= 1e-5 * after[name].norm(), name
        assert not torch.equal(before[name], ours[name])


def test_a_base_in_bfloat16_is_rounded_where_peft_rounds(tmp_path):
    made = make("llama-3.1", tmp_path, torch.bfloat16, target_modules=["q_proj", "o_proj", "down_proj"])
    model = checkpoints.load(made.base, adapter=made.adapter)
    assert model.embed.weight.dtype == torch.bfloat16 and model.layers[0].mixer.q.A.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(made.x), made.logits())


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_beside_quantised_weights_an_adapter_stays_float32(bits, tmp_path):
    """The same as an adapter beside what the quantised weights stand for."""
    made = make("llama-3.1", tmp_path, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = checkpoints.load(made.base, adapter=made.adapter, quantize=bits, group=32 if bits == "int4" else None)
    assert {p.dtype for p in lora.adapters(model).values()} == {torch.float32}
    plain = checkpoints.load(made.base, adapter=made.adapter)
    for name, module in plain.named_modules():
        stands = model.get_submodule(name) if not name.endswith("base") else None
        base_of = model.get_submodule(name) if stands is None else stands
        if hasattr(base_of, "dense"):
            module.weight.data = base_of.dense()
    with torch.no_grad():
        assert difference(model(made.x), plain(made.x)) <= 2e-3     # torch's packed products, of 8 bits, round
        with torch.enable_grad():
            assert difference(model(made.x).detach(), plain(made.x)) <= 1e-5
        merged = lora.merge(model)(made.x)
        assert difference(merged, plain(made.x)) <= 2e-3


def test_biases_and_modules_that_are_trained_whole_go_both_ways(tmp_path):
    made = make("gpt2", tmp_path, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    model = checkpoints.load(made.base, adapter=made.adapter)
    assert difference(model(made.x).detach(), made.logits()) <= 1e-5
    assert model.layers[0].mixer.q.base.bias.requires_grad and not model.layers[0].mixer.q.base.weight.requires_grad
    checkpoints.save_adapter(model, tmp_path / "out")
    with torch.no_grad():
        assert difference(read(made, tmp_path / "out")(made.x).logits, made.logits()) <= 1e-5


def test_the_head_and_the_embedding_have_theirs_merged(tmp_path):
    made = make("llama-3.1", tmp_path, target_modules=["q_proj", "lm_head", "embed_tokens"])
    with pytest.warns(UserWarning, match="merged into the weight, which is trained whole from here on.*head, embed"):
        model = checkpoints.load(made.base, adapter=made.adapter)
    assert difference(model(made.x).detach(), made.logits()) <= 1e-5
    checkpoints.save_adapter(model, tmp_path / "out")
    with torch.no_grad():
        assert difference(read(made, tmp_path / "out")(made.x).logits, made.logits()) <= 1e-5


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_tied_pair_of_which_some_is_trained_is_two(saved, tmp_path):
    """As in peft, where the other one stays as it was."""
    made = make("llama-3.2", tmp_path, target_modules=["q_proj"], modules_to_save=saved)
    with pytest.warns(UserWarning, match="is not the embedding; it is kept, and the model is untied"):
        model = checkpoints.load(made.base, adapter=made.adapter)
    assert difference(model(made.x).detach(), made.logits()) <= 1e-5
    checkpoints.save_adapter(model, tmp_path / "out")
    assert bit_equal(tmp_path / "out", made.adapter)


def test_an_adapter_made_here_is_read_by_peft(tmp_path):
    """Each of q, k, v has an A of its own, and k none: one matrix of rank 2 r in peft. Also experts and PiSSA."""
    for fixture, config in (("phi-4", LoRA(3, 6, targets=("q", "v", "down"), ranks={"v": 2}, alphas={"v": 5})),
                            ("phi-4", LoRA(3, 6, dora=True, targets=("q", "k"))),
                            ("llama-3.1", LoRA(3, 6, rslora=True, init="pissa")),
                            ("mixtral-8x22b", LoRA(2, 6, targets=("experts", "o")))):
        root = tmp_path / f"{fixture}{config.init}{config.dora}"
        made = make(fixture, root, target_modules=["o_proj"])
        model = lora.add(checkpoints.load(made.base), config)
        for p in lora.adapters(model).values():
            p.data += 0.2 * torch.randn_like(p)
        checkpoints.save_adapter(model, root / "out", base="owner/name")
        assert json.loads((root / "out" / CONFIG).read_text())["base_model_name_or_path"] == "owner/name"
        with torch.no_grad():
            expected = model(made.x)
            assert difference(read(made, root / "out")(made.x).logits, expected) <= 1e-5
            with pytest.warns(UserWarning, match="made for owner/name, and put on"):
                again = checkpoints.load(made.base, adapter=root / "out")
            assert difference(again(made.x), expected) <= 1e-5


def test_pefts_pissa_that_is_not_converted_takes_its_part_out_of_the_weights(tmp_path):
    made = make("llama-3.1", tmp_path, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    model = checkpoints.load(made.base, adapter=made.adapter)
    assert difference(model(made.x).detach(), made.logits()) <= 1e-5


# ---- refusals

def edited(made: Made, folder: Path, config=None, tensors=None, drop=()) -> Path:
    """A copy of the adapter with keys and tensors changed."""
    folder.mkdir()
    values = json.loads((made.adapter / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(values))
    parts = {name: one for name, one in load_file(made.adapter / SAFE).items() if not any(d in name for d in drop)}
    save_file(parts | (tensors or {}), folder / SAFE)
    return folder


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED = {
    "another kind": (dict(config={"peft_type": "IA3"}), r"peft_type is 'IA3'; expected 'LORA'"),
    "a key that changes numbers": (dict(config={"use_qalora": True}), r"use_qalora is True, which is not understood"),
    "layers twice": (dict(config={"layer_replication": [[0, 2]]}), r"layer_replication is \[\[0, 2\]\]"),
    "an unknown key": (dict(config={"twist": 3}), r"twist is 3, which is not understood"),
    "a beginning that changed the base": (dict(config={"init_lora_weights": "olora"}), r"init_lora_weights is 'olora'"),
    "a rank that is not there": (dict(config={"r": 5}), r"q_proj.weight: lora_A is \(4, 64\), expected \(5, 64\)"),
    "B alone": (dict(drop=(f"{Q0}.lora_A",)), r"layers.0.self_attn.q_proj: has B; expected A, B"),
    "no m": (dict(config={"use_dora": True}), r"q_proj: has A, B; expected A, B, magnitude_vector"),
    "another width": (dict(tensors={f"{Q0}.lora_A.weight": torch.ones(4, 65)}),
                      r"lora_A is \(4, 65\), expected \(4, 64\)"),
    "a weight that is not there": (dict(tensors={
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 64),
        "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(64, 4)}),
        r"model.layers.9.self_attn.q_proj: has an adapter, and the base no weight of that name"),
    "a bias of B": (dict(tensors={f"{Q0}.lora_B.bias": torch.ones(64)}), r"lora_B.bias is a bias of B"),
    "a NaN": (dict(tensors={f"{Q0}.lora_A.weight": torch.full((4, 64), torch.nan)}), r"q_proj.weight holds a NaN"),
    "a grown vocabulary": (dict(tensors={"base_model.model.lm_head.weight": torch.ones(140, 64)}),
                           r"lm_head.weight: \(140, 64\) stored, \(131, 64\) by config.json"),
    "a pattern for ever": (dict(config={"rank_pattern": {"(a+)+$": 3}}), r"rank_pattern is .*; expected regular"),
    "no pattern": (dict(config={"alpha_pattern": {"(": 3}}), r"alpha_pattern is .*; expected regular expressions"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Made:
    return make("llama-3.1", tmp_path_factory.mktemp("plain"), target_modules=["q_proj"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case, plain, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(NanollmError, match=message):
        checkpoints.load(plain.base, adapter=edited(plain, tmp_path / "edited", **changes))


def test_what_changes_no_number_is_passed_over(plain, tmp_path):
    neutral = {"unsloth_fixed": True, "_note": "x", "use_qalora": False, "kasa_config": None, "enable_lora": None,
               "megatron_core": "other", "exclude_modules": ["k_proj"], "target_modules": "regex.*"}
    model = checkpoints.load(plain.base, adapter=edited(plain, tmp_path / "edited", neutral))
    assert difference(model(plain.x).detach(), plain.logits()) <= 1e-5


def test_no_adapter_no_folder(plain, tmp_path):
    with pytest.raises(NanollmError, match="no adapter; expected a folder with adapter_config.json"):
        checkpoints.load(plain.base, adapter=tmp_path)
    with pytest.raises(NanollmError, match="not written: the model has no adapter"):
        checkpoints.save_adapter(checkpoints.load(plain.base), tmp_path / "out")
    model = checkpoints.load(plain.base, adapter=plain.adapter)
    with pytest.raises(NanollmError, match="has adapters beside its weights; save_adapter writes them"):
        checkpoints.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickles_are_opened_only_where_that_is_allowed(plain, tmp_path):
    folder = edited(plain, tmp_path / "edited")
    torch.save(load_file(folder / SAFE), folder / "adapter_model.bin")
    (folder / SAFE).unlink()
    with pytest.raises(NanollmError, match="pickle"):
        reading.read(folder)
    assert reading.read(folder, allow_pickle=True).modules.keys() == reading.read(plain.adapter).modules.keys()


@pytest.mark.parametrize("wrong", ["scale", "transposed", "rows"])
def test_a_wrong_reader_is_found_out(wrong, tmp_path, monkeypatch):
    """Mutants: another s, A for B's rows, rows of q for those of k. The comparison above has to see each."""
    made = make("phi-4", tmp_path, target_modules=["qkv_proj"])
    if wrong == "scale":
        monkeypatch.setattr(lora.LoRA, "scale_of", lambda self, name: self.alpha / self.rank_of(name) ** 0.5)
    elif wrong == "transposed":
        monkeypatch.setattr(reading, "_tensor", lambda stored, name, read=reading._tensor: read(stored, name).flip(0))
    else:
        arrange = reading.arrangement
        def turned(*args):
            found = arrange(*args)
            places = {key: place._replace(rows=place.rows.flip(0)) for key, place in found.places.items()}
            return found._replace(places=places)
        monkeypatch.setattr(reading, "arrangement", turned)
    model = checkpoints.load(made.base, adapter=made.adapter)
    assert difference(model(made.x).detach(), made.logits()) > 1e-3
