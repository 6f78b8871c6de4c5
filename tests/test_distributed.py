"""Many ranks are one computation: train.py and its parts on gloo, against one process.

Ranks are forked (forked.py), which gives them what torchrun does and saves most of the time. Under torchrun itself
are the run of two machines, which must equal one process too, and the error that all ranks meet, of which torchrun
has a say; test_resume.py has what torchrun starts on one machine, which must equal forked ranks.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import train
from tests import forked, ranks
from tests.toys import grammar

ROOT = Path(__file__).parent.parent

def torchrun(ranks: int, *args: object) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*start, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def launch(ranks: int, function: Callable[[], None], *args: object) -> None:
    """Run the main function of a script on so many ranks; all must end with 0."""
    ended = forked.start(ranks, function, *args).end(300)
    assert ended.codes == [0] * ranks, ended.said


def case(name: str, size: int, folder: Path, replicas: int = 1) -> dict:
    launch(size, ranks.run, name, folder / "found.json", replicas)
    return json.loads((folder / "found.json").read_text())


# ---- train.py

@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    from nanollm.data import prepare as text
    folder = grammar(tmp_path_factory.mktemp("text"))
    text.prepare(text.read(folder), folder / "shards", vocab=300, tokenizer=None, context=32)
    return folder / "shards"


def steps(folder: Path) -> list[dict]:
    return [entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in entry]


def options(out: Path, *more: object) -> tuple:
    return (
        "--out", out, "--steps", 8, "--context", 32, "--batch-size", 8, "--warmup", 2, "--lr", 0.003, "--dtype",
        "float32", "--sample-every", 0, "--eval-every", 8,
        *more,
    )


def run(size: int, out: Path, *more: object) -> list[dict]:
    launch(size, train.run, *options(out, *more))
    return steps(out)


def furthest(a: list[dict], b: list[dict], key: str = "loss") -> float:
    assert [entry["step"] for entry in a] == [entry["step"] for entry in b] and len(a) == 8
    return max(abs(x[key] - y[key]) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """One process with one big batch, for each set of options, on demand."""
    done: dict[tuple, tuple[list[dict], Path]] = {}

    def get(*args: object) -> tuple[list[dict], Path]:
        if args not in done:
            out = tmp_path_factory.mktemp("alone") / "run"
            done[args] = run(1, out, *args), out
        return done[args]

    return get


@pytest.mark.parametrize("what, size, more", [
    ("llama", 2, ("--micro-batch", 2)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("llama", 2, ()), ("llama", 1, ("--micro-batch", 2)), ("llama", 4, ("--replicas", 2)),
        ("llama --optimizer adamw", 2, ("--micro-batch", 2)), ("mixtral", 2, ("--micro-batch", 2)), ("mamba", 2, ())]),
], ids=str)
def test_losses_equal_those_of_one_process_and_one_big_batch(shards, alone, tmp_path, what, size, more):
    model = ("--preset", *what.split(), "--data", shards)
    one, _ = alone(*model)
    many = run(size, tmp_path / "run", *model, *more)
    assert furthest(one, many) <= 1e-6
    assert furthest(one, many, "balance") < 1e-5
    assert max(abs(a["gradient_norm"] / b["gradient_norm"] - 1) for a, b in zip(one, many, strict=True)) < 2e-5
    assert all(entry["worst_rank_loss"] >= entry["loss"] - 1e-9 for entry in many)


@pytest.mark.slow
def test_unequal_token_counts_weigh_alike_however_the_batch_is_cut(shards, alone, tmp_path):
    """Chats: rows with few answers and rows with many. 2 ranks × 2 micro-batches = 1 × 4 = one big batch."""
    rng = np.random.default_rng(1)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(
            json.dumps({"prompt": "alpha " * int(rng.integers(1, 4)), "completion": "beta " * int(rng.integers(1, 9))})
            + "\n"
            for _ in range(200)
        )
    )
    _, model = alone("--preset", "llama", "--data", shards)
    # AdamW takes whole steps where a gradient is nothing but rounding, and they grow with the rate
    chat = ("--init", model, "--chat", chats, "--optimizer", "adamw", "--lr", 0.0003)
    one = run(1, tmp_path / "one", *chat)
    assert len({entry["targets"] for entry in one}) > 4
    for size, micro in ((1, 2), (2, 2)):
        many = run(size, tmp_path / f"{size}x{micro}", *chat, "--micro-batch", micro)
        assert furthest(one, many) <= 1e-6 and [a["targets"] for a in one] == [b["targets"] for b in many]
        assert all(abs(a["gradient_norm"] / b["gradient_norm"] - 1) < 2e-5 for a, b in zip(one, many, strict=True))
    means = run(2, tmp_path / "two", *chat)
    assert (
        max(entry["worst_rank_loss"] - entry["loss"] for entry in means) > 0.01
    )  # a mean of means would have been another number


@pytest.mark.slow
def test_held_out_loss_and_the_model_that_is_written_are_those_of_one_process(shards, alone, tmp_path):
    import checkpoints
    _, one = alone("--preset", "llama", "--data", shards)
    run(2, tmp_path / "run", "--preset", "llama", "--data", shards)
    held_out = [
        [
            entry["held_out_loss"]
            for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            if "held_out_loss" in entry
        ]
        for folder in (one, tmp_path / "run")
    ]
    assert len(held_out[0]) == 2 and max(abs(a - b) for a, b in zip(*held_out, strict=True)) < 5e-6
    a, b = (checkpoints.load(folder).state_dict() for folder in (one, tmp_path / "run"))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


@pytest.mark.slow
def test_two_machines_are_one_process(shards, alone, tmp_path):
    """The command of docs/training.md, both of its agents on this machine: each has a worker, and meets the other on a
    port of the loopback device."""
    model = ("--preset", "llama", "--data", shards)
    one, _ = alone(*model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--rdzv-backend", "c10d", "--rdzv-id", "demo", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr",
                "127.0.0.1", "train.py", *map(str, options(tmp_path / "run", *model))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                                "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    agents = [subprocess.Popen(launcher, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        said = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    many = steps(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["ranks"] == 2
    assert furthest(one, many) <= 1e-6


# ---- its parts

@pytest.mark.parametrize("size, replicas", [(1, 1), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_weights_drawn_in_slices_are_those_drawn_whole(tmp_path, size, replicas):
    for name, (count, same, tied) in case("initial", size, tmp_path, replicas).items():
        assert count == same > 20 and tied, name


@pytest.mark.slow
def test_recomputed_activations_change_no_bit(tmp_path):
    found = case("recompute", 2, tmp_path)
    for name in ("llama", "mixtral"):
        assert found[f"{name} none"] == found[f"{name} selective"] == found[f"{name} full"]


def test_a_block_that_layers_share_is_one_on_many_ranks(tmp_path):
    """It is gathered at each use, and its gradients of all uses are summed. So it is with keys of another layer."""
    one, two = case("shared", 1, tmp_path), case("shared", 2, tmp_path)
    for what in ("", "keys "):
        none, full = f"{what}none", f"{what}full"
        assert one[none] == one[full] and two[none] == two[full]
        assert np.allclose(one[none][::2], two[none][::2], rtol=0, atol=1e-6)               # losses
        assert np.allclose(one[none][1::2], two[none][1::2], rtol=2e-5, atol=0)             # gradient norms


@pytest.mark.slow
def test_every_variant_computes_the_same(tmp_path):
    one, two = case("variants", 1, tmp_path), case("variants", 2, tmp_path)
    for name in ("plain", "offload", "mamba", "mixtral"):
        assert np.allclose(one[name][::2], two[name][::2], rtol=0, atol=1e-6), name            # losses
        assert np.allclose(one[name][1::2], two[name][1::2], rtol=2e-5, atol=0), name          # gradient norms
    assert one["offload"] == one["plain"]
    rounding = np.abs(np.array(two["bfloat16"]) - one["plain"])[::2]
    assert 1e-6 < rounding.max() < 5e-2 and np.abs(np.array(two["bfloat16"]) - one["bfloat16"])[::2].max() < 5e-3


def test_one_rank_is_not_sharded_and_casts_its_weights_by_itself(tmp_path):
    for found in case("casts", 1, tmp_path).values():
        assert found == {
            "inside": ["torch.bfloat16"], "same": True, "in place": True, "kinds": ["Parameter"],
            "gradients": ["torch.float32"],
        }


def test_experts_that_ranks_do_not_divide_are_cut_inside(tmp_path):
    one, two = case("experts", 1, tmp_path), case("experts", 2, tmp_path)
    assert one["slice"] == [3, 160, 128] and two["slice"] == [3, 80, 128]
    assert abs(one["loss"] - two["loss"]) <= 1e-6 and abs(one["sum"] / two["sum"] - 1) < 1e-6


def test_a_rank_holds_its_share_and_no_more(tmp_path):
    assert case("memory", 1, tmp_path)["share"] == 1.0
    assert 0.5 <= case("memory", 2, tmp_path)["share"] < 0.51
    assert 0.5 <= case("memory", 4, tmp_path, replicas=2)["share"] < 0.51


def test_what_is_not_finite_on_one_rank_is_seen_by_all(tmp_path):
    for loss, gradient in case("broken", 2, tmp_path)["all"]:
        assert loss == ["nan", "nan"] and gradient[0] == "nan" and gradient[1] != "nan"


def test_ranks_agree(tmp_path):
    found = case("together", 2, tmp_path)
    assert found == {
        "caught": ["the last rank's file is gone"] * 2, "first": ["once", None], "total": [2, 1], "gathered": [0, 1],
    }


@pytest.mark.slow
def test_an_error_is_said_once_and_ends_all_ranks(tmp_path):
    done = torchrun(2, "train.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert (
        done.returncode != 0
        and done.stderr.count("error: ") == 1
        and "nowhere: no such file" in done.stderr
        and not (tmp_path / "run").exists()
    )
