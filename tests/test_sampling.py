"""Which token is chosen: penalties, bans and filters against transformers' own, draws, what is refused, logprobs."""

import math

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process as theirs

import checkpoints
from nanollm.config import MLP, Attention, Layer, ModelConfig, Rope
from nanollm.errors import InputError
from nanollm.inference.generation import answer_batch, generate, generate_batch
from nanollm.inference.sample import Sampling, keep_likely, next_tokens, processed
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import make_loud, write

V, STOP = 101, [7, 50]
PROMPT, ANSWER = 9, 12                                          # tokens of each row, of few kinds: many repeat


def rows(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (count, V), and what each row has been given and has said (count, PROMPT + ANSWER)."""
    return 3 * torch.randn(count, V), torch.randint(0, 12, (count, PROMPT + ANSWER))


def ours(logits: torch.Tensor, said: torch.Tensor, **options) -> torch.Tensor:
    return processed(logits, Sampling(**options), said[:, :PROMPT].tolist(), said[:, PROMPT:].tolist(), STOP)


BIAS = {3: 2.5, 40: -7.0, 99: 100.0}
WORDS = [[5], [0, 3], [1, 2, 9]]
ONE_BY_ONE = {                                                  # in transformers' order
    "bias": (dict(logit_bias=BIAS), lambda: theirs.SequenceBiasLogitsProcessor({(t,): b for t, b in BIAS.items()})),
    "repetition": (dict(repetition_penalty=1.3), lambda: theirs.RepetitionPenaltyLogitsProcessor(1.3)),
    "encouraged": (dict(repetition_penalty=0.7), lambda: theirs.RepetitionPenaltyLogitsProcessor(0.7)),
    "3-grams": (dict(no_repeat_ngram=3), lambda: theirs.NoRepeatNGramLogitsProcessor(3)),
    "2-grams": (dict(no_repeat_ngram=2), lambda: theirs.NoRepeatNGramLogitsProcessor(2)),
    "1-grams": (dict(no_repeat_ngram=1), lambda: theirs.NoRepeatNGramLogitsProcessor(1)),
    "long n-grams": (dict(no_repeat_ngram=PROMPT + ANSWER + 1), lambda: theirs.NoRepeatNGramLogitsProcessor(22)),
    "banned": (dict(banned=[5, (0, 3), (1, 2, 9)]), lambda: theirs.NoBadWordsLogitsProcessor(WORDS)),
    "too short": (dict(min_new_tokens=ANSWER + 1),
                  lambda: theirs.MinNewTokensLengthLogitsProcessor(PROMPT, ANSWER + 1, STOP)),
    "long enough": (dict(min_new_tokens=ANSWER),
                    lambda: theirs.MinNewTokensLengthLogitsProcessor(PROMPT, ANSWER, STOP)),
    "temperature": (dict(temperature=0.7), lambda: theirs.TemperatureLogitsWarper(0.7)),
    "top-k": (dict(temperature=1.0, top_k=5), lambda: theirs.TopKLogitsWarper(5)),
    "top-k of all": (dict(temperature=1.0, top_k=500), lambda: theirs.TopKLogitsWarper(500)),
    "top-p": (dict(temperature=1.0, top_p=0.7), lambda: theirs.TopPLogitsWarper(0.7)),
    "least top-p": (dict(temperature=1.0, top_p=1e-9), lambda: theirs.TopPLogitsWarper(1e-9)),
    "min-p": (dict(temperature=1.0, min_p=0.2), lambda: theirs.MinPLogitsWarper(0.2)),
}
TOGETHER = ["bias", "repetition", "2-grams", "banned", "too short", "temperature", "top-k", "top-p", "min-p"]


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_each_does_what_transformers_does(name):
    options, processor = ONE_BY_ONE[name]
    logits, said = rows()
    expected = processor()(said, logits.clone())
    assert torch.equal(ours(logits, said, **options), expected)
    unchanged = name in ("top-k of all", "long n-grams", "long enough")
    assert torch.equal(expected, logits) == unchanged, "the example shows nothing"


def test_all_together_in_the_order_of_generate():
    """The list that transformers' generate builds from a GenerationConfig, in its order."""
    kinds = [type(ONE_BY_ONE[name][1]()) for name in TOGETHER]
    options = {key: value for name in TOGETHER for key, value in ONE_BY_ONE[name][0].items()}
    options |= dict(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1)
    config = transformers.GenerationConfig(
        sequence_bias={(t,): b for t, b in BIAS.items()}, repetition_penalty=1.3, no_repeat_ngram_size=2,
        bad_words_ids=WORDS, min_new_tokens=ANSWER + 1, do_sample=True, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1,
        eos_token_id=STOP)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    model._prepare_special_tokens(config, device="cpu")
    processors = model._get_logits_processor(config, input_ids_seq_length=PROMPT, device="cpu")
    assert [type(each) for each in processors] == kinds
    logits, said = rows(200)
    assert torch.equal(ours(logits, said, **options), processors(said, logits.clone()))


def test_presence_and_frequency_follow_openai():
    """μ_j − c_j α_frequency − 1[c_j > 0] α_presence, in NumPy; c counts the answer alone."""
    logits, said = rows(5)
    for presence, frequency in ((0.6, 0.0), (0.0, 0.3), (-1.5, 2.0)):
        expected = logits.double().numpy().copy()
        for row in range(5):
            c = np.bincount(said[row, PROMPT:].numpy(), minlength=V)
            expected[row] += -c * frequency - (c > 0) * presence
        found = ours(logits, said, presence_penalty=presence, frequency_penalty=frequency)
        assert np.abs(found.numpy() - expected).max() < 1e-5


def test_penalties_come_before_the_temperature_and_filters():
    """A token that a penalty pushes down makes room for another among the top-k."""
    logits, said = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), ([[1]], [[0, 0]])
    scores = processed(logits, Sampling(0.5, top_k=2, presence_penalty=0.5, frequency_penalty=1.0), *said)
    assert scores.tolist() == [[-math.inf, 4.0, 2.0, -math.inf]]        # 3 − 0.5 − 2·1 = 0.5


def test_filters_keep_what_transformers_keeps():
    logits = 3 * torch.randn(40, V)
    expected = logits
    for each in (theirs.TopKLogitsWarper(9), theirs.TopPLogitsWarper(0.8), theirs.MinPLogitsWarper(0.1)):
        expected = each(None, expected)
    assert torch.equal(keep_likely(logits, top_k=9, top_p=0.8, min_p=0.1), expected)


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])

    def draw(seed: int, **filters) -> torch.Tensor:
        sampling, many = Sampling(0.5, seed=seed, **filters), [[]] * 20_000
        return next_tokens(logits.expand(20_000, 4), sampling, many, many,
                           generator=sampling.generator(torch.device("cpu")))[0]

    shares = draw(0).bincount(minlength=4) / 20_000
    assert (shares - (logits[0] / 0.5).softmax(-1)).abs().max() < 0.015
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert set(draw(0, top_k=2).tolist()) == {0, 1}
    assert next_tokens(logits, Sampling(), [[]], [[]])[0].tolist() == [1]


# ---- what is refused

@pytest.mark.parametrize("option, value", [
    ("temperature", -1), ("temperature", 1e-38), ("temperature", math.nan), ("temperature", math.inf),
    ("temperature", None), ("temperature", "0.7"), ("top_k", 0), ("top_k", -1), ("top_k", 2.5), ("top_p", 0),
    ("top_p", 1.5), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0),
    ("repetition_penalty", None), ("presence_penalty", 3), ("frequency_penalty", math.nan), ("no_repeat_ngram", -1),
    ("min_new_tokens", 1.5), ("seed", 1e20), ("seed", 10**20), ("seed", -1),
])
def test_a_value_out_of_range_is_named(option, value):
    with pytest.raises(InputError) as error:
        Sampling(**{option: value})
    assert str(error.value).startswith(f"{option} {value!r}: expected ")


@pytest.mark.parametrize("options, message", [
    (dict(logit_bias={3: math.nan}), "logit_bias nan of token 3: expected -100 to 100"),
    (dict(logit_bias={"3": 1.0}), "'3' in logit_bias or banned: expected a token id"),
    (dict(banned=[()]), "banned has an empty word"),
    (dict(logit_bias={60: 1.0}), "logit_bias or banned names token 60; the model has 0 to 59"),
    (dict(banned=[(3, -1)]), "names token -1"),
    (dict(samples=0), "samples 0: expected at least 1"),
])
def test_tokens_that_are_none_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        answer_batch(model, [[1]], 3, **options)


def test_edges_of_the_ranges_are_taken():
    for options in (dict(temperature=1e-6), dict(temperature=100), dict(top_p=1), dict(min_p=0), dict(top_k=1),
                    dict(seed=2**64 - 1), dict(seed=np.int64(3)), dict(top_p=np.float32(0.5)), dict(top_p=None)):
        sampling = Sampling(**{"temperature": 1.0, **options})
        sampling.generator(torch.device("cpu"))
        tokens, _ = next_tokens(1e4 * torch.randn(3, V), sampling, [[]] * 3, [[]] * 3)
        assert ((tokens >= 0) & (tokens < V)).all()


def test_an_overflow_is_an_error_and_not_token_0():
    """float16 ends at 65504. The message says so; in another dtype it is the weights."""
    broken = torch.full((2, V), math.nan), torch.randn(2, V).index_fill(1, torch.tensor([4]), math.inf)
    for logits in broken:
        for options in (dict(), dict(temperature=1.0, top_p=0.9)):
            for dtype, words in ((torch.float16, "float16 ends at 65504"), (torch.float32, "weights are damaged")):
                with pytest.raises(InputError, match=words):
                    next_tokens(logits.to(dtype), Sampling(**options), [[]] * 2, [[]] * 2)


def test_a_float16_model_that_overflows_says_so(model):
    small = Decoder(model.config).half().eval()
    with torch.no_grad():
        small.head.weight.fill_(3e4)
        small.norm.gain.fill_(3e4)
    for ask in (lambda: list(generate(small, [1, 2], 3)), lambda: generate_batch(small, [[1, 2]], 3, temperature=1.0)):
        with pytest.raises(InputError, match="float16"):
            ask()


def test_stop_ids_that_the_model_lacks_ban_nothing():
    """A tokenizer may name more tokens than the embedding has, and −1 is no token."""
    scores = processed(torch.zeros(1, 4), Sampling(min_new_tokens=1), [[1]], [[]], [-1, 2, 4])
    assert scores.tolist() == [[0, 0, -math.inf, 0]]


def test_where_nothing_is_left_it_says_so():
    with pytest.raises(InputError, match="no token is left to choose"):
        next_tokens(torch.randn(1, 4), Sampling(banned=[0, 1, 2, 3]), [[]], [[]])


# ---- in the loop

@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(ModelConfig(60, 32, (Layer(Attention(4, 2, 8, Rope()), MLP(48)),) * 2)).eval()
    make_loud(decoder)
    return decoder


def test_a_whole_answer_is_that_of_transformers_generate(tmp_path):
    """Greedy with its penalties, from its generate and from ours; log p of each token from its scores and logits."""
    reference = write(FIXTURES["llama-3.2"], tmp_path)
    prompts, vocab = [[5, 17, 3, 44, 5, 17], [9, 8, 7]], reference.config.vocab_size
    options = dict(repetition_penalty=1.2, no_repeat_ngram=2, min_new_tokens=10)
    mine = checkpoints.load(tmp_path)
    plain = list(generate(mine, prompts[0], 12))
    stop = [plain[3], 2]
    for prompt in prompts:
        done = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=16, do_sample=False,
            eos_token_id=stop, pad_token_id=0, repetition_penalty=1.2, no_repeat_ngram_size=2, min_new_tokens=10,
            bad_words_ids=[[plain[0]]], return_dict_in_generate=True, output_scores=True, output_logits=True)
        stream = generate(mine, prompt, 16, stop_ids=stop, banned=[plain[0]], logprobs=3, **options)
        tokens = list(stream)
        assert tokens == done.sequences[0, len(prompt) :].tolist() and 10 <= len(tokens)
        for at, (token, told) in enumerate(zip(tokens, stream.answer.logprobs, strict=True)):
            raw, scores = (all_[at][0].log_softmax(-1) for all_ in (done.logits, done.scores))
            assert told.chosen.token == token and abs(told.chosen.raw - raw[token]) < 1e-4
            assert abs(told.chosen.processed - scores[token]) < 1e-4
            assert [each.token for each in told.top] == raw.topk(3).indices.tolist() and vocab > 3
            assert all(abs(each.raw - raw[each.token]) < 1e-4 for each in told.top)
            assert all(each.processed == scores[each.token] or abs(each.processed - scores[each.token]) < 1e-4
                       for each in told.top)


def test_logprobs_of_a_draw(model):
    """`processed` knows temperature and filters: −∞ for what they dropped. 0: of the chosen token alone."""
    (answer,) = answer_batch(model, [[5, 3]], 8, temperature=0.5, top_k=2, seed=1, logprobs=4)
    for token, told in zip(answer.tokens, answer.logprobs, strict=True):
        first, second, *rest = told.top
        assert token in (first.token, second.token) and [each.processed for each in rest] == [-math.inf] * 2
        apart = first.processed - second.processed
        assert abs(apart - (first.raw - second.raw) / 0.5) < 1e-4
        assert abs(math.exp(first.processed) + math.exp(second.processed) - 1) < 1e-5
    (answer,) = answer_batch(model, [[5, 3]], 2, logprobs=0)
    assert [len(each.top) for each in answer.logprobs] == [0, 0]
    assert answer_batch(model, [[5, 3]], 2)[0].logprobs == []


def test_several_samples_a_prompt(model):
    """In the order of the prompts; each its own draw; greedy ones all alike."""
    prompts = [[5, 17, 3], [44]]
    answers = generate_batch(model, prompts, 6, samples=3)
    assert answers == [list(generate(model, prompt, 6)) for prompt in prompts for _ in range(3)]
    drawn, again = (generate_batch(model, prompts, 6, samples=3, temperature=1.5, seed=2) for _ in range(2))
    assert len({*map(tuple, drawn)}) == 6 and drawn == again


def test_options_by_name_and_as_one_object_are_the_same(model):
    one = list(generate(model, [1, 2, 3], 12, temperature=0.7, top_k=9, seed=3))
    assert one == list(generate(model, [1, 2, 3], 12, Sampling(0.7, top_k=9, seed=3)))
    assert one == list(generate(model, [1, 2, 3], 12, Sampling(0.7, top_k=9, seed=5), seed=3))
    with pytest.raises(TypeError, match="temprature"):
        generate(model, [1, 2, 3], 12, temprature=0.7)


def test_penalties_in_a_batch_are_those_of_each_row(model):
    options = dict(repetition_penalty=1.5, frequency_penalty=1.0, no_repeat_ngram=2, min_new_tokens=5)
    prompts = [[5, 17, 3, 44, 5], [9], [8, 7]]
    alone = [list(generate(model, prompt, 10, stop_ids=range(20), **options)) for prompt in prompts]
    assert generate_batch(model, prompts, 10, stop_ids=range(20), **options) == alone
    assert all(len(answer) >= 5 for answer in alone) and alone != generate_batch(model, prompts, 10, stop_ids=range(20))


# ---- constraints

class Odd:
    """Odd tokens alone; complete after three."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(torch.arange(len(logits)) % 2 == 0, -math.inf)

    def accept(self, token: int) -> bool:
        self.accepted.append(token)
        return len(self.accepted) == 3


def test_a_constraint_rules_tokens_out_and_says_where_the_answer_is_complete(model):
    """As a ban of the same tokens and a limit do, alone and in a batch, in greedy mode and in draws; each answer has
    its own, which hears of every token."""
    prompts, even = [[5, 17, 3], [44], [8, 7]], range(0, 60, 2)
    for how in (dict(), dict(temperature=1.3, seed=4, top_k=9, repetition_penalty=1.2)):
        expected = generate_batch(model, prompts, 3, banned=even, **how)
        made = [Odd() for _ in prompts]
        answers = answer_batch(model, prompts, 9, constrain=iter(made).__next__, **how)
        assert [answer.tokens for answer in answers] == expected == [each.accepted for each in made]
        assert {answer.ended for answer in answers} == {"stop"} and expected != generate_batch(model, prompts, 3, **how)
        stream = generate(model, prompts[0], 9, constrain=Odd, **how)
        assert list(stream) == list(generate(model, prompts[0], 3, banned=even, **how))
        assert stream.answer.ended == "stop"
    early = expected[0][0]
    answer = answer_batch(model, prompts[:1], 9, constrain=Odd, stop_ids=[early], **how)[0]
    assert answer.tokens == [early] and answer.ended == "stop"


def test_the_models_own_log_probabilities_know_no_constraint(model):
    """`raw` is that of the free answer's first token; `processed` is −∞ for what was ruled out."""
    free, held = (answer_batch(model, [[5, 3]], 1, logprobs=60, **how)[0].logprobs[0].top
                  for how in (dict(), dict(constrain=Odd)))
    assert {each.token: each.raw for each in held} == {each.token: each.raw for each in free}
    assert all((each.processed == -math.inf) == (each.token % 2 == 0) for each in held)


def test_a_constraint_that_leaves_nothing_is_named(model):
    with pytest.raises(InputError, match="no token is left to choose: banned, .* and a constraint rule out every one"):
        answer_batch(model, [[1]], 3, constrain=Odd, banned=range(1, 60, 2))
