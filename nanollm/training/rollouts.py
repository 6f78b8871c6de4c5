"""Reinforcement: the model answers prompts, the answers are rewarded, and a step learns from them. Then again.

    round r     sample     G answers to each prompt, with the weights of this moment         inference/many.py
                reward     each whole answer                                                 reward_function.py
                look       log π_old, log π_ref (and V) of each token, without a gradient    `look`, by the trainer
                judge      rewards → an advantage for each token                             grpo.py, ppo.py
    step        U times    a loss on these samples: --updates, μ of GRPO, epochs of PPO

    tokens      prompt prompt prompt  y y y y <end>  ·  ·           begins = 3, lengths = 5
    of y_t                            log π, A, V …                 (N, A): column t is token t of the answer

π_old is what the *trainer* computes before the first update. The sampler computes the same with other kernels, in
another order, from the cache; what it found is compared with π_old, and the log has the difference, since ratios of
unlike numbers are a policy gradient off policy. Both divide the logits by the temperature. The end of an answer is a
token like others, and learnt; an answer that was cut has none.

π_ref is the model before its first step. What is trained is kept as it was then, and exchanged for a forward pass:
under adapters those alone, so the base has no second copy. β = 0 keeps nothing.

What is drawn follows from (seed, round, place of the prompt in the run, number of the answer). On several ranks each
answers its own prompts: for that time every rank has the whole model once, in the dtype of products.

Shapes: N answers of a rank, or all; B of a micro-batch; T tokens, A of the longest answer, n in all, D width.
"""

import argparse
import contextlib
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanollm.data.prompts import Prompts, Row
from nanollm.data.stream import Source
from nanollm.model import Decoder
from nanollm.text.tokenizer import Tokenizer
from nanollm.training import distributed
from nanollm.training.averages import Average, averaged
from nanollm.training.corpus import Corpus
from nanollm.training.distributed import DTYPES, World
from nanollm.training.evaluation import spaced
from nanollm.training.log_probs import target_log_probs
from nanollm.training.losses import Loss
from nanollm.training.method import Method
from nanollm.training.reward_function import Rewards

LARGE = 0.1             # nats a token, on average, from which the sampler is not the model that is trained


class Samples(NamedTuple):
    """Answers, those to one prompt behind each other, and what a loss is a function of. A batch of the trainer."""
    tokens: Tensor              # (N, T) int64: prompt and answer, padded at the end
    begins: Tensor              # (N,) int64: where the answer begins
    lengths: Tensor             # (N,) int64: tokens of the answer, its end among them
    counts: Tensor              # (N,) int64: of what the sums of the loss are divided by: 1, or the tokens
    old: Tensor                 # (N, A) float32: log π_old
    reference: Tensor           # (N, A) float32: log π_ref; 0 where there is none
    advantage: Tensor           # (N, A) float32
    values: Tensor              # (N, A) float32: V_old of PPO, else 0
    aims: Tensor                # (N, A) float32: G of PPO, else 0

    @property
    def mask(self) -> Tensor:
        """(N, A) float32: 1 where there is a token of the answer."""
        return (torch.arange(self.old.shape[1], device=self.old.device) < self.lengths[:, None]).float()

    @property
    def real(self) -> Tensor:
        """(N, T) bool, False where a sequence is padded."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < (self.begins + self.lengths)[:, None]

    @property
    def divisor(self) -> int:
        """What the sums of a loss are divided by: answers, or their tokens."""
        return int(self.counts.sum())

    @property
    def seen(self) -> int:
        """Tokens that are no padding."""
        return int((self.begins + self.lengths).sum())

    def to(self, device: torch.device) -> "Samples":
        """The same on a device."""
        return Samples(*(part.to(device) for part in self))

    def part(self, rows: slice) -> "Samples":
        """Some of them, as wide as they need to be."""
        some = Samples(*(part[rows] for part in self))
        T, A = int((some.begins + some.lengths).max()), int(some.lengths.max())
        return Samples(some.tokens[:, :T], some.begins, some.lengths, some.counts, *(part[:, :A] for part in some[4:]))


class Seen(NamedTuple):
    """What a model says of answers."""
    log_p: Tensor               # (B, A) float32, 0 behind an answer
    values: Tensor              # (B, A) float32, of a model with a value head; else 0


def look(model: Decoder, batch: Samples, temperature: float) -> Seen:
    """Of each token of the answers, from what stands before it."""
    hidden, mask = model.hidden(batch.tokens), batch.mask.bool()                        # (B, T, D), (B, A)
    rows, columns = mask.nonzero(as_tuple=True)                                         # (n,) each
    before = batch.begins[rows] + columns - 1
    states = hidden[rows, before]                                                       # (n, D)
    log_p, values = (torch.zeros(mask.shape, device=mask.device) for _ in range(2))
    log_p[mask] = target_log_probs(model.head, states, batch.tokens[rows, before + 1], temperature)
    if hasattr(model, "value"):
        values[mask] = model.value(states)  # type: ignore[operator]
    return Seen(log_p, values)


# tokens, log p of each, whether it was cut: as inference/many.py has them
Sampled = tuple[list[int], list[float], bool]
Sampler = Callable[..., list[Sampled]]
# (samples, rewards (N,), all_reduce, options) → samples
Judge = Callable[[Samples, Tensor, Callable[..., list[float]], argparse.Namespace], Samples]


def by_tokens(options: argparse.Namespace) -> bool:
    """Whether every token counts alike, or else every answer."""
    return bool(options.ppo) or options.normaliser == "dapo"


def laid_out(prompts: Sequence[Sequence[int]], answers: Sequence[Sampled], longest: int, most: int,
             each_token: bool) -> Samples:
    """Samples without what a model says of them. longest: tokens of any prompt of the run; most: of any answer."""
    n = len(answers)
    tokens = torch.zeros(n, longest + most, dtype=torch.int64)
    for row, (prompt, (answer, *_)) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
    lengths = torch.tensor([len(answer) for answer, *_ in answers])
    counts = lengths if each_token else torch.ones_like(lengths)
    return Samples(tokens, torch.tensor([len(prompt) for prompt in prompts]), lengths, counts,
                   *(torch.zeros(n, most) for _ in range(5)))


class Reinforcement(Method):
    """The method of --grpo and --ppo."""

    def __init__(self, loss: Loss, judge: Judge, sampler: Sampler, rewards: Rewards, model: Decoder, blank: Decoder,
                 corpus: Corpus, world: World, options: argparse.Namespace) -> None:
        """To be made when the model has its first weights. blank: as in `distributed.gather`."""
        super().__init__(loss)
        self.judge, self.sampler, self.rewards, self.blank = judge, sampler, rewards, blank
        self.world, self.options, self.warned = world, options, False
        assert corpus.tokenizer is not None
        self.tokenizer: Tokenizer = corpus.tokenizer
        self.first = Average(model, 1.0) if options.beta else None
        self.longest = max(source.longest for source in corpus.stream.sources if isinstance(source, Prompts))
        self.kept: Samples | None = None                # of the whole step, where more than one update uses them
        if options.updates > 1:
            n = options.batch_size * options.group
            self.kept = laid_out([[]] * n, [([], [], False)] * n, self.longest, options.max_new_tokens, False)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: samples that another update learns from."""
        return {f"samples.{name}": part for name, part in (self.kept._asdict() if self.kept else {}).items()}

    # ---- a step

    def batches(self, model: Decoder, rows: list[list[Row]], step: int) -> tuple[list[Samples], dict[str, float]]:
        """This rank's micro-batches of a step, of the prompts `rows`, and what the log says of new samples."""
        options, world = self.options, self.world
        each, said = options.batch_size // world.size * options.group, dict[str, float]()
        if self.kept is None:
            samples, said = self.collect(model, [row for batch in rows for row in batch], step)
        else:
            if step % options.updates == 0:
                mine, said = self.collect(model, [row for batch in rows for row in batch], step // options.updates)
                everyone = world.all_gather_objects(mine)
                for kept, parts in zip(self.kept, zip(*everyone, strict=True), strict=True):
                    kept.copy_(torch.cat(parts))
            samples = Samples(*(part[world.rank * each :][:each] for part in self.kept))
        return self.parts(samples), said

    def parts(self, samples: Samples) -> list[Samples]:
        """As micro-batches: so many prompts, each with all of its answers."""
        size = self.options.micro_batch * self.options.group
        return [samples.part(slice(at, at + size)) for at in range(0, len(samples.tokens), size)]

    def collect(self, model: Decoder, rows: list[Row], turn: int) -> tuple[Samples, dict[str, float]]:
        """Samples of one round for this rank's prompts, and what the log says of them, of all ranks."""
        options, world, began = self.options, self.world, time.perf_counter()
        first = turn * options.batch_size + world.rank * len(rows)
        keys = [(turn, first + i, g) for i in range(len(rows)) for g in range(options.group)]
        asked = [row for row in rows for _ in range(options.group)]
        answers, rewards = self.answered(model, asked, keys)
        sampled_in = time.perf_counter() - began
        samples = laid_out([row.ids for row in asked], answers, self.longest, options.max_new_tokens,
                           by_tokens(options))
        samples = self.judge(self.looked_at(model, samples), rewards, world.all_reduce, options)
        theirs = torch.zeros_like(samples.old)
        for row, (_, log_p, _) in enumerate(answers):
            theirs[row, : len(log_p)] = torch.tensor(log_p)
        apart = (theirs - samples.old).abs() * samples.mask
        groups = rewards.view(-1, options.group)
        equal = (groups == groups[:, :1]).all(1)
        count, total, squares, cuts, silent, tokens, difference = world.all_reduce(
            len(rewards), rewards.double().sum().item(), rewards.double().square().sum().item(),
            sum(cut for *_, cut in answers), equal.sum().item(), samples.lengths.sum().item(), apart.sum().item())
        mean, groups_of_all = total / count, count / options.group
        said = {
            "reward": mean, "reward_std": max(0.0, (squares - count * mean**2) / max(count - 1, 1)) ** 0.5,
            "no_signal": silent / groups_of_all if options.group > 1 else 0.0,      # groups of equal rewards
            "answer_tokens": tokens / count, "cut": cuts / count,
            "sampler_difference": difference / tokens,                              # nats a token, on average
            "sampler_difference_max": world.all_gather(apart.max().item()).max().item(), "sampling_seconds": sampled_in,
        }
        if said["sampler_difference"] > LARGE and not self.warned and world.rank == 0:
            warnings.warn(f"the sampler's log-probabilities are {said['sampler_difference']:.3f} nats a token from the "
                          f"trainer's, more than {LARGE}: what is learnt is not what was sampled. --dtype float32 "
                          "tells rounding from a mistake: it leaves about 0.00001", stacklevel=2)
            self.warned = True
        return samples, said

    @contextlib.contextmanager
    def whole(self, model: Decoder) -> Iterator[Decoder]:
        """Inside the block a model that samples: the one that is trained, or of one in shards a copy on every rank."""
        dtype = DTYPES[self.options.dtype]
        if distributed.sharded_modules(model):
            copy = distributed.gather(model, True, self.world.device, dtype, self.blank)
            assert copy is not None
            yield copy
        else:
            with distributed.cast(model, dtype):
                yield model

    def answered(self, model: Decoder, asked: Sequence[Row], keys: Sequence[tuple]) -> tuple[list[Sampled], Tensor]:
        """An answer to each prompt, and its reward (N,) float32. keys: what each is drawn by, beside the seed."""
        options, world = self.options, self.world
        seeds = [zlib.crc32(repr((options.seed, *key)).encode()) for key in keys]
        with self.whole(model) as one:
            answers = world.on_all_ranks(lambda: self.sampler(
                one, [row.ids for row in asked], seeds, options.max_new_tokens, options.temperature,
                self.tokenizer.stop_ids))
        told = [(row.prompt, self.tokenizer.decode(ids), ids, [*row.ids, *ids])
                for row, (ids, *_) in zip(asked, answers, strict=True)]
        return answers, torch.tensor(world.on_all_ranks(lambda: self.rewards(told) if told else []))

    @torch.no_grad()
    def looked_at(self, model: Decoder, samples: Samples) -> Samples:
        """Samples with π_old, π_ref and V_old."""
        found = [self.look_at(model, batch) for batch in self.parts(samples)]
        old, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        samples = samples._replace(old=old, values=values)
        if self.first:
            with averaged(self.first):
                samples = samples._replace(reference=torch.cat([self.look_at(model, batch).log_p
                                                                for batch in self.parts(samples)]))
        return samples

    def look_at(self, model: Decoder, batch: Samples) -> Seen:
        """`look` at a micro-batch as the trainer does, as wide as all samples."""
        with distributed.cast(model, DTYPES[self.options.dtype]):
            seen = look(model, batch.to(self.world.device), self.options.temperature)
        for module in distributed.sharded_modules(model):
            module.reshard()                            # or the next exchange of weights would not be seen
        wide = self.options.max_new_tokens - seen.log_p.shape[1]
        return Seen(*(torch.nn.functional.pad(part.cpu(), (0, wide)) for part in seen))

    # ---- held out

    def held_out(self, model: Decoder, source: Source | None, world: World, options: argparse.Namespace,
                 most: int | None = None) -> dict[str, float]:
        """Of an answer to each prompt, drawn the same way each time. "loss" is the reward with a minus."""
        assert isinstance(source, Prompts)
        mine = spaced(source.rows, most)[world.rank :: world.size]
        answers, rewards = self.answered(model, [source.row(i) for i in mine], [("held out", i) for i in mine])
        count, total, tokens, cuts = world.all_reduce(
            len(mine), rewards.double().sum().item(), sum(len(ids) for ids, *_ in answers),
            sum(cut for *_, cut in answers))
        return {"loss": -total / count, "reward": total / count, "answer_tokens": tokens / count, "cut": cuts / count}
