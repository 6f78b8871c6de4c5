"""DeepSeek: published configs, 8-bit weights, the layer that predicts ahead, the two forms of latent attention, and
what is refused."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from checkpoints.storage import quantized, stream
from checkpoints.storage.files import read_folder
from checkpoints.storage.quantized.fp8 import Fp8
from nanollm.cache import Cache
from nanollm.config import MLP, Attention, ExpertGroups, LatentAttention, Layer, ModelConfig, MoE, Norm, Rope, Yarn
from nanollm.errors import CheckpointError, ConfigError
from nanollm.inference.quantize import quantize
from nanollm.layers.latent_attention import LatentAttention as LatentModule
from nanollm.layers.moe import route
from nanollm.model import Decoder
from nanollm.training.plan import Live
from tests.fixtures import FIXTURES
from tests.oracles import difference, hf_config, tokens, write

MOE_16B = dict(
    model_type="deepseek", aux_loss_alpha=0.001, attention_bias=False, first_k_dense_replace=1, hidden_act="silu",
    hidden_size=2048, intermediate_size=10944, max_position_embeddings=4096, moe_intermediate_size=1408,
    moe_layer_freq=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False, num_attention_heads=16,
    num_experts_per_tok=6, num_hidden_layers=28, num_key_value_heads=16, rms_norm_eps=1e-6, rope_scaling=None,
    rope_theta=10000, scoring_func="softmax", seq_aux=True, tie_word_embeddings=False, vocab_size=102400,
)
YARN = dict(
    beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707, original_max_position_embeddings=4096,
    type="yarn",
)
V2_LITE = MOE_16B | dict(
    model_type="deepseek_v2", kv_lora_rank=512, max_position_embeddings=163840, n_group=1, num_hidden_layers=27,
    q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=YARN, routed_scaling_factor=1.0,
    topk_group=1, topk_method="greedy", v_head_dim=128,
)
V2 = V2_LITE | dict(
    hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, n_group=8, n_routed_experts=160,
    num_attention_heads=128, num_hidden_layers=60, num_key_value_heads=128, q_lora_rank=1536,
    routed_scaling_factor=16.0, topk_group=3, topk_method="group_limited_greedy",
)
V3 = V2 | dict(
    model_type="deepseek_v3", ep_size=1, first_k_dense_replace=3, hidden_size=7168, intermediate_size=18432,
    moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8,
    num_hidden_layers=61, num_nextn_predict_layers=1, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    routed_scaling_factor=2.5, scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc", vocab_size=129280,
)
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


# ---- configs

def test_published_sizes():
    norm, rope = Norm(), Rope(scaling=Yarn(40.0, 4096, attention_factor=1.0), layout="interleaved", rounds="result")
    attention = Attention(16, 16, 128, Rope())
    moe = MoE(64, 6, MLP(1408), False, MLP(2816), round_weights=True)
    assert read(MOE_16B).layers == (
        Layer(attention, MLP(10944), norm, pre_ffn=norm),
        *(Layer(attention, moe, norm, pre_ffn=norm),) * 27,
    )
    heat = 0.1 * 0.707 * torch.tensor(40.0, dtype=torch.float64).log().item() + 1
    lite = read(V2_LITE).layers[-1]
    assert lite.mixer == LatentAttention(
        16, 128, 64, 128, 512, None, rope, lite.mixer.scale
    ) and lite.mixer.scale == pytest.approx(192**-0.5 * heat**2, rel=1e-12)
    assert lite.ffn == MoE(64, 6, MLP(1408), False, MLP(2816), router_float32=True)
    assert read(V2).layers[-1].ffn == MoE(
        160, 6, MLP(1536), False, MLP(3072), groups=ExpertGroups(8, 3, 1), scale=16.0, router_float32=True
    )
    v3 = read(V3)
    assert [type(layer.ffn) for layer in v3.layers] == [MLP] * 3 + [MoE] * 58 and v3.layers[
        0
    ].mixer.rope.rounds == "each"
    assert v3.layers[3].ffn == MoE(
        256, 8, MLP(2048), True, MLP(2048), score="sigmoid", correction=True, groups=ExpertGroups(8, 4, 2), scale=2.5,
        router_float32=True,
    )
    with torch.device("meta"):
        for base, count in (
            (MOE_16B, 16_375_728_128), (V2_LITE, 15_706_484_224), (V2, 235_741_434_880), (V3, 671_026_419_200),
        ):
            assert sum(p.numel() for p in Decoder(read(base)).parameters()) == count


def test_what_is_written_reads_back():
    for base, keys in (
        (MOE_16B, {}), (MOE_16B, dict(moe_layer_freq=3, n_shared_experts=None)), (V2_LITE, {}),
        (V2, dict(norm_topk_prob=True)), (V3, {}),
        (
            V3,
            dict(
                rope_interleave=False, q_lora_rank=None, rope_scaling=None, n_group=1, topk_group=1,
                first_k_dense_replace=0,
            ),
        ),
        (V3, dict(rope_scaling=YARN | dict(mscale=0.3, mscale_all_dim=0.9))),
    ):
        config = read(base, **keys)
        values = write_config(config, FAMILIES[base["model_type"]])[1]
        assert values["model_type"] == base["model_type"] and read_config(values)[1] == config


LATENT = LatentAttention(4, 8, 4, 6, 12, None, Rope(), scale=0.3)
V3_MOE = MoE(8, 2, MLP(8), True, score="sigmoid", correction=True, router_float32=True)


@pytest.mark.parametrize(
    "mixer, ffn, words",
    [
        (LATENT, V3_MOE, "a scale of the scores is known here with YaRN only"),
        (
            dataclasses.replace(LATENT, rope=Rope(scaling=Yarn(3.0, 8))), V3_MOE,
            "no mscale is exactly a temperature of 1.019",
        ),
        (Attention(4, 2, 8, Rope()), V3_MOE, r"layers\[0\].mixer is Attention, not LatentAttention"),
        (LATENT, None, r"layers\[0\].ffn is NoneType, not MLP or MoE"),
    ],
    ids="scale temperature mixer ffn".split(),
)
def test_what_cannot_be_written(mixer, ffn, words):
    with pytest.raises(ConfigError, match=f"no family can express this model(.|\n)*deepseek_v3: {words}"):
        layer = Layer(mixer, ffn, pre_ffn=Norm() if ffn else None)
        write_config(ModelConfig(97, 48, (layer,), context=64), FAMILIES["deepseek_v3"])


def test_a_model_without_experts_has_an_mlp_in_all_its_first_layers():
    config = ModelConfig(97, 48, (Layer(dataclasses.replace(LATENT, scale=None), MLP(8)),) * 3, context=64)
    assert write_config(config, FAMILIES["deepseek_v3"])[1]["first_k_dense_replace"] == 3


def test_which_layers_have_experts():
    def kinds(**keys):
        return "".join(
            "M" if isinstance(layer.ffn, MoE) else "-" for layer in read(MOE_16B, num_hidden_layers=6, **keys).layers
        )
    assert (
        kinds() == "-MMMMM"
        and kinds(first_k_dense_replace=0, moe_layer_freq=2) == "M-M-M-"
        and kinds(moe_layer_freq=2) == "--M-M-"
        and kinds(first_k_dense_replace=6) == "------"
    )


def test_renormalised_weights_of_v2_are_not_scaled():
    """As published; transformers ignores the key, and no checkpoint sets it."""
    moe = read(V2, norm_topk_prob=True).layers[-1].ffn
    assert moe.renormalize and moe.scale == 1
    weights, _ = route(torch.randn(5, 160), moe)
    assert torch.allclose(weights.sum(-1), torch.ones(5))


REFUSED = {
    "scores of v1": (MOE_16B, dict(scoring_func="sigmoid"), "scoring_func is 'sigmoid'; expected 'softmax'"),
    "scores of v3": (V3, dict(scoring_func="softmax"), "scoring_func is 'softmax'; expected 'sigmoid'"),
    "choice of v2": (
        V2, dict(topk_method="noaux_tc"), "topk_method is 'noaux_tc'; expected 'greedy' or 'group_limited_greedy'",
    ),
    "choice of v3": (V3, dict(topk_method="greedy"), "topk_method is 'greedy'; expected 'noaux_tc'"),
    "biases": (V3, dict(attention_bias=True), "attention_bias is True; expected False"),
    "biases of the mlp": (V2, dict(mlp_bias=True), "mlp_bias is True"),
    "every other layer": (V2, dict(moe_layer_freq=2), "moe_layer_freq is 2; expected 1"),
    "keys for several heads": (V3, dict(num_key_value_heads=8), "num_key_value_heads is 8; expected 128"),
    "another head": (V3, dict(head_dim=128), "head_dim is 128; expected 64"),
    "one temperature": (
        V3, dict(rope_scaling={key: value for key, value in YARN.items() if key != "mscale"}),
        "mscale and mscale_all_dim together",
    ),
    "groups that do not divide": (V3, dict(n_group=7), "MoE.groups = .*equal parts of the 256 experts"),
    "groups too small": (V3, dict(n_group=256), "MoE.groups = .*at least `best` in each"),
    "too few in the groups": (
        V2, dict(n_group=80, topk_group=2), "MoE.groups = .*at least top_k .6. experts in the groups kept",
    ),
    "too many groups": (V3, dict(topk_group=9), "ExpertGroups.kept = 9: expected at most count"),
    "no first layers": (V3, dict(first_k_dense_replace=-1), "first_k_dense_replace is -1"),
    "rotated channels": (V3, dict(qk_rope_head_dim=63), "an even number of rotated channels, not 63 of 63"),
}


def test_groups_count_only_where_the_method_chooses_groups():
    assert read(V2_LITE, topk_group=3) == read(V2_LITE, n_group=None) == read(V2_LITE)
    with pytest.raises(ConfigError, match="topk_group is 3; expected 1, or n_group of at least as many"):
        read(V3, n_group=1, topk_group=3)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    base, keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(base, **keys)


# ---- the router

def test_the_router_of_v3_is_that_of_transformers():
    """Random corrections large enough that choice and weight part; corrected scores below 0 are among them."""
    fixture = FIXTURES["deepseek-v3"]
    theirs = DeepseekV3TopkRouter(hf_config(fixture))
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_(-0.6, 0.5)
    moe = MoE(8, 3, MLP(24), True, score="sigmoid", correction=True, groups=ExpertGroups(4, 2, 2), scale=2.5)
    logits, weights, chosen = theirs(torch.randn(400, 64))
    ours = route(logits, moe, theirs.e_score_correction_bias)
    def dense(w, e):
        return torch.zeros(400, 8).scatter(1, e, w)
    assert torch.allclose(dense(*ours), dense(weights, chosen), atol=1e-6)
    uncorrected = route(logits, moe)
    assert (dense(*uncorrected) - dense(*ours)).abs().amax(1).gt(0.01).float().mean() > 0.3 and ours[0].sum(
        -1
    ).allclose(torch.tensor(2.5))


# ---- latent attention

def test_both_forms_of_latent_attention_agree(monkeypatch):
    """The absorbed one is used for a single token; with a quantised kv_up, which has no weight to take apart, the
    other is."""
    layer = Layer(LatentAttention(4, 16, 8, 12, 32, None, Rope()), MLP(64))
    model = Decoder(ModelConfig(50, 32, (layer,) * 2, context=64)).eval().requires_grad_(False)
    x, used = torch.randint(0, 50, (2, 9)), []
    absorbed = LatentModule.absorbed
    monkeypatch.setattr(LatentModule, "absorbed", lambda *args: used.append(1) or absorbed(*args))
    whole = model(x)[:, -1:]
    assert not used
    cache = Cache(model.config, 2, 16)
    model(x[:, :8], cache=cache)
    assert difference(model(x[:, 8:], cache=cache), whole) < 1e-6 and len(used) == 2
    quantize(model, 8)
    cache = Cache(model.config, 2, 16)
    model(x[:, :8], cache=cache)
    assert difference(model(x[:, 8:], cache=cache), model(x)[:, -1:]) < 1e-6 and len(used) == 2


def test_the_cache_keeps_576_numbers_a_token():
    config = read(V3, num_hidden_layers=1, first_k_dense_replace=1)
    with torch.device("meta"):
        state = Cache(config, 1, 100, device="meta").states[0]
    assert (state.k.numel() + state.v.numel()) / 101 == 576


# ---- 8 bits

def quantised(folder, block=(16, 24), bias: float = 1e-3) -> dict[str, torch.Tensor]:
    """Give the folder 8-bit matrices, as V3 has them: all inside the layers but the routers'. Returns what they
    mean, element by element."""
    path = folder / "model.safetensors"
    tensors, meant = load_file(path), {}
    for name, weight in list(tensors.items()):
        if ".layers." not in name or weight.ndim != 2 or name.endswith("mlp.gate.weight"):
            continue
        N, K = weight.shape
        scales = (
            torch.rand(-(-N // block[0]), -(-K // block[1]), generator=torch.Generator().manual_seed(N + K)) / 400
            + bias
        )
        codes = (weight.float() * 200).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        rows, columns = torch.arange(N) // block[0], torch.arange(K) // block[1]
        meant[name] = codes.float() * scales[rows][:, columns]
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FP8 | {"weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.fixture
def folder(tmp_path):
    write(FIXTURES["deepseek-v3"], tmp_path / "in", torch.bfloat16)
    return tmp_path / "in"


def test_eight_bits_are_read_as_what_they_mean(folder, tmp_path):
    """Blocks that divide nothing. Rounded once, from the exact product; everything else is as it is stored."""
    meant = quantised(folder)
    assert any(N % 16 and K % 24 for N, K in (each.shape for each in meant.values()))
    model = checkpoints.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layer = model.layers[1]
    assert torch.equal(layer.mixer.kv_up.weight, meant["model.layers.1.self_attn.kv_b_proj.weight"].bfloat16())
    assert torch.equal(layer.ffn.experts.down[5], meant["model.layers.1.mlp.experts.5.down_proj.weight"].bfloat16())
    exact = checkpoints.load(folder, dtype=torch.float32)
    assert torch.equal(exact.layers[1].ffn.experts.down[5], meant["model.layers.1.mlp.experts.5.down_proj.weight"])
    checkpoints.save(model, tmp_path / "out")
    values, tensors = (
        json.loads((tmp_path / "out/config.json").read_text()), load_file(tmp_path / "out/model.safetensors"),
    )
    assert "quantization_config" not in values and values["torch_dtype"] == "bfloat16"
    assert all(torch.equal(tensors[name], value.bfloat16()) for name, value in meant.items()) and not [
        name for name in tensors if "scale_inv" in name
    ]
    x, again = tokens(FIXTURES["deepseek-v3"]), checkpoints.load(tmp_path / "out")
    assert torch.equal(again(x), model(x)) and checkpoints.config(folder) == model.config == again.config


def test_eight_bits_as_transformers_reads_them(tmp_path):
    codes, scales = (torch.randn(256, 384) * 100).to(torch.float8_e4m3fn), torch.rand(2, 3)
    save_file({"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    stored = quantized.plain_tensors(read_folder(tmp_path), Fp8((128, 128)))
    ours = torch.empty(256, 384)
    stream.read(stored["a.weight"], 0, ours, "a.weight")
    assert stored.keys() == {"a.weight"} and torch.equal(ours, Fp8Dequantize(None)._dequantize_one(codes, scales))


def test_a_matrix_never_stands_whole_in_float32(tmp_path):
    save_file(
        {"a.weight": torch.ones(8192, 1024).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(64, 8)},
        tmp_path / "model.safetensors",
    )
    stored, ours = (
        quantized.plain_tensors(read_folder(tmp_path), Fp8((128, 128))), torch.empty(8192, 1024, dtype=torch.bfloat16),
    )
    with Live() as live:
        stream.read(stored["a.weight"], 0, ours, "a.weight")
    assert 2**20 < live.most < 2**24 and (ours == 1).all()  # a run of 2²⁰ at a time; in float32 it would be 2²⁵


def test_the_correction_stays_float32(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for dtype, kept in ((None, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        correction = checkpoints.load(folder, dtype=dtype).layers[1].ffn.router.correction
        assert correction.dtype == kept and torch.equal(correction.float(), tensors[name])


BROKEN = {
    "scales of another shape": (
        lambda t, n: {f"{n}_scale_inv": t[f"{n}_scale_inv"][:-1].contiguous()},
        r"kv_b_proj.weight_scale_inv is .* \(\d+, \d+\); expected torch.float32 or .* of shape \(\d+, \d+\)",
    ),
    "scales of another type": (
        lambda t, n: {f"{n}_scale_inv": t[f"{n}_scale_inv"].double()},
        r"kv_b_proj.weight_scale_inv is torch.float64 .* expected torch.float32 or torch.bfloat16",
    ),
    "codes of another type": (
        lambda t, n: {n: t[n].to(torch.float8_e5m2)},
        "kv_b_proj.weight is torch.float8_e5m2 .* expected torch.float8_e4m3fn",
    ),
    "no scales": (lambda t, n: {f"{n}_scale_inv": None}, "(?s)another type.*kv_b_proj.weight: float8_e4m3fn stored"),
    "no weight": (lambda t, n: {n: None}, "(?s)missing.*kv_b_proj.weight.*unexpected.*kv_b_proj.weight_scale_inv"),
    "a scale that is no number": (
        lambda t, n: {f"{n}_scale_inv": t[f"{n}_scale_inv"] * torch.inf},
        "kv_b_proj.weight holds a NaN or an infinity",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_eight_bits_that_do_not_fit(case, folder):
    quantised(folder)
    change, words = BROKEN[case]
    tensors = load_file(folder / "model.safetensors")
    tensors |= change(tensors, "model.layers.1.self_attn.kv_b_proj.weight")
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=words):
        checkpoints.load(folder)


METHODS = {
    "another method": (
        {"quant_method": "aqlm"},
        "quant_method is 'aqlm': .* not read here; read are 'fp8', .*'mlx'. Take the unquantised upload",
    ),
    "nameless": ({"sparse": True}, "quant_method is None"),
    "another format": (FP8 | {"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'; expected 'e4m3'"),
    "another scheme": (FP8 | {"activation_scheme": "token"}, "activation_scheme is 'token'; expected 'dynamic' or"),
    "blocks": (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size is \\[128, 0\\]; expected two whole numbers"),
    "an unknown key": (FP8 | {"group": 3}, "nothing here knows what these mean: quantization_config.group = 3"),
    "no object": ("fp8", "quantization_config is 'fp8'; expected an object"),
}


@pytest.mark.parametrize("case", METHODS)
def test_other_methods_are_refused_by_name(case, folder):
    found, words = METHODS[case]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": found}))
    for read_it in (checkpoints.load, checkpoints.config):
        with pytest.raises(ConfigError, match=words):
            read_it(folder)


def test_no_quantisation_may_be_said(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    assert checkpoints.load(folder).config == checkpoints.config(folder)


# ---- the layer that predicts ahead

def test_the_layer_that_predicts_ahead_is_left_out_and_said_once(folder, tmp_path):
    tensors, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    ahead = {
        name.replace(".layers.1.", ".layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.1." in name
    }
    ahead |= {
        "model.layers.2.eh_proj.weight": torch.zeros(64, 128), "model.layers.2.enorm.weight": torch.zeros(64),
        "model.layers.2.shared_head.head.weight": torch.zeros(131, 64),
    }
    save_file(tensors | ahead, path, {"format": "pt"})
    with pytest.warns(UserWarning) as said:
        model = checkpoints.load(folder)
    assert len(said) == 1 and f"left out: model.layers.2.… ({len(ahead)} tensors, " in str(said[0].message)
    checkpoints.save(model, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.load(tmp_path / "out")
    del ahead["model.layers.2.eh_proj.weight"]  # then it is a layer too many, and no other thing
    save_file(tensors | ahead, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="unexpected"):
        checkpoints.load(folder)
