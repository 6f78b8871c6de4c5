"""Each module against transformers' own module of the same name, same weights: also the features whose families come
later."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon_h1
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_glm
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.granite import modeling_granite as granite
from transformers.models.lfm2 import modeling_lfm2 as lfm2
from transformers.models.lfm2_moe import modeling_lfm2_moe as lfm2_moe
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_half
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h
from transformers.models.phi import modeling_phi as phi
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.xglm.modeling_xglm import XGLMSinusoidalPositionalEmbedding

from nanollm.block import Block
from nanollm.config import (
    ACTIVATIONS,
    MLP,
    Alibi,
    Attention,
    LatentExpert,
    Layer,
    MoE,
    Norm,
    Positions,
    Rope,
    ScaledMLP,
    ShortConv,
    Sines,
)
from nanollm.config.positions import places
from nanollm.errors import InputError
from nanollm.layers.alibi import alibi_bias, alibi_slopes
from nanollm.layers.attention import attend_fused, attend_plainly
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mask import CAUSAL, allowed
from nanollm.layers.mlp import activate
from nanollm.layers.moe import MoE as MoEModule
from nanollm.layers.moe import routing
from nanollm.layers.norm import build_norm, rms_norm
from nanollm.layers.positions import PositionTable, build_positions
from nanollm.layers.rope import rotate, rotation_tables
from nanollm.layers.scaled_mlp import ScaledMLP as ScaledMLPModule
from nanollm.layers.short_conv import ShortConv as ShortConvModule
from nanollm.layers.xielu import FIRST, xielu
from tests.oracles import difference, make_loud

DTYPES = [torch.float32, torch.bfloat16]


def ctx(B: int, T: int, dtype: torch.dtype = torch.float32) -> ForwardContext:
    return ForwardContext(torch.arange(T).expand(B, T), regular=True, dtype=dtype)


# ---- norms: bit for bit, in the reference's order of casts

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference, config", [
    (LlamaRMSNorm, Norm(eps=1e-3)),
    (GemmaRMSNorm, Norm(eps=1e-3, offset=1.0, cast_after_gain=True)),
])
def test_rms_norm_is_bit_equal(reference, config, dtype):
    theirs, ours = reference(40, eps=1e-3).to(dtype), build_norm(config, 40).to(dtype)
    gain = torch.randn(40).to(dtype)
    theirs.weight.data, ours.gain.data = gain, gain
    x = (3 * torch.randn(2, 33, 40)).to(dtype)
    assert torch.equal(ours(x), theirs(x))


def test_the_two_cast_orders_differ_in_bfloat16_only():
    gain, x = torch.randn(64), torch.randn(4, 64)
    def orders(dtype):
        return [rms_norm(x.to(dtype), gain.to(dtype), 1e-6, cast_after_gain=late) for late in (False, True)]
    assert torch.equal(*orders(torch.float32)) and not torch.equal(*orders(torch.bfloat16))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(bias):
    theirs, ours = nn.LayerNorm(40, eps=1e-2, bias=bias), build_norm(Norm("layer", 1e-2, bias=bias), 40)
    make_loud(theirs)
    ours.gain.data = theirs.weight.data
    if bias:
        ours.bias.data = theirs.bias.data
    x = torch.randn(3, 5, 40) + 2
    assert torch.equal(ours(x), theirs(x))


# ---- rotation

@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_of_halves_is_bit_equal(dtype):
    q, positions = torch.randn(2, 3, 20, 16).to(dtype), torch.arange(20).expand(2, 20) + 3
    cos, sin = (t.to(dtype) for t in rotation_tables(Rope(), 16, positions, positions))
    angles = positions[..., None] * (1 / 10_000 ** (torch.arange(0, 16, 2) / 16))
    emb = torch.cat([angles, angles], -1)
    assert torch.equal(rotate(q, cos, sin, "half"), rotate_half(q, q, emb.cos().to(dtype), emb.sin().to(dtype))[0])


def test_rotation_of_neighbours_equals_cohere():
    q, positions = torch.randn(2, 3, 20, 16), torch.arange(20).expand(2, 20)
    rope = Rope(layout="interleaved")
    angles = positions[..., None] * (1 / 10_000 ** (torch.arange(0, 16, 2) / 16))
    emb = angles.repeat_interleave(2, -1)
    assert torch.equal(
        rotate(q, *rotation_tables(rope, 16, positions, positions), "interleaved"),
        rotate_interleaved(q, q, emb.cos(), emb.sin())[0],
    )


def test_partial_interleaved_rotation_equals_glm():
    q, positions = torch.randn(2, 3, 20, 16), torch.arange(20).expand(2, 20)
    angles = positions[..., None] * (1 / 10_000 ** (torch.arange(0, 8, 2) / 8))
    emb = torch.cat([angles, angles], -1)
    rope = Rope(layout="interleaved", fraction=0.5)
    assert torch.equal(
        rotate(q, *rotation_tables(rope, 16, positions, positions), "interleaved"),
        rotate_glm(q, q, emb.cos(), emb.sin())[0],
    )


# ---- attention

def test_soft_cap_equals_gemma2():
    q, k, v = torch.randn(2, 8, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    module = nn.Module()
    module.num_key_value_groups = 4
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    reference, _ = gemma2.eager_attention_forward(module, q, k, v, mask, scaling=0.3, softcap=2.0)
    assert difference(attend_plainly(q, k, v, CAUSAL, 0.3, 2.0), reference.transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("heads", [1, 4, 8, 6, 7, 12, 40])
def test_alibi_slopes_equal_bloom_and_mpt(heads):
    assert torch.equal(
        alibi_slopes(heads), -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    )  # (H, 1, T): slope · distance from the last
    reference = build_alibi_tensor(torch.ones(1, 10), heads, torch.float32)[:, 0]  # (H, T): slope · key index
    assert torch.allclose(
        alibi_slopes(heads), reference[:, 1], rtol=3e-7
    )  # BLOOM takes powers in float32, we round once
    ours = alibi_bias(Alibi(), heads, torch.tensor([[9]]), torch.arange(10)[None], 1.0)[0, :, 0]
    assert torch.allclose(ours - ours[:, :1], reference, atol=1e-6)  # a constant a row drops out


@pytest.mark.parametrize("T, S, H, K", [(7, 7, 4, 4), (7, 7, 8, 2), (1, 9, 8, 2), (1, 9, 6, 1), (3, 9, 4, 2)])
@pytest.mark.parametrize("masked", ["window", "alibi", "none"])
def test_fused_attention_is_the_definition(T, S, H, K, masked):
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, S, 8), torch.randn(2, K, S, 8)
    q_pos, k_pos = torch.arange(S - T, S).expand(2, T), torch.arange(S).expand(2, S)
    visible = allowed(q_pos, k_pos, 4)[:, None]
    mask = {
        "window": visible, "alibi": alibi_bias(Alibi(), H, q_pos, k_pos, 1.0).masked_fill(~visible, -torch.inf),
        "none": CAUSAL if T == S else None,
    }[masked]
    assert difference(attend_fused(q, k, v, mask, 0.4), attend_plainly(q, k, v, mask, 0.4)) < 1e-6


def test_allowed_is_the_table_of_its_docstring():
    def draw(visible):
        return ["".join("x" if seen else "." for seen in row) for row in visible[0].tolist()]
    arange = torch.arange(5)[None]
    assert draw(allowed(arange, arange, 3)) == ["x....", "xx...", "xxx..", ".xxx.", "..xxx"]
    packed, document = torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[1, 1, 1, 2, 2]])
    assert draw(allowed(packed, packed, None, document, document)) == ["x....", "xx...", "xxx..", "...x.", "...xx"]


# ---- positions

def test_a_table_with_rows_before_position_0():
    """OPT: position p is row p + 2, and padding reads what position 0 does."""
    table = PositionTable(Positions(6, 2), 3)
    table.weight.data = torch.arange(18.0).view(6, 3)
    assert torch.equal(table(torch.tensor([[-1, 0, 3]])), table.weight[[2, 2, 5]][None])
    assert (places(Positions(6, 2)), places(6), places(None)) == (4, 6, None)
    with pytest.raises(InputError, match=r"the model has 4 positions, from 0 to 3; .* \(row 0, token 1\)"):
        table(torch.tensor([[3, 4]]))


def test_sines_of_positions_are_xglms():
    theirs = XGLMSinusoidalPositionalEmbedding(20, 12)
    positions = torch.tensor([[0, 1, 7], [3, 4, 19]])
    table = build_positions(Sines(2), 12)
    assert torch.equal(table(positions), theirs(positions)) and not list(table.parameters())
    assert torch.equal(table(torch.tensor([[-1]])), table(torch.tensor([[0]]))) and places(Sines(2)) is None


# ---- feed-forward

@pytest.mark.parametrize(
    "ours, theirs", [(one, one) for one in ("silu", "gelu", "relu", "relu2")] + [("gelu_tanh", "gelu_pytorch_tanh")]
)
def test_activations(ours, theirs):
    assert ours in ACTIVATIONS
    x = torch.linspace(-6, 6, 1001)
    assert torch.equal(activate(ours, x), ACT2FN[theirs](x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_xielu_and_that_two_of_its_numbers_are_constants(dtype):
    theirs = ACT2CLS["xielu"](dtype=dtype)
    x, first = torch.linspace(-6, 6, 1001).to(dtype), torch.tensor(FIRST).to(dtype)
    torch.testing.assert_close(xielu(x, first), theirs(x), rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-6)
    curve = torch.stack([theirs.alpha_p[0], theirs.alpha_n[0], theirs.beta, theirs.eps]).detach().requires_grad_()
    assert torch.equal(xielu(x, curve), theirs(x))
    xielu(x, curve).sum().backward()
    assert curve.grad[:2].abs().min() > 0 and not curve.grad[2:].any()


def copy_experts(ours: MoEModule, theirs: nn.Module) -> None:
    ours.router.weight.data = theirs.gate.weight.data
    ours.experts.gate.data, ours.experts.up.data = theirs.experts.gate_up_proj.data.chunk(2, 1)
    ours.experts.down.data = theirs.experts.down_proj.data


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixtral_experts(dtype):
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3
    )
    theirs, ours = mixtral.MixtralSparseMoeBlock(config), MoEModule(MoE(6, 3, MLP(24), renormalize=True), 32)
    make_loud(theirs)
    copy_experts(ours, theirs)
    theirs, ours, x = theirs.to(dtype), ours.to(dtype), torch.randn(2, 9, 32).to(dtype)
    assert difference(ours(x), theirs(x)) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen_shared_expert_and_raw_weights(renormalize):
    config = AutoConfig.for_model(
        "qwen2_moe", hidden_size=32, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=6,
        num_experts_per_tok=2, norm_topk_prob=renormalize,
    )
    theirs, ours = (
        qwen2_moe.Qwen2MoeSparseMoeBlock(config),
        MoEModule(MoE(6, 2, MLP(24), renormalize, shared=MLP(40), shared_gate=True), 32),
    )
    make_loud(theirs)
    copy_experts(ours, theirs)
    ours.shared_gate.weight.data = theirs.shared_expert_gate.weight.data
    for part in ("gate", "up", "down"):
        getattr(ours.shared, part).weight.data = getattr(theirs.shared_expert, f"{part}_proj").weight.data
    x = torch.randn(2, 9, 32)
    assert difference(ours(x), theirs(x)) < 1e-6


def test_router_logits_are_collected_inside_the_block_only():
    moe = MoEModule(MoE(6, 2, MLP(8), renormalize=True), 16)
    make_loud(moe)
    x = torch.randn(2, 9, 16)
    with routing(moe) as routed:
        moe(x), moe(torch.randn(2, 9, 16))
    assert len(routed) == 2 and torch.equal(routed[0].logits, moe.router(x.flatten(0, 1)).logits)
    with routing(moe):
        pass
    moe(torch.randn(1, 2, 16))
    assert len(routed) == 2, "the hooks outlived the block"


# ---- wiring: whole layers of other families

def test_sigmoids_that_are_nearly_0_are_divided_by_their_sum_and_a_little():
    """1e-6 beside a sum of 4e-6: without it the weights would be a quarter larger."""
    config = AutoConfig.for_model(
        "lfm2_moe", hidden_size=32, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3,
        experts_implementation="eager",
    )
    theirs = lfm2_moe.Lfm2MoeSparseMoeBlock(config)
    ours = MoEModule(MoE(6, 3, MLP(24), 1e-6, score="sigmoid", correction=True), 32)
    make_loud(theirs)
    theirs.gate.weight.data = -(13 + torch.rand(6, 32)) / 32
    theirs.expert_bias.normal_(0, 1e-6)
    copy_experts(ours, theirs)
    ours.router.correction.data = theirs.expert_bias
    x = 1 + 0.1 * torch.rand(2, 13, 32)
    assert difference(ours(x), theirs(x)) < 1e-6


def test_latent_experts_without_gates_equal_nemotrons():
    config = AutoConfig.for_model(
        "nemotron_h", hidden_size=32, moe_intermediate_size=24, moe_latent_size=12, n_routed_experts=6,
        num_experts_per_tok=3, moe_shared_expert_intermediate_size=20, routed_scaling_factor=2.5,
        experts_implementation="eager",
    )
    plain = MLP(24, "relu2", gated=False)
    ours = MoEModule(MoE(6, 3, LatentExpert(12, plain), True, MLP(20, "relu2", gated=False), score="sigmoid",
                         correction=True, scale=2.5, router_float32=True), 32)
    theirs = nemotron_h.NemotronHMoE(config)
    make_loud(theirs)
    theirs.gate.e_score_correction_bias.normal_(0, 0.1)
    ours.router.correction.data = theirs.gate.e_score_correction_bias
    ours.experts.up.data, ours.experts.down.data = theirs.experts.up_proj.data, theirs.experts.down_proj.data
    copy({
        ours.router: theirs.gate, ours.narrow: theirs.fc1_latent_proj, ours.widen: theirs.fc2_latent_proj,
        ours.shared.up: theirs.shared_experts.up_proj, ours.shared.down: theirs.shared_experts.down_proj,
    })
    x = torch.randn(2, 13, 32)
    assert difference(ours(x), theirs(x)) < 1e-6


def test_a_short_convolution_equals_lfm2s():
    config = AutoConfig.for_model("lfm2", hidden_size=32, conv_L_cache=4, conv_bias=True, num_hidden_layers=1,
                                  layer_types=["conv"])
    theirs, ours = lfm2.Lfm2ShortConv(config, 0), ShortConvModule(ShortConv(32, 4, bias=True), 32)
    make_loud(theirs)
    copy({ours.in_proj: theirs.in_proj, ours.conv1d: theirs.conv, ours.out_proj: theirs.out_proj})
    x = torch.randn(2, 13, 32)
    assert difference(ours(x, ctx(2, 13)), theirs(x)) < 1e-6


def test_a_scaled_mlp_equals_falcon_h1s():
    config = AutoConfig.for_model("falcon_h1", hidden_size=32, intermediate_size=24, mlp_multipliers=[0.88, 0.6])
    theirs, ours = falcon_h1.FalconH1MLP(config), ScaledMLPModule(ScaledMLP(MLP(24), 0.88, 0.6), 32)
    make_loud(theirs)
    copy({ours.gate: theirs.gate_proj, ours.up: theirs.up_proj, ours.down: theirs.down_proj})
    x = torch.randn(2, 13, 32)
    assert difference(ours(x), theirs(x)) < 1e-6


def eager(config):
    config._attn_implementation = "eager"
    return config


def causal(T: int, window: int | None = None) -> torch.Tensor:
    visible = allowed(torch.arange(T)[None], torch.arange(T)[None], window)[:, None]
    return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)


def angles(rotary: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    emb = (torch.arange(T)[None, :, None] * (1 / 10_000 ** (torch.arange(0, rotary, 2) / rotary))).repeat(1, 1, 2)
    return emb.cos(), emb.sin()


def copy(pairs: dict[nn.Module, nn.Module]) -> None:
    for ours, theirs in pairs.items():
        getattr(ours, "gain" if hasattr(ours, "gain") else "weight").data = theirs.weight.data
        if getattr(theirs, "bias", None) is not None:
            ours.bias.data = theirs.bias.data


def test_sandwich_norms_scale_cap_and_window_equal_a_gemma2_layer():
    config = eager(
        AutoConfig.for_model(
            "gemma2", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
            num_hidden_layers=2, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=30,
            rms_norm_eps=1e-2,
        )
    )
    theirs = gemma2.Gemma2DecoderLayer(config, layer_idx=0)
    norm = Norm(eps=1e-2, offset=1.0, cast_after_gain=True)
    ours = Block(
        Layer(
            Attention(4, 2, 12, Rope(), window=5, scale=30**-0.5, softcap=2.0), MLP(48, "gelu_tanh"), norm, norm,
            norm, norm,
        ),
        32,
    )
    make_loud(theirs)
    a, m = theirs.self_attn, theirs.mlp
    copy(
        {
            ours.mixer.q: a.q_proj, ours.mixer.k: a.k_proj, ours.mixer.v: a.v_proj, ours.mixer.o: a.o_proj,
            ours.ffn.gate: m.gate_proj, ours.ffn.up: m.up_proj, ours.ffn.down: m.down_proj,
            ours.pre_mixer: theirs.input_layernorm, ours.post_mixer: theirs.post_attention_layernorm,
            ours.pre_ffn: theirs.pre_feedforward_layernorm, ours.post_ffn: theirs.post_feedforward_layernorm,
        }
    )
    x = torch.randn(2, 13, 32)
    reference = theirs(x, position_embeddings=angles(12, 13), attention_mask=causal(13, 5))
    assert difference(ours(x, ctx(2, 13)), reference[0] if isinstance(reference, tuple) else reference) < 1e-6


def test_parallel_with_two_norms_equals_a_neox_layer():
    config = eager(
        AutoConfig.for_model(
            "gpt_neox", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
            rotary_pct=0.5, layer_norm_eps=1e-2, use_parallel_residual=True,
        )
    )
    theirs, norm = neox.GPTNeoXLayer(config, 0).eval(), Norm("layer", 1e-2, bias=True)
    ours = Block(
        Layer(
            Attention(4, 4, 8, Rope(fraction=0.5), qkv_bias=True, out_bias=True),
            MLP(48, "gelu", gated=False, bias=True), norm, None, norm, None, parallel=True,
        ),
        32,
    )
    make_loud(theirs)
    a, m = theirs.attention, theirs.mlp
    copy(
        {
            ours.mixer.o: a.dense, ours.ffn.up: m.dense_h_to_4h, ours.ffn.down: m.dense_4h_to_h,
            ours.pre_mixer: theirs.input_layernorm, ours.pre_ffn: theirs.post_attention_layernorm,
        }
    )
    for i, part in enumerate((ours.mixer.q, ours.mixer.k, ours.mixer.v)):                       # rows (H, 3, d)
        part.weight.data = a.query_key_value.weight.data.view(4, 3, 8, 32)[:, i].reshape(32, 32)
        part.bias.data = a.query_key_value.bias.data.view(4, 3, 8)[:, i].reshape(32)
    x = torch.randn(2, 13, 32)
    reference = theirs(x, attention_mask=causal(13), position_embeddings=angles(4, 13))
    assert difference(ours(x, ctx(2, 13)), reference[0] if isinstance(reference, tuple) else reference) < 1e-6


def test_parallel_with_one_norm_equals_a_phi_layer():
    config = eager(
        AutoConfig.for_model(
            "phi", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
            partial_rotary_factor=0.5, layer_norm_eps=1e-2,
        )
    )
    theirs = phi.PhiDecoderLayer(config, 0).eval()
    ours = Block(
        Layer(
            Attention(4, 4, 8, Rope(fraction=0.5), qkv_bias=True, out_bias=True),
            MLP(48, "gelu_tanh", gated=False, bias=True), Norm("layer", 1e-2, bias=True), pre_ffn=None, parallel=True,
        ),
        32,
    )
    make_loud(theirs)
    a, m = theirs.self_attn, theirs.mlp
    copy(
        {
            ours.mixer.q: a.q_proj, ours.mixer.k: a.k_proj, ours.mixer.v: a.v_proj, ours.mixer.o: a.dense,
            ours.ffn.up: m.fc1, ours.ffn.down: m.fc2, ours.pre_mixer: theirs.input_layernorm,
        }
    )
    x = torch.randn(2, 13, 32)
    reference = theirs(x, attention_mask=causal(13), position_embeddings=angles(4, 13))
    assert difference(ours(x, ctx(2, 13)), reference[0] if isinstance(reference, tuple) else reference) < 1e-6


def test_a_scaled_branch_equals_a_granite_layer():
    config = eager(
        AutoConfig.for_model(
            "granite", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, rms_norm_eps=1e-2, residual_multiplier=0.22, attention_multiplier=0.1,
        )
    )
    theirs, norm = granite.GraniteDecoderLayer(config, 0).eval(), Norm(eps=1e-2)
    ours = Block(Layer(Attention(4, 2, 8, Rope(), scale=0.1), MLP(48), norm, None, norm, residual_scale=0.22), 32)
    make_loud(theirs)
    a, m = theirs.self_attn, theirs.mlp
    copy(
        {
            ours.mixer.q: a.q_proj, ours.mixer.k: a.k_proj, ours.mixer.v: a.v_proj, ours.mixer.o: a.o_proj,
            ours.ffn.gate: m.gate_proj, ours.ffn.up: m.up_proj, ours.ffn.down: m.down_proj,
            ours.pre_mixer: theirs.input_layernorm, ours.pre_ffn: theirs.post_attention_layernorm,
        }
    )
    x = torch.randn(2, 13, 32)
    reference = theirs(x, attention_mask=causal(13), position_embeddings=angles(8, 13))
    assert difference(ours(x, ctx(2, 13)), reference[0] if isinstance(reference, tuple) else reference) < 1e-6
