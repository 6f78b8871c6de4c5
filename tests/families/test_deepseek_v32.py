"""DeepSeek-V3.2 and GLM-5: which layers rank keys, what the chosen keys are, and what is refused."""

import dataclasses

import pytest
import torch

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import Indexer, LatentAttention, ModelConfig, Rope, SparseLatentAttention, Yarn
from nanollm.errors import ConfigError
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mask import AttentionMask
from nanollm.layers.sparse_attention import Index
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import make_loud, tokens, write

V32 = dict(
    model_type="deepseek_v32", attention_bias=False, ep_size=1, first_k_dense_replace=3, hidden_act="silu",
    hidden_size=7168, index_head_dim=128, index_n_heads=64, index_topk=2048, intermediate_size=18432, kv_lora_rank=512,
    max_position_embeddings=163840, moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256,
    n_shared_experts=1, norm_topk_prob=True, num_attention_heads=128, num_experts_per_tok=8, num_hidden_layers=61,
    num_key_value_heads=128, num_nextn_predict_layers=1, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
    rms_norm_eps=1e-6, rope_theta=10000, routed_scaling_factor=2.5, scoring_func="sigmoid", tie_word_embeddings=False,
    rope_scaling={"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                  "original_max_position_embeddings": 4096, "type": "yarn"},
    topk_group=4, topk_method="noaux_tc", v_head_dim=128, vocab_size=129280,
)
GLM = dict(
    model_type="glm_moe_dsa", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=8,
    num_attention_heads=6, num_key_value_heads=6,
)


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_published_sizes():
    config = read(V32)
    mixer = config.layers[0].mixer
    rope = Rope(10_000.0, "interleaved", scaling=Yarn(40.0, 4096, attention_factor=1.0))
    index = Indexer(64, 128, 2048)
    assert mixer == SparseLatentAttention(128, 128, 64, 128, 512, 1536, rope, mixer.scale, indexer=index)
    plain = {key: value for key, value in V32.items() if not key.startswith("index_")} | {"model_type": "deepseek_v3"}
    fields = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(LatentAttention)}
    assert LatentAttention(**fields) == read_config(plain)[1].layers[0].mixer
    with torch.device("meta"):
        own = 64 * 128 * 1536 + 128 * 7168 + 2 * 128 + 64 * 7168                # of an index
        extra = 61 * own
        assert sum(p.numel() for p in Decoder(config).parameters()) == sum(
            p.numel() for p in Decoder(read_config(plain)[1]).parameters()) + extra


def test_which_layers_rank_keys():
    def kinds(**keys):
        return "".join("S" if layer.mixer.indexer is None else "F" for layer in read(GLM, **keys).layers)
    assert kinds() == "FFFFFFFF"
    assert kinds(index_topk_freq=4) == "FFSSSFSS" and kinds(index_topk_freq=4, index_skip_topk_offset=3) == "FFFSSSFS"
    assert kinds(index_topk_pattern="FSSFSSFS", index_topk_freq=4) == "FSSFSSFS"
    assert kinds(indexer_types=["full"] + ["shared"] * 7, index_topk_freq=4) == "FSSSSSSS"
    config = read(GLM, index_topk_freq=4)
    assert read_config(write_config(config, FAMILIES["glm_moe_dsa"])[1])[1] == config


def test_the_index_by_its_equation():
    """Token by token and head by head, as eq. 1 says; the chosen keys are the largest."""
    torch.manual_seed(0)
    config = SparseLatentAttention(2, 6, 4, 6, 12, 10, Rope(), indexer=Indexer(5, 8, 3))
    index, x, source = Index(config, 16), torch.randn(1, 7, 16), torch.randn(1, 7, 10)
    make_loud(index)
    ctx = ForwardContext(torch.arange(7)[None], True, torch.float32)
    keys, q = index.keys(x, ctx), index.rotated(index.q(source).unflatten(-1, (5, 8)).transpose(1, 2), ctx)
    chosen = index.choose(x, source, keys, AttentionMask(ctx, None), ctx)
    for t in range(7):
        w = index.weights(x)[0, t]
        scores = [sum(w[j] * torch.relu(q[0, j, t] @ keys[0, 0, s]) for j in range(5)) for s in range(t + 1)]
        best = sorted(range(t + 1), key=lambda s: -scores[s])[:3]
        assert chosen[0, 0, t].nonzero().flatten().tolist() == sorted(best)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5.2"])
def test_up_to_the_number_of_keys_it_is_plain_latent_attention(name, tmp_path):
    write(FIXTURES[name], tmp_path)
    model = checkpoints.load(tmp_path)
    layers = tuple(dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, indexer=None))
                   for layer in model.config.layers)
    plain = Decoder(dataclasses.replace(model.config, layers=layers))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".index." not in key})
    x = tokens(FIXTURES[name])
    assert torch.equal(model(x[:, :9]), plain(x[:, :9])) and not torch.equal(model(x)[:, 9:], plain(x)[:, 9:])


REFUSED = {
    "the first shares": (GLM, dict(index_topk_pattern="SFFFFFFF"), "indexer_types is missing; expected 8 times full"),
    "too few": (GLM, dict(indexer_types=["full"]), "expected 8 times full or shared, of which the first is full"),
    "another rotation": (GLM, dict(indexer_rope_interleave=False), "indexer_rope_interleave is False"),
    "queries without a latent": (V32, dict(q_lora_rank=None), "q_lora_rank is None"),
    "full layers": (V32, dict(layer_types=["full_attention"] * 61), "layer_types"),
    "an index too narrow": (V32, dict(index_head_dim=32), "a head_dim of at least the 64 channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    base, keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(base, **keys)
