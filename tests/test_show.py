"""python -m checkpoints.show: totals as published, costs as torch counts them, drawings and words as a person would
have them."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

import checkpoints
from checkpoints.convert import convert, plan
from checkpoints.families import read_config
from checkpoints.layouts.original import with_rope_layout
from checkpoints.show import __main__ as show_command
from checkpoints.show import amount, billions, costs, describe, facts, find
from checkpoints.show.drawing import WIDTH, brief, kinds_of, names, pattern, wiring
from checkpoints.show.words import SIZES, different, words_of
from checkpoints.source import open_source
from nanollm import config as c
from nanollm.cache import Cache
from nanollm.config import MLP, Attention, Layer, Mamba, ModelConfig, MoE, Norm, Rope
from nanollm.errors import CheckpointError, ConfigError, InputError
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training import flops as speed
from tests.test_consistency import KINDS

LLAMA = Layer(Attention(4, 2, 12, Rope()), MLP(96))


def costs_of(config: ModelConfig, context: int = 64, dtype: torch.dtype = torch.bfloat16):
    return costs(config, kinds_of(config), context, dtype)


def sentences(config: ModelConfig) -> list[str]:
    return different(config, kinds_of(config))


# ---- totals

# facts of the published config.json, and what the model is said to have: exact where the hub counts it, else as its
# paper rounds it
PUBLISHED = {
    "Llama-3.1-8B": (
        dict(
            model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        ),
        8_030_261_248, None,
    ),
    "Mistral-7B-v0.1": (
        dict(
            model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, sliding_window=4096,
        ),
        7_241_732_096, None,
    ),
    "Mixtral-8x7B": (
        dict(
            model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        ),
        46_702_792_704, 12.9e9,
    ),
    "Qwen3-0.6B": (
        dict(
            model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        ),
        596_049_920, None,
    ),
    "gpt2": (
        dict(model_type="gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024), 124_439_808,
        None,
    ),
    "pythia-160m": (
        dict(
            model_type="gpt_neox", vocab_size=50304, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, rotary_pct=0.25,
        ),
        162_322_944, None,
    ),
    "bloom-560m": (
        dict(model_type="bloom", vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16), 559_214_592, None,
    ),
    "phi-2": (
        dict(
            model_type="phi", vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
            num_attention_heads=32, partial_rotary_factor=0.4,
        ),
        2_779_683_840, None,
    ),
    "gemma-2-2b": (
        dict(
            model_type="gemma2", vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        ),
        2_614_341_888, None,
    ),
    "mamba-130m": (
        dict(model_type="mamba", vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16), 129_135_360,
        None,
    ),
    "OLMoE-1B-7B": (
        dict(
            model_type="olmoe", vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
            num_attention_heads=16, num_experts=64, num_experts_per_tok=8,
        ),
        6.9e9, 1.3e9,
    ),
    "DeepSeek-V3": (
        dict(
            model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=128,
            num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8,
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_group=8,
            topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True,
        ),
        671e9, 37e9,
    ),
    "DeepSeek-V2-Lite": (
        dict(
            model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
            moe_intermediate_size=1408, num_hidden_layers=27, first_k_dense_replace=1, num_attention_heads=16,
            num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6, q_lora_rank=None,
            kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        ),
        15.7e9, 2.66e9,
    ),
    "Qwen1.5-MoE-A2.7B": (
        dict(
            model_type="qwen2_moe", vocab_size=151936, hidden_size=2048, intermediate_size=5632,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_hidden_layers=24,
            num_attention_heads=16, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
        ),
        14.3e9, 2.7e9,
    ),
    "gpt-oss-20b": (
        dict(
            model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
        ),
        20.9e9, 3.6e9 + 201088 * 2880,
    ),  # its card leaves the embedding out of what is active
    "Qwen3-30B-A3B": (
        dict(
            model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
            moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
            head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        ),
        30.5e9, 3.3e9,
    ),
    "Phi-3.5-MoE": (
        dict(
            model_type="phimoe", vocab_size=32064, hidden_size=4096, intermediate_size=6400, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2,
            attention_bias=True, lm_head_bias=True,
        ),
        41.9e9, 6.6e9,
    ),
    "Jamba-v0.1": (
        dict(
            model_type="jamba", vocab_size=65536, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_experts=16, num_experts_per_tok=2,
        ),
        51.6e9, 12.1e9,
    ),
    "Baichuan2-7B": (
        dict(
            model_type="baichuan", vocab_size=125696, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, max_position_embeddings=4096,
        ),
        7_505_973_248, None,
    ),
    "chatglm3-6b": (
        dict(
            model_type="chatglm", num_layers=28, padded_vocab_size=65024, hidden_size=4096, ffn_hidden_size=13696,
            kv_channels=128, num_attention_heads=32, multi_query_attention=True, multi_query_group_num=2,
            add_qkv_bias=True, seq_length=8192, rmsnorm=True, original_rope=True,
        ),
        6_243_584_000, None,
    ),
    "Phi-3-mini": (
        dict(
            model_type="phi3", vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32,
        ),
        3_821_079_552, None,
    ),
    "Command-R": (
        dict(
            model_type="cohere", vocab_size=256000, hidden_size=8192, intermediate_size=22528, num_hidden_layers=40,
            num_attention_heads=64,
        ),
        34_980_831_232, None,
    ),
    "Mamba-Codestral-7B": (
        dict(
            model_type="mamba2", vocab_size=32768, hidden_size=4096, num_hidden_layers=64, n_groups=8, head_dim=64,
            num_heads=128, state_size=128, expand=2, tie_word_embeddings=False,
        ),
        7_285_403_648, None,
    ),
    "recurrentgemma-2b": (
        dict(
            model_type="recurrent_gemma", vocab_size=256000, hidden_size=2560, intermediate_size=15360,
            num_hidden_layers=26, num_attention_heads=10, num_key_value_heads=1,
        ),
        2_682_862_080, None,
    ),
    "rwkv-4-169m": (
        dict(model_type="rwkv", vocab_size=50277, hidden_size=768, num_hidden_layers=12), 169_342_464, None,
    ),
    "StripedHyena-7B": (
        dict(
            model_type="stripedhyena", vocab_size=32000, hidden_size=4096, num_layers=32, num_filters=4096,
            inner_mlp_size=14336, num_attention_heads=32, proj_groups=4, attn_layer_idxs=list(range(1, 32, 2)),
            hyena_layer_idxs=list(range(0, 32, 2)), state_size=2, short_filter_length=3,
        ),
        7.65e9, None,
    ),
    "Yuan2-2B": (
        dict(
            model_type="yuan", vocab_size=135040, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
            num_attention_heads=32,
        ),
        2.1e9, None,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_those_that_were_published(name):
    values, total, active = PUBLISHED[name]
    found = costs_of(read_config(values)[1])
    assert found.parameters == (total if isinstance(total, int) else pytest.approx(total, rel=6e-3))
    assert found.active == (found.parameters if active is None else pytest.approx(active, rel=2e-2))


# ---- every kind of layer there is

@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_is_counted_and_drawn(name):
    config = ModelConfig(97, 32, KINDS[name] * 2, tied=True)
    with torch.device("meta"):
        whole = sum(p.numel() for p in Decoder(config).parameters())
    found, cache = costs_of(config), Cache(config, 1, 64, torch.bfloat16)
    assert found.parameters == whole >= found.active > 0
    assert found.cache == sum(tensor.nbytes for state in cache.states for tensor in tensors(state))
    assert 0 < found.prefill <= found.decode and speed.flops_per_token(config, 64) == 3 * found.decode
    text = describe(config, 64)
    assert max(map(len, text.splitlines())) <= WIDTH and f"{whole:,}" in text
    assert json.loads(facts(config, 64))["parameters"] == whole


def tensors(state) -> list[torch.Tensor]:
    return (
        [state]
        if isinstance(state, torch.Tensor)
        else [
            x
            for part in vars(state).values()
            if isinstance(part, torch.Tensor) or hasattr(part, "__dict__")
            for x in tensors(part)
        ]
    )


def test_what_the_cache_takes():
    full = costs_of(preset("llama-8b"), 4096)
    assert full.grows == 2 * 32 * 8 * 128 * 2 and full.cache == 4097 * full.grows  # one slot is for padding
    mistral = preset("mistral-7b")                                                              # a window of 4096
    assert costs_of(mistral, 2048).grows == full.grows and costs_of(mistral, 8192).grows == 0
    assert costs_of(mistral, 8192).cache == costs_of(mistral, 100_000).cache == full.cache
    assert costs_of(mistral, 2048, torch.float32).grows == 2 * full.grows
    scan = costs_of(preset("mamba-130m"))
    assert scan.grows == 0 and scan.cache == 24 * 1536 * (4 * 16 + 2 * 3)  # a state in float32, three inputs


@pytest.mark.parametrize("windows", [(None,), (7,), (7, None, 7, 3), (64,), (65, 63)])
def test_a_prompt_takes_what_its_tokens_take(windows):
    config = ModelConfig(97, 48, tuple(Layer(Attention(4, 2, 8, Rope(), window), MLP(48)) for window in windows))
    for context in (1, 2, 7, 64):
        each = [speed.decode_flops(config, t + 1) for t in range(context)]
        assert speed.prefill_flops(config, context) == pytest.approx(sum(each) / context, rel=1e-12)


# ---- the picture

PICTURE = """\
  tokens
  │
  embed       Embedding   500×48
  │
6 layers: 2 times (2 × sliding, 1 × full)
┌─ 4 × sliding ─────────────────────────────────────────────────────────── 20,904 parameters each ─┐
│ x ─┬→ RMSNorm → Attention → RMSNorm → + ─┬→ RMSNorm → MLP → + →                                  │
│    └──────────────────────────────────┘  └──────────────────┘                                    │
│ pre_mixer   RMSNorm(ε=1e-06)   gain 48                                                           │
│ mixer       Attention(H=4, K=2, d=12, rope=Rope(θ=10000), window=1000, qk_norm=RMSNorm(ε=1e-06)) │
│             q 48×48   k 24×48   v 24×48   o 48×48   q_norm.gain 12   k_norm.gain 12              │
│ post_mixer  RMSNorm(ε=1e-06, offset=1, cast_after_gain)   gain 48                                │
│ pre_ffn     RMSNorm(ε=1e-06)   gain 48                                                           │
│ ffn         MLP(F=96)                                                                            │
│             gate 96×48   up 96×48   down 48×96                                                   │
└──────────────────────────────────────────────────────────────────────────────────────────────────┘
┌─ 2 × full ────────────────────────────────────────────────────────────── 20,832 parameters each ─┐
│ x ─┬→ RMSNorm → Attention → + ─┬→ RMSNorm → MLP → + →                                            │
│    └────────────────────────┘  └──────────────────┘                                              │
│ pre_mixer   RMSNorm(ε=1e-06)   gain 48                                                           │
│ mixer       Attention(H=4, K=2, d=12, rope=Rope(θ=10000))                                        │
│             q 48×48   k 24×48   v 24×48   o 48×48                                                │
│ pre_ffn     RMSNorm(ε=1e-06)   gain 48                                                           │
│ ffn         MLP(F=96)                                                                            │
│             gate 96×48   up 96×48   down 48×96                                                   │
└──────────────────────────────────────────────────────────────────────────────────────────────────┘
  │
  norm        RMSNorm(ε=1e-06)   gain 48
  │
  head        Linear, its matrix the embedding, then 30·tanh(logit / 30)
  │
  logits

parameters  149,328 (149 k)
weights     299 kB in bfloat16
cache       192 bytes a token and 384,576 that do not grow: 769 kB for 2,000 tokens in bfloat16
FLOPs       decode 1.83 M for the last of 2,000 tokens; prefill 1.26 M a token of all of them

Different from Llama
  [sliding] mixer: a query sees 1000 keys, itself included
  [sliding] norm of q and k: there is one
  [sliding] norm after the mixer: there is one, the gain is stored less 1, rounded after the gain,
      not before it
  model: the head is the embedding
  model: logits become 30·tanh(logit / 30)"""


def test_the_picture():
    sliding = dataclasses.replace(
        LLAMA, mixer=Attention(4, 2, 12, Rope(), window=1000, qk_norm=Norm()),
        post_mixer=Norm(offset=1.0, cast_after_gain=True),
    )
    assert describe(ModelConfig(500, 48, (sliding, sliding, LLAMA) * 2, tied=True, head_softcap=30.0), 2000) == PICTURE


@pytest.mark.parametrize(
    "layer, drawn",
    [
        (
            LLAMA,
            [
                "x ─┬→ RMSNorm → Attention → + ─┬→ RMSNorm → MLP → + →",
                "   └────────────────────────┘  └──────────────────┘",
            ],
        ),
        (
            dataclasses.replace(LLAMA, pre_mixer=None, pre_ffn=None, post_mixer=Norm("layer"), post_ffn=Norm()),
            [
                "x ─┬→ Attention → LayerNorm → + ─┬→ MLP → RMSNorm → + →",
                "   └──────────────────────────┘  └──────────────────┘",
            ],
        ),
        (Layer(Mamba(64, 4, 4, 3), None, pre_ffn=None), ["x ─┬→ RMSNorm → Mamba → + →", "   └────────────────────┘"]),
        (
            dataclasses.replace(LLAMA, parallel=True),
            ["x ─┬→ RMSNorm → Attention ─┐", "   ├→ RMSNorm → MLP ───────┤", "   └───────────────────────┴→ + →"],
        ),
        (
            dataclasses.replace(LLAMA, parallel=True, pre_ffn=None),
            ["x ─┬→ RMSNorm ─┬→ Attention ─┐", "   │           └→ MLP ───────┤", "   └─────────────────────────┴→ + →"],
        ),
        (
            dataclasses.replace(
                LLAMA, parallel=True, pre_ffn=None, post_mixer=Norm("layer"), post_ffn=Norm(),
                ffn=MoE(4, 2, MLP(20), True),
            ),
            [
                "x ─┬→ RMSNorm ─┬→ Attention → LayerNorm ─┐", "   │           └→ MoE → RMSNorm ─────────┤",
                "   └─────────────────────────────────────┴→ + →",
            ],
        ),
    ],
)
def test_wiring(layer, drawn):
    assert wiring(layer) == drawn


@pytest.mark.parametrize(
    "part, said",
    [
        (
            Attention(8, 2, 16, Rope(5e5, "interleaved"), window=9, sinks=True),
            "Attention(H=8, K=2, d=16, rope=Rope(θ=500000, layout=interleaved), window=9, sinks)",
        ),
        (Mamba(64, 4, 4, 3, conv_bias=False), "Mamba(I=64, N=4, conv=4, R=3, no conv_bias)"),
        (Norm("layer", 1e-5, bias=True), "LayerNorm(ε=1e-05, bias)"),
        (Norm("rms_outer"), "RMSNorm(kind=rms_outer, ε=1e-06)"),
        (
            c.LongRope((1.0, 1.5, 2.0, 2.5), (3.0,) * 4, 16),
            "LongRope(short=(1, 1.5, 2, … 4 in all), long=(3, 3, 3, … 4 in all), original=16)",
        ),
    ],
)
def test_a_part_in_one_line(part, said):
    assert brief(part) == said


@pytest.mark.parametrize("layers, said", [
    ("aaaa", "4 × a"),
    ("ab" * 16, "16 times (1 × a, 1 × b)"),
    ("aaaaab" * 4 + "aa", "4 times (5 × a, 1 × b), 2 × a"),
    ("a" + "b" * 60, "1 × a, 60 × b"),
    ("aab" + "cd" * 3, "2 × a, 1 × b, 3 times (1 × c, 1 × d)"),
    ("mmmammm" * 2, "2 times (3 × m, 1 × a, 3 × m)"),
])
def test_patterns(layers, said):
    found = pattern(layers)
    assert spelt(found) == layers
    assert found == said


def spelt(text: str) -> str:
    """A pattern, layer by layer."""
    text = re.sub(r"(\d+) times \(([^)]*)\)", lambda m: ", ".join([m[2]] * int(m[1])), text)
    return "".join(int(count) * name for count, name in re.findall(r"(\d+) × (\w)", text))


def test_patterns_of_many_layers_are_found_at_once():
    drawn = torch.randint(0, 3, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    layers = "".join("abc"[i] for i in drawn)
    assert spelt(pattern(layers)) == layers


def test_names_of_kinds():
    wide = dataclasses.replace(LLAMA, ffn=MLP(200))
    window, scan = (
        dataclasses.replace(LLAMA, mixer=dataclasses.replace(LLAMA.mixer, window=9)),
        dataclasses.replace(LLAMA, mixer=Mamba(64, 4, 4, 3)),
    )
    sparse = dataclasses.replace(LLAMA, ffn=MoE(4, 2, MLP(20), True))
    assert names([LLAMA]) == ["Attention + MLP"] and names([LLAMA, wide]) == ["Attention + MLP 1", "Attention + MLP 2"]
    assert names([window, LLAMA]) == ["sliding", "full"] and names([LLAMA, sparse]) == ["MLP", "MoE"]
    assert names([scan, window, LLAMA, sparse]) == ["Mamba + MLP", "sliding + MLP", "full + MLP", "full + MoE"]


def test_numbers():
    assert [amount(n) for n in (0, 7, 999, 1000, 12_345, 999_600, 8.03e9)] == [
        "0 ", "7 ", "999 ", "1 k", "12.3 k", "1 M", "8.03 G",
    ]
    assert [billions(n) for n in (124_439_808, 8_030_261_248, 671_026_419_200)] == ["124 M", "8.03 B", "671.03 B"]


# ---- words

def test_a_llama_differs_in_nothing():
    assert sentences(ModelConfig(97, 48, (LLAMA,) * 3)) == ["in nothing"]


def test_words():
    assert sentences(preset("mistral-7b")) == ["mixer: a query sees 4096 keys, itself included"]
    layer = Layer(
        Attention(4, 2, 16, None, qkv_bias=True, alibi=c.Alibi(coarse=True), qk_norm=Norm(scope="all")),
        MLP(48, "gelu", gated=False), pre_mixer=Norm("layer", bias=True), pre_ffn=None, parallel=True,
    )
    windowed = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=8))
    assert sentences(
        ModelConfig(97, 48, (layer, windowed), Norm("layer", bias=True), positions=32, embed_scale=8.0)
    ) == [
        "wiring: mixer and feed-forward read the same x and are added together",
        "norm before the mixer, last norm: LayerNorm: the mean is taken out, a bias",
        "mixer: the heads are 64 wide together, the stream 48",
        "mixer: biases on q, k and v",
        "mixer: a penalty linear in distance (ALiBi)",
        "mixer: its penalties rounded to bfloat16",
        "rotation: none, q and k stay as they are",
        "norm of q and k: there is one, over all heads as one vector",
        "norm before the feed-forward: none",
        "feed-forward: gelu in place of silu",
        "feed-forward: two matrices, no gate",
        "[sliding] mixer: a query sees 8 keys, itself included",
        "model: the embedding times 8",
        "model: a learned table of 32 positions is added to the embedding",
    ]


def test_every_field_that_is_no_size_has_its_words():
    """A new field with a default is a difference from Llama: say it in WORDS."""
    special = {
        "Layer.pre_mixer", "Layer.post_mixer", "Layer.pre_ffn", "Layer.post_ffn", "ModelConfig.final_norm",
        "ModelConfig.embed_norm",
        *(f"{kind}.{field}" for kind in ("Attention", "ChunkedAttention", "CrossLayerAttention", "NormedValueAttention")
          for field in ("qk_norm", "rope")),
    }  # said by of_norm and of_mixer
    kinds = [
        kind
        for kind in c.Part.BY_NAME.values()
        if kind.__module__.startswith("nanollm.") and kind not in get_args(c.Scaling)
    ]
    for kind in filter(dataclasses.is_dataclass, kinds):
        known, fields = words_of(kind), {f"{kind.__name__}.{field.name}": field for field in dataclasses.fields(kind)}
        for name, field in fields.items():
            size = SIZES & {name, field.name}
            assert name in known or name in special or size or field.default is dataclasses.MISSING, (
                f"no words for {name}"
            )
        assert not {name for name in known if name.startswith(f"{kind.__name__}.")} - fields.keys()


# ---- the command

VALUES = dict(
    model_type="llama", vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, torch_dtype="float16",
)


def shown(monkeypatch, capsys, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["show", *args])
    show_command.run()
    return capsys.readouterr().out


def test_a_folder_a_file_and_a_preset(tmp_path, monkeypatch, capsys):
    checkpoints.save(Decoder(ModelConfig(97, 48, (LLAMA,) * 3, context=128)), tmp_path / "whole")
    whole = shown(monkeypatch, capsys, str(tmp_path / "whole"))
    size = sum(p.numel() for p in Decoder(ModelConfig(97, 48, (LLAMA,) * 3)).parameters())
    assert f"parameters  {size:,} ({billions(size)})\n" in whole
    assert (
        f"weights     {amount(4 * size)}B of float32 in 30 tensors and 1 file(s)\n" in whole
        and "for 128 tokens in float32" in whole
    )

    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    for source in (tmp_path, tmp_path / "config.json"):
        assert "B in float16\n" in shown(monkeypatch, capsys, str(source))
    assert shown(monkeypatch, capsys, "llama-8b", "--context", "100").endswith("Llama3(factor=8, original=8192)\n")
    assert json.loads(shown(monkeypatch, capsys, "llama-8b", "--json"))["parameters"] == 8_030_261_248


@pytest.mark.filterwarnings("ignore:params.json has no key for the context:UserWarning")
def test_every_layout(tmp_path):
    """The same model, but for the channels that turn together, which the layouts hold in another order."""
    config = ModelConfig(97, 48, (LLAMA,) * 3, context=32_768)
    checkpoints.save(Decoder(config), tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "as mistral")
    values = {
        key: value
        for key, value in json.loads((tmp_path / "hf" / "config.json").read_text()).items()
        if not key.endswith("_bias")
    }
    (tmp_path / "as mistral" / "config.json").write_text(
        json.dumps(values | {"model_type": "mistral", "sliding_window": None})
    )
    for source, layout in (("hf", "nanollm"), ("hf", "meta"), ("as mistral", "mistral")):
        convert(plan(open_source(tmp_path / source), layout), tmp_path / layout)
    found = {name: find(str(tmp_path / name)) for name in ("hf", "nanollm", "mistral")}
    assert found["hf"].config == found["nanollm"].config == with_rope_layout(found["mistral"].config, "half")
    assert found["mistral"].config.layers[0].mixer.rope.layout == "interleaved"
    size = amount(4 * sum(p.numel() for p in Decoder(config).parameters()))
    assert {one.weights for one in found.values()} == {f"{size}B of float32 in 30 tensors and 1 file(s)"}
    assert find(str(tmp_path / "mistral" / "params.json")) == found["mistral"]
    with pytest.raises(CheckpointError, match="only pickled weights"):
        find(str(tmp_path / "meta"))


def test_a_config_whose_weights_are_pickles_or_in_eight_bits_is_shown(tmp_path):
    eight = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "other.json").write_text(json.dumps(VALUES | {"quantization_config": eight}))
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert find(str(tmp_path)) == find(str(tmp_path / "other.json")) == (read_config(VALUES)[1], torch.float16, None)


def test_a_name_on_the_hub_has_its_config_fetched_and_no_weights(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    asked, files = {}, [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name: SimpleNamespace(siblings=files))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **more: asked.update(more, name=name) or str(tmp_path)
    )
    assert "float16" in shown(monkeypatch, capsys, "owner/name") and asked == {
        "name": "owner/name", "allow_patterns": ["config.json"],
    }


def test_what_is_stored_is_said_by_dtype(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**VALUES, "torch_dtype": None}))
    save_file({"a": torch.zeros(500, dtype=torch.bfloat16), "b": torch.zeros(10)}, tmp_path / "model.safetensors")
    found = find(str(tmp_path))
    assert (
        found.weights == "1 kB of bfloat16, 40 B of float32 in 2 tensors and 1 file(s)"
        and found.dtype == torch.bfloat16
    )


def test_what_cannot_be_shown_is_said(tmp_path):
    with pytest.raises(
        ConfigError, match="lama-8b: no such file or folder, and no preset 'lama-8b'; did you mean llama-8b"
    ):
        find("lama-8b")
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**VALUES, "num_hidden_layers": 0}))
    with pytest.raises(ConfigError, match="num_hidden_layers is 0"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="zip archive"):
        find(str(tmp_path))
    with pytest.raises(InputError, match="--context 33: expected 1 to 32 tokens"):
        describe(ModelConfig(97, 48, (LLAMA,), positions=32), 33)
    with pytest.raises(InputError, match="--context 0: expected 1 to 2147483648 tokens"):
        describe(ModelConfig(97, 48, (LLAMA,)), 0)
    with pytest.raises(ConfigError, match="a tensor beyond any memory"):
        describe(ModelConfig(2**31, 2**31 - 1, (LLAMA,)))


@pytest.mark.slow
def test_an_error_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "checkpoints.show", str(tmp_path)], cwd=Path(__file__).parent.parent,
        capture_output=True, text=True,
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (f"error: {tmp_path / 'config.json'}: no such file; a model folder expected: config.json "
                           "beside model.safetensors\n")
