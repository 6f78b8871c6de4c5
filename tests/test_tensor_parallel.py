"""Many ranks, each with a part of every layer, are one model. The reference is one process, which test_parity.py holds
to transformers. Ranks are forked (forked.py)."""

import json
from pathlib import Path

import pytest
import torch

import generate as script
from checkpoints import convert, load
from checkpoints.parts import load_part
from checkpoints.source import open_source
from nanollm.errors import CheckpointError, InputError, NanollmError
from nanollm.training.distributed import world
from tests import forked, tensor_ranks
from tests.fixtures import FIXTURES, ONCE, ONE_OF_EACH
from tests.oracles import write
from tests.terminals import scripted

# One of each thing that is divided; the others are slow.
KINDS = ["llama-3.2", "mixtral-8x22b", "mamba2-130m", "codestral-mamba", "deepseek-v3", "glm-5.2",
         "falcon-mamba-7b", "falcon-h1-0.5b", "qwen3-next-80b", "lfm2-1.2b", "recurrentgemma-narrow",
         "stripedhyena-7b", "olmo2-7b", "stablelm-2-12b", "gpt2-stanford", "phi-2", "gpt-oss-full-first",
         "llama-4-scout", "nemotron-3-super", "apertus-8b"]
ALIBI = "layer 0: Attention with ALiBi is not divided"
# What two ranks do not run, and why; a fixture that is not here has to.
REFUSED = {
    "baichuan-13b": ALIBI, "baichuan2-13b": ALIBI, "bloom-176b": ALIBI, "bloom-7b1": ALIBI, "falcon-rw-1b": ALIBI,
    "falcon-rw-6-heads": ALIBI, "mpt-7b": ALIBI, "mpt-clipped": ALIBI,
    "codegen-2b": "arranged in a way that is not divided among ranks",
    "yuan2-2b": "layer 0: FilteredAttention is not divided", "yuan2-51b": "layer 0: FilteredAttention is not divided",
    "rwkv-4": "layer 0: RWKV is not divided", "rwkv-4-tied": "layer 0: RWKV is not divided",
    "zamba-7b": "layer 0: MultiHeadMamba is not divided", "zamba-biases": "layer 0: SharedBlockScan is not divided",
    "zamba2-1.2b": "layer 1: SharedBlockScan is not", "zamba2-2.7b": "layer 1: SharedBlockScan is not",
    "zamba2-7b": "layer 0: SharedBlockScan is not divided",
    "gemma4-26b-a4b": "layer 0: NormedMoE is not divided",
    # these miniatures have an odd number of heads
    "olmo-hybrid-7b": "layer 0: GatedDeltaNet.key_heads is 3, which 2 ranks cannot share out",
    "olmo-hybrid-rotates": "layer 1: GatedDeltaNet.key_heads is 3, which 2 ranks",
    "qwen3-next-mixed": "layer 1: GatedDeltaNet.heads is 3, which 2 ranks",
    "stripedhyena-first": "layer 0: Hyena.heads is 1, which 2 ranks",
    "yi-34b-200k": "layer 0: Attention.heads is 7, which 2 ranks",
}


def on_ranks(ranks: int, names: list[str], folder: Path, *more: str) -> dict:
    """What the ranks found of these fixtures (tensor_ranks.py), by name; and of their requests."""
    for name in names:
        (folder / name).mkdir()
        write(FIXTURES[name], folder / name)
    out = folder / "found.json"
    ended = forked.start(ranks, tensor_ranks.run, out, *(folder / name for name in names), *more).end(400)
    assert ended.codes == [0] * ranks, ended.said
    return json.loads(out.read_text())


def need_one_model(found: dict, share: float) -> None:
    """Logits of one process, the same bits on all ranks; a rank has its share of the bytes, and has read no others."""
    requests = found.pop("requests")
    assert requests == requests[:1] * len(requests) and requests[0][0] == 8
    for name, one in found.items():
        assert max(one["apart"]) <= 1e-5 and one["alike"], (name, one)
        assert max(one["held"]) < share * one["whole"], (name, one)
        assert one["tied"] or all(map(int.__le__, one["read"], one["held"])), (name, one)


def test_two_ranks_are_one_model(tmp_path: Path) -> None:
    need_one_model(on_ranks(2, KINDS, tmp_path), share=0.6)


@pytest.mark.slow
def test_two_ranks_are_one_model_of_every_family(tmp_path: Path) -> None:
    names = sorted({*ONCE, *ONE_OF_EACH}.difference(KINDS, REFUSED))
    need_one_model(on_ranks(2, names, tmp_path), share=0.65)


def test_key_heads_and_groups_that_are_fewer_than_ranks(tmp_path: Path) -> None:
    need_one_model(on_ranks(4, ["llama-3.2", "mamba2-130m"], tmp_path), share=0.4)


def test_what_is_not_divided_is_refused_by_name(tmp_path: Path) -> None:
    for name, why in REFUSED.items():
        (tmp_path / name).mkdir()
        write(FIXTURES[name], tmp_path / name)
        with pytest.raises(NanollmError, match=why):
            load_part(tmp_path / name, 1, 2)
    (tmp_path / "llama").mkdir()
    write(FIXTURES["llama-3.2"], tmp_path / "llama")
    plan = convert.plan(open_source(tmp_path / "llama"), fewer="int8")
    convert.convert(plan, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="q_proj.weight is no plain tensor"):
        load_part(tmp_path / "packed", 0, 2)


def test_quantised_parts(tmp_path: Path) -> None:
    """Logits are as near to the model's as those of a quantised whole; rows of experts are those of the whole."""
    one = on_ranks(2, ["llama-3.2"], tmp_path, "--quantize", "int8")["llama-3.2"]
    assert 1e-4 < max(one["apart"]) < 1.5 * max(one["quantised"]) and one["alike"], one
    (tmp_path / "experts").mkdir()
    write(FIXTURES["mixtral-8x22b"], tmp_path / "experts")
    part, whole = load_part(tmp_path / "experts", 1, 2, quantize="int8"), load(tmp_path / "experts", quantize="int8")
    mine, all_of_it = (model.layers[2].ffn.experts.up.packed for model in (part, whole))
    assert torch.equal(mine, all_of_it[:, all_of_it.shape[1] // 2 :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(tmp_path_factory.mktemp("model"), ["Y", "e", "s"], context=64)


def cli(ranks: int, *arguments: object, text: str = "") -> forked.Ended:
    ended = forked.start(ranks, script.run, *arguments, stdin=text).end()
    assert "Traceback" not in ended.said, ended.said
    return ended


def test_generate_py_says_on_ranks_what_it_says_alone(folder: Path, tmp_path: Path) -> None:
    draw = ("--prompt", "-", "--temperature", 4, "--seed", 3, "--n", 3, "--max-new-tokens", 20)
    alone, two = (cli(ranks, "--model", folder, *draw, text="really?\n") for ranks in (1, 2))
    assert two.codes == [0, 0] and two.out == alone.out and len(set(two.out.split("---"))) == 4, two.said
    assert two.err.count("60 tokens for 3 answers") == 1 or two.err.count(" tokens for 3 answers") == 1
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"messages": [{"role": "user", "content": "really?"}]}\n')
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.jsonl"
        cli(ranks, "--model", folder, "--prompts", tmp_path / "in.jsonl", "--out", out, "--max-new-tokens", 5)
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text() != ""


@pytest.mark.parametrize("arguments, message", [
    (["--chat"], "error: --chat runs on one process, and torchrun started 2"),
    (["--ask", "x", "--system"], "expected one argument"),
    (["--prompt", "x", "--device", "cuda:1"], "error: --device cuda:1: torchrun started 2 processes"),
])
def test_what_is_wrong_is_said_once(folder: Path, arguments: list[str], message: str) -> None:
    ended = cli(2, "--model", folder, *arguments)
    assert ended.said.count(message) == 1 and ended.out == "" and 0 not in ended.codes, ended.said


def test_a_number_of_processes_without_a_rank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is 3 and RANK is not set"), world("cpu"):
        pass
