"""What a session, a batch and a thread survive: interrupts at any place, two answers at once, rows that have stopped.

An interrupt comes as a signal does, between two operations: of torch (a dispatch mode raises at the n-th), or of Python
(a trace function raises at the n-th line of nanollm's). What is said afterwards is compared with a fresh session.
"""

import gc
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
from nanollm.config import MLP, Attention, DynamicNTK, Layer, ModelConfig, Rope
from nanollm.errors import InputError
from nanollm.inference.generation import Session, StopText, answer_batch, feed, generate, generate_batch, new_cache
from nanollm.model import Decoder
from tests.fixtures import FIXTURES, MAIN, slow_but
from tests.oracles import make_loud, write
from tests.test_consistency import KINDS, LONG

PACKAGE = str(Path(sys.modules[Decoder.__module__].__file__).parent)


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> Decoder:
    return decoder(KINDS[request.param])


def decoder(layers: tuple[Layer, ...]) -> Decoder:
    made = Decoder(ModelConfig(vocab=50, dim=32, layers=layers)).eval()
    make_loud(made)
    return made.requires_grad_(False)


# ---- interrupts

class RaiseAtOperation(TorchDispatchMode):
    """Raises before the n-th operation of torch, or, `after`, when it has been done."""

    def __init__(self, n: int, error: type[BaseException], after: bool) -> None:
        super().__init__()
        self.left, self.error, self.after = n, error, after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = func(*args, **(kwargs or {}))
        if self.left == 0:
            raise self.error
        return result


@contextmanager
def raise_at_line(n: int, error: type[BaseException], only: str = "") -> Iterator[None]:
    """Raises before the n-th line that Python runs in nanollm's files, or in those of them with such a name."""
    left = n

    def trace(frame, event, _):
        nonlocal left
        if not (frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_filename.endswith(only)):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def size(run: Callable[[], object], way: str) -> int:
    """How many operations or lines a run has."""
    many = 1 << 40
    if way == "line":
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            count += event == "line"
            return trace
        before = sys.gettrace()
        sys.settrace(trace)
        run()
        sys.settrace(before)
        return count
    with RaiseAtOperation(many, KeyboardInterrupt, False) as mode:
        run()
    return many - mode.left


@pytest.mark.parametrize("trials", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_session_is_right_after_an_interrupt_at_any_place(model, trials):
    """Two turns, the second interrupted; what is asked next, the same, a longer or another prompt, is answered as by a
    fresh session, and so is a turn after it."""
    first, turn = [5, 17, 3, 44, 8, 21, 2], [9, 8, 7]
    answer = list(generate(model, first, 2))
    second = first + answer + turn

    def started() -> Session:
        session = Session(model, 64)
        list(session.generate(first, 2))
        return session

    counts = {}
    for way in ("operation", "line"):
        session = started()
        counts[way] = size(lambda session=session: list(session.generate(second, 3)), way)
        assert counts[way] > 50
    places, fresh = random.Random(0), {}
    for trial in range(trials):
        way = ("operation", "line")[trial % 2]
        session, n, said = started(), places.randint(1, counts[way]), []
        error = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)[trial % 3]
        stop = RaiseAtOperation(n, error, trial % 4 == 0) if way == "operation" else raise_at_line(n, error)
        try:
            with stop:
                for token in session.generate(second, 3):
                    said.append(token)
        except error:
            pass
        follow = [second, second + said + turn, [1, *second]][trial % 3]
        if tuple(follow) not in fresh:
            fresh[tuple(follow)] = list(generate(model, follow, 2))
        found = list(session.generate(follow, 2))
        assert found == fresh[tuple(follow)], (way, n, counts, len(said))
    whole = [*follow, *found, 6]
    assert list(session.generate(whole, 2)) == list(generate(model, whole, 2))


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return decoder(KINDS["window"])


def test_interrupts_at_the_lines_of_the_session_itself():
    """Each line of the generator, of each of its rounds: the ones between which a place could be lost."""
    made = decoder(KINDS["full"][:1])
    first, more = [5, 17, 3], [5, 17, 3, 9, 8]
    expected, ended = list(generate(made, more, 3)), False
    for n in itertools.count(1):
        session = Session(made, 32)
        list(session.generate(first, 1))
        try:
            with raise_at_line(n, KeyboardInterrupt, only="generation.py"):
                list(session.generate(more, 2))
            ended = True
        except KeyboardInterrupt:
            pass
        assert list(session.generate(more, 3)) == expected, n
        if ended:
            break
    assert n > 60


def test_an_interrupted_turn_keeps_what_was_read(plain):
    """Between two tokens nothing is lost: the next turn reads only what is new."""
    session = Session(plain, 64)
    stream = session.generate([5, 17, 3, 44], 20)
    said = list(itertools.islice(stream, 3))
    stream.close()
    assert stream.answer.ended == "interrupted" and stream.answer.tokens == said
    fed = []
    hook = plain.embed.register_forward_hook(lambda _, args, __: fed.append(args[0].shape[1]))
    prompt = [5, 17, 3, 44, *said, 9, 8]
    found = list(session.generate(prompt, 4))
    hook.remove()
    assert fed[0] == 3 and found == list(generate(plain, prompt, 4))     # the last token said, and two new ones


def test_the_memory_of_a_session_is_given_back_before_new_is_asked_for(plain, monkeypatch):
    session, alive = Session(plain, 64), []
    list(session.generate([1, 2, 3], 2))

    def counted(*arguments):
        gc.collect()
        alive.append(sum(state is not None for state in session.cache.states))
        return new_cache(*arguments)

    monkeypatch.setattr("nanollm.inference.generation.new_cache", counted)
    list(session.generate([9, 2, 3], 2))
    assert alive == [0]


# ---- two answers at once

def test_of_two_answers_of_a_session_the_older_one_ends(plain):
    session, prompt, other = Session(plain, 64), [5, 17, 3, 44], [9, 8, 7]
    older, newer = session.generate(prompt, 9), session.generate(other, 9)
    begun = [next(older), next(older)]
    said = [next(newer)]
    with pytest.raises(InputError, match="a newer answer of this session has begun"):
        next(older)
    assert older.answer.ended == "interrupted" and older.answer.tokens == begun == list(generate(plain, prompt, 2))
    assert said + list(newer) == list(generate(plain, other, 9)) and newer.answer.ended == "length"
    late = session.generate(prompt, 3)                   # it begins when it is first asked, not when it is made
    assert list(session.generate(other, 2)) == list(generate(plain, other, 2))
    assert list(late) == list(generate(plain, prompt, 3))


def torch_globals() -> tuple:
    """The switches of torch that a product on a CPU depends on."""
    return (torch.backends.mkldnn.enabled, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.deterministic, torch.get_float32_matmul_precision())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_generate_at_once(dtype):
    """Two sessions of one model in two threads say what each says alone; torch stands as before."""
    plain = decoder(KINDS["window"]).to(dtype)
    prompts, before = ([5, 17, 3, 44], [9, 8, 7]), torch_globals()
    expected = [list(generate(plain, prompt, 30, temperature=0.8, seed=1)) for prompt in prompts]
    found: list[list[list[int]]] = [[], []]
    together = threading.Barrier(2)

    def work(row: int) -> None:
        for _ in range(5):
            together.wait(30)
            session = Session(plain, 64)
            found[row].append(list(session.generate(prompts[row], 30, temperature=0.8, seed=1)))

    threads = [threading.Thread(target=work, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    after, torch.backends.mkldnn.enabled = torch_globals(), before[0]
    assert found == [[each] * 5 for each in expected] and after == before


# ---- rows that have stopped

PROMPTS = [[3, 4, 5, 6, 7], [8, 9] * 12, [11]]           # where the longest stops first, nothing is left for it to see


def check_rows_that_stop(model: Decoder) -> None:
    """Rows end at different steps, each of them first; what goes on says in greedy mode what it says alone."""
    vocab = model.config.vocab
    alone = [list(generate(model, prompt, 6)) for prompt in PROMPTS]
    seen_by_padding(model)
    stop = alone[1][0]                                   # of the longest, so at its first step
    found = generate_batch(model, PROMPTS, 6, stop_ids=[stop])
    assert found == [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in alone]
    for answer in answer_batch(model, PROMPTS, 12, stop_ids=range(0, vocab, 3), temperature=1.0, seed=0):
        assert (answer.ended == "stop") == (answer.tokens[-1] % 3 == 0) and max(answer.tokens) < vocab
        assert answer.ended == "stop" or len(answer.tokens) == 12


def seen_by_padding(model: Decoder) -> None:
    """The logits of padding are finite, of one token and of several: nothing that is not a number may enter a cache."""
    longest = max(map(len, PROMPTS))
    for width in (1, 3):
        cache = new_cache(model, 3, longest + 6)
        x = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in PROMPTS])
        places = torch.arange(longest) * torch.ones(3, 1, dtype=torch.long)
        feed(model, x, places.where(places < torch.tensor([[len(prompt)] for prompt in PROMPTS]), -1), cache)
        for _ in range(2):
            at = torch.full((3, width), -1)
            at[0] = cache.lengths[0] + torch.arange(width)
            assert feed(model, torch.full((3, width), 5), at, cache).isfinite().all()


def test_rows_that_see_nothing_are_harmless_in_every_mixer(model):
    check_rows_that_stop(model)


@pytest.mark.parametrize("name", slow_but(["gemma2-27b", "gpt-oss-full-first", "bloom-7b1", "falcon-rw-1b"], MAIN))
def test_rows_that_see_nothing_are_harmless_in_every_architecture(name, tmp_path):
    write(FIXTURES[name], tmp_path)
    check_rows_that_stop(checkpoints.load(tmp_path))


# ---- batches

def test_an_empty_batch_has_no_answers(plain):
    assert generate_batch(plain, [], 5) == [] and answer_batch(plain, [], 5, temperature=1.0) == []


class Letters:
    """A tokenizer's stream of one letter a token."""

    def push(self, id: int) -> str:
        return chr(ord("A") + id)


def test_stop_texts_stop_the_work_too(plain):
    """Alone and in a batch: no token is made behind the text at which an answer ends."""
    whole = list(generate(plain, [5, 17, 3], 20))
    text = "".join(map(Letters().push, whole))
    stop = text[5:8]
    end = text.index(stop) + 3
    fed = []
    hook = plain.embed.register_forward_hook(lambda _, args, __: fed.append(args[0].shape))
    stream = generate(plain, [5, 17, 3], 20, stop=lambda: StopText(Letters(), ["not there", stop]))
    assert list(stream) == whole[:end] and stream.answer.ended == "stop"
    together = answer_batch(plain, [[5, 17, 3], [5, 17, 3]], 20, stop=lambda: StopText(Letters(), [stop]))
    hook.remove()
    assert [answer.tokens for answer in together] == [whole[:end]] * 2 and len(fed) == 2 * end
    assert {answer.ended for answer in together} == {"stop"}
    with pytest.raises(InputError, match="a stop text is empty"):
        StopText(Letters(), ["x", ""])


@pytest.mark.parametrize("cuts", [["ab", "cd"], ["a", "b", "c", "d"], ["abcd"]])
@pytest.mark.parametrize("texts, stops", [(["bc"], True), (["abcd"], True), (["d", "x"], True), (["ac"], False),
                                          ([], False)])
def test_a_stop_text_is_found_wherever_the_pieces_are_cut(cuts, texts, stops):
    class Pieces:
        def push(self, id: int) -> str:
            return cuts[id]

    stop = StopText(Pieces(), texts)
    assert any([stop(token) for token in range(len(cuts))]) == stops


def test_answers_say_why_they_end(plain):
    whole = list(generate(plain, [1, 2, 3], 12))

    def ended(session: Session, most: int, **how) -> tuple[int, str | None]:
        stream = session.generate([1, 2, 3], most, **how)
        return len(list(stream)), stream.answer.ended

    assert ended(Session(plain, 50), 12) == (12, "length")
    assert ended(Session(plain, 8), 12) == (5, "context") and ended(Session(plain, 3), 1) == (0, "context")
    assert ended(Session(plain, 8), 5) == (5, "length") and ended(Session(plain, 8), 0) == (0, "length")
    assert ended(Session(plain, 8), 12, stop_ids=whole[4:5]) == (whole.index(whole[4]) + 1, "stop")
    stream = generate(plain, [1, 2, 3], 12)
    assert next(stream) == whole[0] and stream.answer.ended is None and stream.answer.tokens == whole[:1]
    unasked = generate(plain, [1, 2, 3], 12)
    unasked.close()
    assert unasked.answer.ended == "interrupted" and list(unasked) == []
    assert [answer.ended for answer in answer_batch(plain, [[1], [2]], 0)] == ["length"] * 2


# ---- frequencies that follow the length

@pytest.mark.parametrize("scaling", [DynamicNTK(2.0, 16), LONG], ids=["dynamic", "longrope"])
def test_a_new_token_that_has_the_sequence_read_again_is_no_single_row(scaling, monkeypatch):
    """Products of many rows run with torch as it stands: what is chosen for a single row must not reach them."""
    made = decoder((Layer(Attention(4, 2, 8, Rope(scaling=scaling)), MLP(48)),) * 2).bfloat16()
    seen = []
    hook = made.layers[0].register_forward_hook(
        lambda _, args, __: seen.append((args[0].shape[1], torch.backends.mkldnn.enabled)))
    list(generate(made, list(range(14)), 6))
    hook.remove()
    before = torch.backends.mkldnn.enabled
    read_again = [enabled for rows, enabled in seen[1:] if rows > 1]
    assert read_again and all(enabled == before for enabled in read_again)
