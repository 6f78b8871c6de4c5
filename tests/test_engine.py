"""The engine: whatever runs beside it, a request is answered as `generate` answers it alone.

Requests come, go, are cancelled, go on as the next turn of a chat, share prefixes and repeat each other, in random
order (seeded), for each mixer; then what fails inside, and what is refused.
"""

import random
import threading

import pytest
import torch

from nanollm.config import MLP, Attention, Layer, Mamba2, ModelConfig, Rope
from nanollm.errors import InputError
from nanollm.inference import engine as engine_file
from nanollm.inference.context import cache_bytes
from nanollm.inference.engine import Busy, Engine, Ticket
from nanollm.inference.generation import generate
from nanollm.inference.rows import RowCache
from nanollm.model import Decoder
from tests.oracles import make_loud
from tests.test_consistency import KINDS

VOCAB = 50


def decoder(layers: tuple[Layer, ...]) -> Decoder:
    made = Decoder(ModelConfig(vocab=VOCAB, dim=32, layers=layers)).eval()
    make_loud(made)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return decoder(KINDS["full"])


@pytest.fixture(scope="module")
def scan() -> Decoder:
    return decoder((Layer(Mamba2(6, 8, 1, 5, 3), MLP(48)), Layer(Attention(4, 2, 8, Rope(), window=5), MLP(48)),
                    Layer(Attention(4, 2, 8, Rope()), MLP(48))))


def alone(model: Decoder, ticket: Ticket) -> list[int]:
    return list(generate(model, ticket.prompt, ticket.finish.most, ticket.sampling, stop_ids=ticket.finish.ids))


def finish(engine: Engine) -> None:
    while engine.step():
        pass


# ---- as if alone

@pytest.mark.parametrize("name", KINDS)
def test_requests_in_random_order_are_answered_as_each_alone(name, monkeypatch):
    monkeypatch.setattr(engine_file, "CHUNK", 7)
    model, draw = decoder(KINDS[name]), random.Random(name)
    engine, tickets = Engine(model, slots=3, length=60, compiled=draw.choice([(), (1, 3)])), []     # or some rows idle
    shared = [draw.randrange(VOCAB) for _ in range(12)]

    def some(n: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(1, n))]

    while len(tickets) < 14:
        way, over = draw.random(), [each for each in tickets if each.done.is_set() and len(each.prompt) < 25]
        if way < 0.3 and over:                          # the next turn of a chat
            before = draw.choice(over)
            prompt = before.prompt + before.answer.tokens + some(4)
        elif way < 0.45 and tickets:                    # the same again
            prompt = draw.choice(tickets).prompt
        else:
            prompt = shared[: draw.randint(0, 12)] + some(9)
        drawn = {"temperature": 0.8, "seed": len(tickets)} if draw.random() < 0.3 else {}
        tickets.append(engine.submit(prompt, draw.randint(1, 12), stop_ids=[7], **drawn))
        if draw.random() < 0.15:
            draw.choice(tickets).cancel()
        for _ in range(draw.randint(0, 4)):
            engine.step()
    finish(engine)
    tickets.append(engine.submit([1, 2, 3], 4))
    finish(engine)
    tickets.append(engine.submit([1, 2, 3, *tickets[-1].answer.tokens, 9], 4))
    finish(engine)
    assert tickets[-1].reused == 6
    for ticket in tickets:
        assert ticket.error is None
        expected = alone(model, ticket)
        if ticket.cancelled and ticket.answer.ended == "interrupted":
            expected = expected[: len(ticket.answer.tokens)]
        assert ticket.answer.tokens == expected
    assert not engine.seated


def test_what_was_read_before_is_not_read_again(plain, scan):
    """The next turn of a chat, two answers to one prompt, a common beginning: how many tokens are read."""
    for model in (plain, scan):
        engine = Engine(model, slots=4, length=64)
        first = engine.submit(list(range(10)), 5)
        again = engine.submit(list(range(10)), 5)       # while the first one is being answered
        finish(engine)
        turn = engine.submit([*first.prompt, *first.answer.tokens, 1, 2], 5)
        finish(engine)
        other = engine.submit([*range(9), 30, 31, 32], 5)
        finish(engine)
        assert [each.reused for each in (first, again, turn, other)] == [0, 9, 14, 9]
        shorter = engine.submit([*range(6), 40, 41], 5)
        finish(engine)
        assert shorter.reused == (6 if model is plain else 0)      # a scan cannot go back to where nothing was marked
        for ticket in (first, again, turn, other, shorter):
            assert ticket.answer.tokens == alone(model, ticket)


def test_a_prefix_is_copied_where_its_row_would_lose_more_than_it_gives(plain):
    engine = Engine(plain, slots=2, length=64)
    long = engine.submit(list(range(30)), 1)
    finish(engine)
    engine.submit([*range(5), 40], 1)                   # shares 5 tokens, and goes to the other row
    finish(engine)
    again = engine.submit([*long.prompt, 3], 2)
    finish(engine)
    assert again.reused == 30 and again.answer.tokens == alone(plain, again)


def test_logprobs_and_ends_are_those_of_one_alone(plain):
    engine = Engine(plain, slots=2, length=20)
    tickets = [engine.submit([5, 17, 3], 6, logprobs=2, temperature=1.0, seed=3), engine.submit([9], 4),
               engine.submit([1, 2], 0), engine.submit(list(range(15)), 50)]
    finish(engine)
    stream = generate(plain, [5, 17, 3], 6, logprobs=2, temperature=1.0, seed=3)
    assert list(stream) == tickets[0].answer.tokens
    for one, other in zip(stream.answer.logprobs, tickets[0].wait().logprobs, strict=True):
        assert one.chosen.raw == pytest.approx(other.chosen.raw, abs=1e-5)
        assert [each.token for each in one.top] == [each.token for each in other.top]
    assert [ticket.answer.ended for ticket in tickets] == ["length", "length", "length", "context"]
    assert [len(ticket.answer.tokens) for ticket in tickets] == [6, 4, 0, 5]


def test_a_long_prompt_does_not_hold_up_who_is_answered(plain, monkeypatch):
    monkeypatch.setattr(engine_file, "CHUNK", 4)
    engine = Engine(plain, slots=2, length=64)
    short = engine.submit([1], 30)
    engine.step()
    engine.submit(list(range(40)), 1)
    counts = []
    for _ in range(9):
        engine.step()
        counts.append(len(short.answer.tokens))
    assert counts == list(range(3, 12))                 # the first step wrote two


# ---- one cache of rows

@pytest.mark.parametrize("name", ["full", "griffin", "filtered", "side by side"])
def test_rows_change_places(name):
    model = decoder(KINDS[name])
    rows, prompts = RowCache(model, 3, 32), ([1, 2, 3], list(range(10)), [9] * 5)
    for row, prompt in enumerate(prompts):
        rows.read(row, prompt)
    rows.exchange(0, 2)
    rows.exchange(1, 2)
    prompts = [prompts[2], prompts[0], prompts[1]]
    assert rows.tokens == [[*prompt] for prompt in prompts]
    logits = rows.read_together(0, [[4], [5], [6]])
    for row, prompt in enumerate(prompts):
        whole = model(torch.tensor([[*prompt, (4, 5, 6)[row]]]))[0, -1]
        assert (logits[row] - whole).abs().max() < 1e-4


# ---- failures

class Broken(Exception):
    pass


def test_who_fails_takes_no_other_with_it(plain):
    """A stop rule, a listener, a grammar and a pass through the model that break, beside an answer that goes on."""
    def breaks(*_) -> bool:
        raise Broken

    class Grammar:
        def mask(self, logits):
            raise Broken

        def accept(self, token):
            return False

    def poisoned(_, args):
        if (args[0] == 33).any():
            raise Broken

    hook = plain.embed.register_forward_pre_hook(poisoned)
    engine = Engine(plain, slots=4, length=64)
    good = [engine.submit([1, 2, 3], 12), engine.submit([4, 5], 9)]
    bad = [engine.submit([6], 9, stop=lambda: breaks), engine.submit([7], 9, listen=breaks),
           engine.submit([8], 9, constrain=Grammar), engine.submit([9, 33, 9], 9)]
    late = engine.submit([8, 8], 5)
    finish(engine)
    forced = engine.submit([1, 2, 3], 12, logit_bias={33: 100.0})       # it fails while it is written, beside another
    beside = engine.submit([4, 5], 9)
    finish(engine)
    hook.remove()
    for ticket in [*bad, forced]:
        assert ticket.answer.ended == "interrupted"
        with pytest.raises(Broken):
            ticket.wait(0)
    assert forced.answer.tokens == [33]
    for ticket in (*good, late, beside):
        assert ticket.answer.tokens == alone(plain, ticket)
    assert engine.counts["failed"] == 5


def test_numbers_that_are_none_stay_in_their_row(scan):
    """Of a token whose embedding is not a number: its request fails, and who gets its row next is answered right."""
    expected = list(generate(scan, [1, 2, 3], 5))
    poison = min(set(range(4, VOCAB)) - {*expected})
    row = scan.embed.weight[poison].clone()
    scan.embed.weight[poison] = torch.nan
    engine = Engine(scan, slots=2, length=32)
    bad, beside = engine.submit([poison] * 12, 5), engine.submit([1, 2, 3], 5)      # one after the other, in row 0
    engine.submit([1] * 12, 5)                          # so long that all that failed lies in slots that are read
    finish(engine)
    after = [engine.submit([1, 2, 3], 5), engine.submit([1, 2, 3], 5)]
    finish(engine)
    scan.embed.weight[poison] = row
    with pytest.raises(InputError, match="infinite or not a number"):
        bad.wait(0)
    assert [ticket.answer.tokens for ticket in (beside, *after)] == [expected] * 3


# ---- refusals

def test_what_is_refused_is_refused_at_once(plain):
    engine = Engine(plain, slots=1, length=16, queue=2)
    for prompt, message in (([], "prompt is empty"), ([50], "token 50 is outside"), ("text", "no tokenizer"),
                            ([1] * 16, "16 tokens, and the context holds 16")):
        with pytest.raises(InputError, match=message):
            engine.submit(prompt, 4)
    with pytest.raises(InputError, match="temperature -1"):
        engine.submit([1], 4, temperature=-1)
    engine.submit([1], 4)
    engine.submit([2], 4)
    with pytest.raises(Busy, match="2 requests wait already"):
        engine.submit([3], 4)
    finish(engine)
    engine.submit([3], 4)
    engine.close()
    with pytest.raises(Busy, match="closed"):
        engine.submit([3], 4)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(plain, monkeypatch):
    free = cache_bytes(plain.config, 100, torch.float32, 4)
    monkeypatch.setattr(engine_file, "free_memory", lambda place: free)
    made = []
    monkeypatch.setattr(engine_file, "RowCache", lambda *a: made.append(a) or RowCache(*a))
    with pytest.raises(InputError, match="4 slots of 101 tokens: their cache takes .* at most 100"):
        Engine(plain, slots=4, length=101)
    assert made == []
    Engine(plain, slots=4, length=100)
    half = Engine(plain, slots=4).length                # of the free memory, where nobody says
    assert cache_bytes(plain.config, half, torch.float32, 4) <= free // 2
    assert cache_bytes(plain.config, half + 1, torch.float32, 4) > free // 2


# ---- in a thread

def test_threads_submit_cancel_and_wait(plain):
    engine = Engine(plain, slots=3, length=40).start()
    draw, results = random.Random(1), []

    def client(seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(6):
            ticket = engine.submit([mine.randrange(VOCAB) for _ in range(mine.randint(1, 9))], mine.randint(1, 9))
            if mine.random() < 0.3:
                ticket.cancel()
            ticket.wait(60)
            results.append(ticket)

    threads = [threading.Thread(target=client, args=(draw.random(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    begun = threading.Event()
    running = engine.submit([1], 30, listen=lambda ticket: begun.set())
    assert begun.wait(60)
    engine.close()
    assert running.wait(60).ended in ("interrupted", "length") and len(results) == 36
    for ticket in results:
        assert ticket.answer.tokens == alone(plain, ticket)[: len(ticket.answer.tokens)]
        assert ticket.cancelled or ticket.answer.ended == "length"


def test_an_engine_goes_on_after_a_step_that_broke(plain, monkeypatch):
    engine = Engine(plain, slots=2, length=40)
    monkeypatch.setattr(engine, "_write", lambda: (_ for _ in ()).throw(Broken))
    engine.start()
    with pytest.raises(Broken):
        engine.submit([1, 2], 5).wait(60)
    monkeypatch.undo()
    ticket = engine.submit([1, 2], 5)
    assert ticket.wait(60).tokens == alone(plain, ticket)
    engine.close()
