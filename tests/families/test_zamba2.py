"""Zamba2: what is shared is there once and is meant at each use, what is refused, and adapters as peft runs them."""

import copy

import pytest
import torch
from peft import PeftModel

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import Mamba2, SharedBlockScan
from nanollm.errors import CheckpointError, ConfigError, InputError
from nanollm.model import Decoder
from nanollm.training import growing, lora
from tests.fixtures import FIXTURES
from tests.oracles import difference, tokens, transformers, write

MAMBA, HYBRID = "mamba", "hybrid"
SEVEN_B = dict(  # the shape of Zamba2-7B
    model_type="zamba2", architectures=["Zamba2ForCausalLM"], adapter_rank=128, add_bias_linear=False,
    attention_dropout=0.0, attention_head_dim=224, attention_hidden_size=7168, chunk_size=256, hidden_act="gelu",
    hidden_size=3584, intermediate_size=14336, kv_channels=112, mamba_d_conv=4, mamba_d_state=64, mamba_expand=2,
    mamba_headdim=64, mamba_ngroups=2, max_position_embeddings=4096, n_mamba_heads=112, num_attention_heads=32,
    num_hidden_layers=81, num_key_value_heads=32, num_mem_blocks=2, num_query_groups=32, rms_norm_eps=1e-5,
    rope_theta=10000, tie_word_embeddings=True, use_conv_bias=True, use_long_context=False, use_mem_rope=True,
    use_shared_attention_adapter=False, vocab_size=32000,
    layers_block_type=[HYBRID if i in (6, 11, *range(17, 78, 6)) else MAMBA for i in range(81)],
)


def test_seven_billion():
    config = read_config(SEVEN_B)[1]
    with torch.device("meta"):
        model = Decoder(config)
    assert [layer.mixer.block.number for layer in config.layers if isinstance(layer.mixer, SharedBlockScan)] == (
        [0, 1] * 6 + [0])
    first = config.layers[6].mixer
    assert first.scan == config.layers[0].mixer == Mamba2(112, 64, 2, 64, 4, least_step=0.001)
    assert first.block.attention.scale == pytest.approx((224 / 2) ** -0.5) and first.qkv_rank is None
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.36e9, rel=0.01)
    assert read_config(write_config(config, FAMILIES["zamba2"])[1])[1] == config


@pytest.mark.parametrize("keys, cause", [
    (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
    (dict(use_long_context=True), "use_long_context is True"),
    (dict(num_attention_heads=33), "num_attention_heads is 33; expected a divisor of twice hidden_size"),
    (dict(n_mamba_heads=100), "n_mamba_heads is 100; expected a divisor of mamba_expand"),
    (dict(hybrid_layer_ids=[6]), "hybrid_layer_ids is "),
    (dict(layers_block_type=["attention"] * 81), "layers_block_type is .* hybrid or linear_attention"),
])
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(SEVEN_B | keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("zamba2") / "m"
    write(FIXTURES["zamba2-1.2b"], where)
    return where


def test_a_shared_weight_is_one_parameter_with_the_gradient_of_all_its_uses(folder):
    model, x = checkpoints.load(folder), tokens(FIXTURES["zamba2-1.2b"])
    name = "shared.0.attention.q.weight"
    assert [each for each in model.state_dict() if each.endswith("attention.q.weight")] == [name]
    model(x).square().mean().backward()
    apart = copy.deepcopy(model)                    # a block for each layer, of the same values
    apart.zero_grad()
    blocks = [copy.deepcopy(apart.shared["0"]) for _ in range(4)]
    uses = iter(blocks)
    apart.shared["0"].forward = lambda *args: next(uses)(*args)
    apart(x).square().mean().backward()
    grads = [block.attention.q.weight.grad for block in blocks]
    assert torch.allclose(model.get_parameter(name).grad, sum(grads), atol=1e-6)
    assert min(grad.norm() for grad in grads) > 1e-3 * sum(grads).norm()


def test_blocks_of_one_number_must_be_one():
    config = read_config(SEVEN_B)[1]
    layers = list(config.layers)
    other = read_config(SEVEN_B | dict(intermediate_size=64))[1]
    layers[6] = other.layers[6]
    with torch.device("meta"), pytest.raises(ConfigError, match="which another layer has under this number"):
        Decoder(type(config)(config.vocab, config.dim, tuple(layers)))


def test_adapters_are_beside_what_each_layer_has_of_its_own(folder, tmp_path):
    x, model = tokens(FIXTURES["zamba2-1.2b"]), checkpoints.load(folder)
    with pytest.raises(InputError, match="no weight of the layers is called q,"):
        lora.add(model, lora.LoRA(2, 4, targets=("q",)))
    lora.add(model, lora.LoRA(2, 4))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    checkpoints.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.inference_mode():
        expected, plain = theirs.eval()(x).logits, checkpoints.load(folder)(x)
        assert difference(model(x), expected) < 1e-5 < 0.1 < difference(plain, expected)
        assert difference(checkpoints.load(folder, adapter=tmp_path / "adapter")(x), expected) < 1e-5


def test_an_adapter_beside_a_shared_weight_is_refused(folder, tmp_path):
    import peft
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="several layers use this weight"):
        checkpoints.load(folder, adapter=tmp_path / "adapter")


def test_a_copied_layer_uses_the_block_of_the_one_it_copies(folder):
    model, x = checkpoints.load(folder), tokens(FIXTURES["zamba2-1.2b"])
    config, values = growing.more_layers(model, model.config, dict(model.named_parameters()), 3)
    grown = growing.rebuilt(model, config, {name: value.detach() for name, value in values.items()})
    with torch.inference_mode():
        assert torch.equal(grown(x), model(x)) and len(grown.layers) == 9 and len(grown.shared) == 1
