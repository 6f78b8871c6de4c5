"""Shards, the stream, batches: a damaged file never becomes a batch, and a batch depends on the seed and its rows
only."""

import json
import os
import struct
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nanollm.data import shards
from nanollm.data import stream as data
from nanollm.data.shards import Shard, write_shard
from nanollm.data.stream import Stream, Tokens, open_folder, shuffle, stack
from nanollm.errors import DataError

DIGEST = "0123456789abcdef" * 4


def write(path: Path, ids: list[int], *, vocab: int = 300, end: int | None = 0, digest: str | None = DIGEST) -> Path:
    write_shard(path, np.array(ids, shards.id_dtype(vocab)), end=end, digest=digest)
    return path


def opened(path: Path, ids: list[int], context: int, **options) -> Tokens:
    return Tokens("x", [Shard(write(path, ids))], context, **options)


# ---- shards

def llmc_read(path: Path) -> list[int]:
    """The checks of llm.c's dataloader.h, and its train_llama3.py for 32 bits, written down again."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    form, size = {20240520: ("H", 2), 20240801: ("I", 4)}[header[0]]
    assert header[1] == {20240520: 1, 20240801: 7}[header[0]] and header[2] > 0
    assert len(content) == 256 * 4 + header[2] * size
    return list(struct.unpack(f"<{header[2]}{form}", content[1024:]))


def llmc_write(path: Path, ids: list[int], magic: int) -> Path:
    """write_datafile of llm.c's data_common.py."""
    version, form = {20240520: (1, "H"), 20240801: (7, "I")}[magic]
    path.write_bytes(
        struct.pack("<256i", magic, version, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}{form}", *ids)
    )
    return path


@pytest.mark.parametrize(
    "vocab, magic, size", [(300, 20240520, 2), (65536, 20240520, 2), (65537, 20240801, 4), (200_000, 20240801, 4)]
)
def test_llmc_reads_our_shards_and_the_ids_are_as_wide_as_the_vocabulary_asks(tmp_path, vocab, magic, size):
    ids = [0, vocab - 1, 7, 0]
    path = write(tmp_path / "train.bin", ids, vocab=vocab, end=7)
    assert llmc_read(path) == ids and struct.unpack("<i", path.read_bytes()[:4]) == (magic,)
    shard = Shard(path)
    assert shard.tokens.tolist() == ids and shard.dtype.itemsize == size and shard.count == 4
    assert (shard.largest, shard.end, shard.digest) == (vocab - 1, 7, DIGEST)
    shard.verify(vocab)
    assert Shard(write(path, ids, vocab=vocab, end=None, digest=None)).end is None and Shard(path).digest is None


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_we_read_llmc_shards(tmp_path, magic):
    shard = Shard(llmc_write(tmp_path / "train.bin", [5, 65535, 0, 9], magic))
    assert shard.tokens.tolist() == [5, 65535, 0, 9] and (shard.largest, shard.end, shard.digest) == (None, None, None)
    shard.verify(65536)


def test_raw_files_are_16_bits_wide_unless_meta_json_says_otherwise(tmp_path):
    np.arange(2000, dtype="<u2").tofile(tmp_path / "train.bin")
    assert Shard(tmp_path / "train.bin").tokens.tolist() == list(range(2000))
    (tmp_path / "meta.json").write_text('{"dtype": "uint32"}')
    np.array([70_000, 1], "<u4").tofile(tmp_path / "train.bin")
    assert Shard(tmp_path / "train.bin").tokens.tolist() == [70_000, 1]
    for content, words in (
        ('{"dtype": "float"}', "dtype: found 'float'"), ("[", "cannot be read"), ("[]", "found a list"),
    ):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(DataError, match=f"meta.json.*{words}"):
            Shard(tmp_path / "train.bin")


def patched(path: Path, at: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[4 * at : 4 * at + 4] = struct.pack("<I", value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated: found 1043 bytes, expected 1044"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), "truncated: found 700 bytes, expected 1024"),
        (
            lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
            "wrong size: found 1046 bytes, expected 1044 for the 10 tokens",
        ),
        (lambda path: path.write_bytes(b"\1\0\2"), "found 3 bytes, expected 2 for each token of a raw uint16"),
        (lambda path: path.write_bytes(b""), "found 0 bytes"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: patched(path, 0, 20240522), "magic 20240522, expected 20240520 or 20240801"),
        (lambda path: patched(path, 1, 2), "version 2, expected 1"),
        (lambda path: patched(path, 2, 0), "for the 0 tokens"),
        (lambda path: patched(path, 3, 1), "found 1 as integer 3"),
    ],
)
def test_a_file_that_cannot_be_a_shard_is_refused_when_it_is_opened(tmp_path, spoil, words):
    path = write(tmp_path / "train.bin", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    spoil(path)
    with pytest.raises(DataError, match=words) as error:
        Shard(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_bit_that_flips_anywhere_is_found(tmp_path):
    """In each integer of the header, the zeros included, and in the tokens."""
    path = write(tmp_path / "train.bin", [*range(300)], digest=DIGEST)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    places = [32 * integer + int(rng.integers(32)) for integer in (*range(16), 100, 255)] + rng.integers(
        0, 8 * len(whole), 90
    ).tolist()
    for place in places:
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(DataError, match="train.bin: "):
            Shard(path).verify(300)
    path.write_bytes(whole)
    Shard(path).verify(300)


@pytest.mark.parametrize("kind", ["ours", "llm.c", "raw"])
def test_an_id_that_the_vocabulary_lacks_is_named_with_its_place(tmp_path, kind):
    ids, path = [1] * 5_000_000, tmp_path / "train.bin"                         # more than is read at once
    ids[4_000_000], ids[4_500_000] = 77, 99
    if kind == "raw":
        np.array(ids, "<u2").tofile(path)
    else:
        write(path, ids) if kind == "ours" else llmc_write(path, ids, 20240520)
    for vocab, found in ((77, "id 77 at token 4000000"), (78, "id 99 at token 4500000")):
        with pytest.raises(DataError, match=f"found {found}, expected ids below {vocab}"):
            Shard(path).verify(vocab)
    Shard(path).verify(100)


@pytest.mark.parametrize("change, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:-20]), "changed since the run began: found 1084 bytes"),
    (lambda path: os.utime(path, ns=(1, 1)), "changed since the run began"),
    (lambda path: path.unlink(), "changed since the run began: No such file"),
])
def test_a_file_that_changes_during_the_run_is_found(tmp_path, change, words):
    tokens = opened(tmp_path / "train.bin", [*range(40)], 8)
    tokens.unchanged()
    change(tmp_path / "train.bin")
    for call in (tokens.unchanged, lambda: tokens.verify(300)):
        with pytest.raises(DataError, match=words):
            call()
    if "found" in words or "such" in words:                                     # not a bus error
        with pytest.raises(DataError, match=words):
            tokens.row(0)


def test_writing_refuses_what_llmc_could_not_read_and_leaves_nothing_behind(tmp_path, monkeypatch):
    for count in (0, 2**31):
        with pytest.raises(DataError, match=f"{count} tokens for one shard"):
            write_shard(tmp_path / "a.bin", np.broadcast_to(np.uint16(0), count), end=0, digest=None)
    with pytest.raises(DataError, match="cannot be written: No such file"):
        write(tmp_path / "none" / "a.bin", [1])
    write(tmp_path / "a.bin", [1, 2])

    def full(*_) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="a.bin: cannot be written: No space left"):
        write(tmp_path / "a.bin", [3])
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"] and llmc_read(tmp_path / "a.bin") == [1, 2]


# ---- windows

def test_positions_begin_again_with_each_document(tmp_path):
    ids = [0, 5, 6, 0, 7, 8, 9, 0, 5, 5, 3]
    batch = stack([opened(tmp_path / "a.bin", ids, 5).row(i) for i in (0, 1)])
    assert batch.tokens.tolist() == [[0, 5, 6, 0, 7], [8, 9, 0, 5, 5]] and batch.tokens.dtype == torch.int64
    assert batch.targets.tolist() == [[5, 6, 0, 7, 8], [9, 0, 5, 5, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    edges = opened(tmp_path / "b.bin", [0, 5, 6, 0, 7, 8, 9], 3)  # documents begin at the edges: nothing to isolate
    assert stack([edges.row(0), edges.row(1)]).positions is None
    assert stack([edges.row(0), opened(tmp_path / "c.bin", [5, 0, 6, 7], 3).row(0)]).positions.tolist() == [
        [0, 1, 2], [0, 0, 1],
    ]


def test_a_raw_file_has_no_documents_unless_the_mark_is_given_and_a_header_knows_better(tmp_path):
    np.array([5, 1, 6, 0, 7], "<u2").tofile(tmp_path / "raw.bin")
    write(tmp_path / "ours.bin", [5, 1, 6, 0, 7], end=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, end, positions in (
            ("raw", None, [0, 1, 2, 3]), ("raw", 1, [0, 0, 1, 2]), ("ours", None, [0, 1, 2, 0]),
            ("ours", 1, [0, 1, 2, 0]),
        ):
            assert open_folder(tmp_path / f"{name}.bin", 4, end)[0].row(0)[2].tolist() == positions


def test_windows_run_on_from_shard_to_shard(tmp_path):
    """However the stream is cut, the rows are the same; shards of one token, too."""
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 50, 101)]
    for number, cuts in enumerate([(0, 101), (0, 10, 11, 12, 60, 101), (0, 7, 14, 21, 100, 101)]):
        parts = [Shard(write(tmp_path / f"{number}-{a}.bin", ids[a:b])) for a, b in pairwise(cuts)]
        for context in (7, 100):
            tokens = Tokens("x", parts, context)
            assert tokens.rows == 100 // context
            rows = [tokens.row(i) for i in range(tokens.rows)]
            assert sum((row[0].tolist() for row in rows), []) == ids[: tokens.rows * context]
            assert sum((row[1].tolist() for row in rows), []) == ids[1 : tokens.rows * context + 1]


def test_held_out_windows_predict_each_token_once_and_the_last_is_filled_up(tmp_path):
    ids = [0, 5, 6, 7, 0, 8, 9, 4]
    held = opened(tmp_path / "a.bin", ids, 3, short=True)
    rows = [held.row(i) for i in range(held.rows)]
    assert [row[1].tolist() for row in rows] == [[5, 6, 7], [0, 8, 9], [4, -100, -100]]
    assert [row[0].tolist() for row in rows] == [[0, 5, 6], [7, 0, 8], [9, 4, 0]]
    assert [row[2].tolist() for row in rows] == [[0, 1, 2], [0, 0, 1], [0, 1, 0]]
    assert opened(tmp_path / "b.bin", ids[:7], 3, short=True).rows == 2 and opened(tmp_path / "c.bin", ids, 3).rows == 2
    short = opened(tmp_path / "d.bin", [0, 5], 64, short=True).row(0)
    assert short[1].tolist() == [5] + [-100] * 63
    with pytest.raises(AssertionError):
        held.row(3)


def test_too_few_tokens_for_one_window_are_an_error(tmp_path):
    assert opened(tmp_path / "a.bin", [*range(9)], 8).rows == 1
    with pytest.raises(DataError, match="8 tokens do not fill one context of 8"):
        opened(tmp_path / "b.bin", [*range(8)], 8)


def test_the_fingerprint_is_of_the_bytes_and_not_of_the_names(tmp_path):
    made = [
        opened(tmp_path / name, ids, 4).fingerprint
        for name, ids in (("a", [*range(9)]), ("b", [*range(9)]), ("c", [*range(8), 9]))
    ]
    assert made[0] == made[1] != made[2]
    raw = []
    for name, last in (("d", 8), ("e", 8), ("f", 9)):
        np.array([*range(8), last], "<u2").tofile(tmp_path / name)
        raw.append(Tokens("x", [Shard(tmp_path / name)], 4).fingerprint)
    assert raw[0] == raw[1] != raw[2]


# ---- folders

@pytest.mark.parametrize(
    "train, held_out",
    [
        (["train.bin"], ["val.bin"]),
        (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], ["fineweb_val_000000.bin"]),
        (["tiny_shakespeare_train.bin"], ["tiny_shakespeare_val.bin"]),
        (["train-99999.bin", "train-100000.bin"], ["held_out-00000.bin"]),  # in the order of numbers, not of letters
        (["train.bin"], []),
    ],
)
def test_a_folder_is_read_by_the_names_that_are_in_use(tmp_path, train, held_out):
    (tmp_path / "README.md").write_text("x")
    for number, name in enumerate(train + held_out):
        write(tmp_path / name, [number] * 5)
    found = open_folder(tmp_path, 4)
    assert data.is_shard_folder(tmp_path) and [shard.path.name for shard in found[0].shards] == train
    assert ([shard.path.name for shard in found[1].shards] if found[1] else []) == held_out
    assert open_folder(tmp_path / train[0], 4)[1] is None


def test_a_folder_without_shards_says_what_it_holds(tmp_path):
    for files, words in (
        ([], "found nothing, expected"), (["a.txt", "val.bin"], "found a.txt, val.bin, expected shards named train"),
    ):
        for name in files:
            (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=words):
            open_folder(tmp_path, 4)
    assert not data.is_shard_folder(tmp_path) and not data.is_shard_folder(tmp_path / "none")
    with pytest.raises(DataError, match="none: found no such file or folder"):
        open_folder(tmp_path / "none", 4)


@pytest.mark.parametrize("other, words", [
    (dict(vocab=70_000), "dtype: found uint32, expected uint16"),
    (dict(end=3), "end: found 3, expected 0"),
    (dict(digest="ab" * 32), "digest: found abab"),
])
@pytest.mark.parametrize("name", ["train-00001.bin", "held_out-00000.bin"])
def test_shards_of_different_tokenizers_do_not_mix(tmp_path, name, other, words):
    write(tmp_path / "train-00000.bin", [*range(9)])
    write(tmp_path / name, [*range(9)], **other)
    with pytest.raises(DataError, match=f"{name}: {words}"):
        open_folder(tmp_path, 4)


def test_two_sets_in_one_folder_and_a_count_that_meta_json_denies_are_errors(tmp_path):
    write(tmp_path / "a_train.bin", [*range(9)])
    write(tmp_path / "b_train.bin", [*range(9)])
    with pytest.raises(DataError, match="two sets, a_train.bin and b_train.bin"):
        open_folder(tmp_path, 4)
    (tmp_path / "b_train.bin").unlink()
    for facts, words in (
        (
            {"train_tokens": 18, "held_out_tokens": 0},
            r"found \[9, 0\] tokens to train on and held out, expected \[18, 0\]",
        ),
        (None, "unfinished"),
    ):
        (tmp_path / "meta.json").write_text(json.dumps({"format": 1, **({"facts": facts} if facts else {})}))
        with pytest.raises(DataError, match=words):
            open_folder(tmp_path, 4)


# ---- the order of rows

@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000, 4096, 100_003])
def test_shuffle_is_a_permutation_and_one_number_goes_where_an_array_sends_it(count):
    moved = shuffle(np.arange(count, dtype=np.uint64), count, (0, 0, 0))
    assert np.array_equal(np.sort(moved), np.arange(count))
    some = range(0, count, 1 + count // 100)
    assert [shuffle(i, count, (0, 0, 0)) for i in some] == moved[list(some)].tolist()


def test_shuffle_differs_by_every_part_of_its_key_and_is_the_same_everywhere():
    orders = {
        key: tuple(shuffle(i, 1000, key) for i in range(1000))
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, 0))
    }
    assert len(set(orders.values())) == len(orders)
    same = [
        sum(a == b for a, b in zip(orders[0, 0, 0], other, strict=True))
        for key, other in orders.items()
        if key != (0, 0, 0)
    ]
    assert max(same) < 10  # two orders at random agree at one place
    assert orders[0, 0, 0][:5] == (806, 840, 718, 619, 827)  # another order would break runs that go on


def test_shuffle_sends_a_number_everywhere_and_parts_neighbours():
    """χ² with 49 degrees of freedom: 99.9 % of random draws are below 85.4."""
    for index in (0, 1, 49):
        counts = np.bincount([shuffle(index, 50, (seed, 0, 0)) for seed in range(5000)], minlength=50)
        assert ((counts - 100) ** 2 / 100).sum() < 85.4
    gaps = np.diff(shuffle(np.arange(10_000, dtype=np.uint64), 10_000, (0, 0, 0)).astype(np.int64))
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1] + 0.5) < 0.05             # of an order at random: −1/2
    assert (np.abs(gaps) < 100).mean() == pytest.approx(0.0199, abs=0.006)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Tokens]:
    """Of 37, 5 and 200 windows; the first token of each window says which one it is."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        Tokens(
            f"s{n}",
            [
                Shard(
                    write(
                        folder / f"{n}.bin", [1000 * n + i for i in range(rows) for _ in range(4)] + [9], vocab=5000,
                        end=4999,
                    )
                )
            ],
            4,
        )
        for n, rows in enumerate((37, 5, 200))
    ]


def test_an_epoch_is_every_window_once_and_the_next_epoch_has_another_order(sources):
    stream = Stream(sources[:1], None, seed=3)
    epochs = [
        [int(stream.batch(row, 1).tokens[0, 0]) for row in range(37 * epoch, 37 * epoch + 37)] for epoch in range(3)
    ]
    assert all(sorted(epoch) == [*range(37)] for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert [stream.place(row)[1] for row in (0, 36, 37, 73, 74)] == [0, 0, 1, 1, 2]
    assert epochs[0] != [int(Stream(sources[:1], None, seed=4).batch(row, 1).tokens[0, 0]) for row in range(37)]


def test_a_batch_depends_on_the_seed_and_its_rows_only(sources):
    for some, weights in ((sources[:1], None), (sources, [3, 1, 2])):
        whole, again = Stream(some, weights, seed=3).batch(2**40, 8), Stream(some, weights, seed=3)
        halves = [again.batch(2**40 + 4, 4), again.batch(2**40, 4)][::-1]       # in any order
        assert torch.equal(whole.tokens, torch.cat([half.tokens for half in halves]))
        assert torch.equal(whole.targets, torch.cat([half.targets for half in halves]))
        assert not torch.equal(whole.tokens, Stream(some, weights, seed=4).batch(2**40, 8).tokens)


@pytest.mark.parametrize("weights, counts", [
    ([1, 1, 2], [256, 256, 512]),
    ([0.7, 0.2, 0.1], [717, 205, 102]),                                         # 716.8, 204.8, 102.4
    ([1, 1, 1], [342, 341, 341]),
    ([5, 0, 5], [512, 0, 512]),
    (None, [157, 21, 846]),                                                     # 37 : 5 : 200 of 242
])
def test_each_block_holds_each_source_exactly_by_its_weight_in_an_order_of_its_own(sources, weights, counts):
    stream = Stream(sources, weights, seed=0)
    blocks = [[stream.place(row)[0] for row in range(1024 * b, 1024 * b + 1024)] for b in (0, 1, 77)]
    assert all([block.count(i) for i in range(3)] == counts for block in blocks) and blocks[0] != blocks[1]
    drawn = {i for i in range(3) if counts[i]}
    assert all(set(half) == drawn for block in blocks for half in (block[:512], block[512:]))   # spread, not in a row


def test_a_source_below_one_row_in_1024_is_taken_as_what_it_is(sources):
    """FINDINGS 4.7. The block grows until the source has a row in it; it has its row in each block."""
    stream = Stream(sources, [1, 0.0008, 1], seed=0)
    assert stream.block == 1 << 11 and stream.counts == [1024, 1, 1023]         # 0.0008 of 2.0008 is 0.82 rows
    drawn = [stream.place(row) for row in range(6 << 11)]
    for block in range(6):
        rows = [source for source, _, _ in drawn[block << 11: (block + 1) << 11]]
        assert [rows.count(i) for i in range(3)] == stream.counts
    epochs = [place[1:] for place in drawn if place[0] == 1]
    assert [epoch for epoch, _ in epochs] == [0] * 5 + [1] and len(set(epochs[:5])) == 5    # it has five windows
    assert Stream(sources, [1, 1e-11, 1], seed=0).block > 1 << 35


def test_in_a_mixture_too_each_window_of_a_source_comes_once_an_epoch(sources):
    stream = Stream(sources, [1, 1, 2], seed=0)
    places = [stream.place(row) for row in range(5 * 1024)]
    for source, tokens in enumerate(sources):
        seen = [(epoch, window) for which, epoch, window in places if which == source]
        whole = len(seen) // tokens.rows
        assert len(set(seen)) == len(seen) and whole >= 12
        assert {pair for pair in seen if pair[0] < whole} == {
            (epoch, window) for epoch in range(whole) for window in range(tokens.rows)
        }
    row = next(row for row, place in enumerate(places) if place[0] == 2)
    assert int(stream.batch(row, 1).tokens[0, 0]) == 2000 + places[row][2]


@pytest.mark.parametrize(
    "weights, words",
    [
        ([1, 1e-13, 1], "s1: weight 1e-13 of 2 is less than one row in 1099511627776; expected more, or 0"),
        ([1, -1, 1], "0 or more"), ([1, float("nan"), 1], "0 or more"), ([1, float("inf"), 1], "0 or more"),
        ([0, 0, 0], "not all 0"), ([1, 2], "expected 3 numbers"),
    ],
)
def test_weights_that_cannot_be_are_refused(sources, weights, words):
    with pytest.raises(DataError, match=words):
        Stream(sources, weights, seed=0)


def test_the_fingerprint_of_a_stream_changes_with_all_that_changes_its_rows(sources):
    made = [
        Stream(some, weights, seed).fingerprint
        for some, weights, seed in (
            (sources, None, 0), (sources, None, 1), (sources, [1, 1, 1], 0), (sources[::-1], None, 0),
            (sources[:2], None, 0),
        )
    ]
    made.append(Stream([*sources[:2], Tokens("x", sources[2].shards, 8)], [157, 21, 846], 0).fingerprint)
    assert len(set(made)) == 6 and made[0] == Stream(sources, [157, 21, 846], 0).fingerprint
