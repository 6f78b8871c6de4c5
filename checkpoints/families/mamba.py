"""Mamba, the first, and Falcon-Mamba: a selective scan in place of attention and MLP both.

    x += mixer(norm(x))          inner width = intermediate_size, or expand · hidden_size where that is missing

    mamba            the `-hf` repositories; the original ones, which have no model_type, are read in mamba2.py
    falcon_mamba     RMS norms without gain on the low-rank Δ, on B and on C, with an ε of their own, `mixer_rms_eps`

`time_step_rank` is a number, or "auto", which is hidden_size / 16 rounded up. Two defaults are unlike other families':
head and embedding are tied, and the residual stream stays in float32 whatever the weights are. Falcon-Mamba's norm of Δ
is before dt_proj. (The fused kernel that transformers would train with has it after: another model.)
"""


from checkpoints.families.family import Family
from checkpoints.names.config_rows import Expand, LayerCount, Rank
from checkpoints.names.config_table import field, flag, number, only, part, size
from checkpoints.names.table import override, rule, under
from nanollm.config import Layer, Mamba, Norm

SCAN = {name: name for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")}
MAMBA_NAMES = override(
    {},
    *under("", "", {"backbone.embeddings": "embed", "backbone.norm_f": "norm", "lm_head": "head"}),
    rule("backbone.layers.{i}.norm", "layers.{i}.pre_mixer"),
    *under("backbone.layers.{i}.mixer", "layers.{i}.mixer", SCAN),
)
OLD_NAMES = override(MAMBA_NAMES, rule("backbone.embedding", "embed"))


IRRELEVANT = frozenset("""
    rescale_prenorm_residual time_step_floor time_step_init_scheme time_step_max time_step_min time_step_scale
    use_associative_scan use_mambapy use_falcon_mambapy fused_add_norm d_model n_layer pad_vocab_size_multiple
""".split())  # initialisation, which code runs it, and the sizes by their old names

MAMBA = Family(
    "mamba", "MambaForCausalLM",
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim"), "num_hidden_layers": LayerCount(),
        "expand": Expand(missing=2),
        # Falcon-Mamba-7B has 8192 here, which is 2 · 4096, beside an `expand` of 16 that means nothing
        "intermediate_size": size("mixer.inner", missing=field("mixer.inner"), null=field("mixer.inner")),
        "d_inner": only(field("mixer.inner")),
        "state_size": size("mixer.state", missing=16), "conv_kernel": size("mixer.conv", missing=4),
        "time_step_rank": Rank(),
        "use_conv_bias": flag("mixer.conv_bias", missing=True), "use_bias": flag("mixer.bias", missing=False),
        "layer_norm_epsilon": number("final_norm.eps", "pre_mixer.eps", missing=1e-5),
        "tie_word_embeddings": flag("tied", missing=True), "residual_in_fp32": flag("float32_residual", missing=True),
        "hidden_act": only("silu", written=True), "rms_norm": only(True), "ssm_cfg": only({}),
    },
    layer=part(Layer, mixer=part(Mamba), ffn=None, pre_mixer=part(Norm), pre_ffn=None),
    names=(MAMBA_NAMES, OLD_NAMES), irrelevant=IRRELEVANT,
)
FALCON_MAMBA = MAMBA.but(
    "falcon_mamba", "FalconMambaForCausalLM", names=(MAMBA_NAMES,), layer={"mixer.inner_norm": part(Norm, gain=False)},
    keys={"mixer_rms_eps": number("mixer.inner_norm.eps", missing=1e-6)},
)
FAMILIES = {"mamba": MAMBA, "falcon_mamba": FALCON_MAMBA}
