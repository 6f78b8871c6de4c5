"""Train a decoder: from scratch, or on from a checkpoint; on text, or on chats; on a laptop, or on many GPUs.

    python train.py                                     a small Llama on the source of Python's standard library
    python train.py --preset mixtral                    another family: llama, qwen3, mistral, mixtral, mamba
    python train.py --data notes/ --steps 2000          your text: a file, a .jsonl with a "text" a line, or a folder
    python train.py --init FOLDER --chat chats.jsonl    fine-tuning of any Hugging Face folder on chats
    python train.py --init FOLDER --preference pairs.jsonl --loss dpo --lora-rank 16       on pairs of answers
    python train.py --init FOLDER --grpo prompts.jsonl --reward-function module:name       on rewards of its answers
    torchrun --nproc-per-node 8 train.py …              the same run on 8 GPUs, sharded (FSDP2); or 8 processes on a CPU
    python train.py … --resume                          continue the run in --out where it stopped, to the bit
    python train.py --out runs/demo --export best       its best checkpoint becomes the model of the run folder
    python train.py --init FOLDER --data notes/ --eval-only     the held-out loss, without training
    python train.py --preset llama-8b … --plan --world-size 64 --device h100        what that would take, without a GPU
    python generate.py --model runs/demo --prompt "def "

Large text is made into shards once, with python -m nanollm.data, and given as --data FOLDER. Ctrl-C and SIGTERM save a
checkpoint and the model and end the run, SIGUSR1 saves them and goes on. The run folder ends up as a Hugging Face model
folder, which transformers loads too, with log.jsonl and loss.png beside it. Held-out (validation) loss is in nats per
token, which depends on the tokenizer, and in bits per byte, which does not.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# Read when torch is imported, or ignored. A thread that waits sleeps: that costs a quarter of the speed on an idle CPU,
# and saves two thirds of the time on one that others use too. Memory comes in large pages, not of 4 KiB.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from nanollm.cli import main, quiet_ctrl_c

if __name__ == "__main__":
    quiet_ctrl_c()

import torch
from tqdm import tqdm

import checkpoints
from benchmarks.evaluate import training as tasks
from checkpoints.export import layout_in_words
from checkpoints.layouts import hub
from nanollm.data.stream import Batch
from nanollm.errors import RunError
from nanollm.inference import many, quantize
from nanollm.inference.generation import generate
from nanollm.init import initial_values
from nanollm.layers.moe import routing
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training import distributed, growing, methods, optim, reference, runs, state, surgery, tuning
from nanollm.training.averages import Average, averaged, gathered
from nanollm.training.corpus import Corpus, open_corpus
from nanollm.training.distributed import DTYPES, World
from nanollm.training.evaluation import ROWS, Best, find_checkpoint, need_held_out
from nanollm.training.flops import Speed
from nanollm.training.log import Log, begun, finish, measured, report, shown
from nanollm.training.losses import RECENT, Balance, means, spike
from nanollm.training.method import Method
from nanollm.training.options import fit_context, fit_steps, parse, rows_at_once
from nanollm.training.phase import learning


@dataclass
class Run:
    """All that a step needs and changes. A checkpoint holds all but options, world, corpus and source."""
    options: argparse.Namespace
    world: World
    corpus: Corpus
    model: Decoder
    source: tuning.Source
    optimizers: list[torch.optim.Optimizer]
    balance: Balance
    method: Method
    recent: list[tuple[float, float]] = field(default_factory=list)     # loss and gradient norm of the last steps taken
    step: int = 0                               # steps done
    average: Average | None = None              # of the weights, with --ema
    best: Best = field(default_factory=Best)    # evaluation

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a step changes, by name, for a checkpoint."""
        return (optim.tensors(self.model, self.optimizers) | (self.average.tensors() if self.average else {})
                | self.corpus.tensors() | self.method.tensors())

    def held_out(self, most: int | None = None) -> dict[str, float]:
        """What the method measures; with --ema of the averaged weights."""
        with averaged(self.average):
            return self.method.held_out(self.model, self.corpus.held_out, self.world, self.options, most)

    def whole(self) -> contextlib.AbstractContextManager[Decoder | None]:       # on one device, on rank 0
        return gathered(self.model, self.average, self.world, DTYPES[self.options.dtype], self.source.blank)

    @property
    def over(self) -> bool:
        """Whether the last step is taken, or early stopping ends the run."""
        return self.step >= self.options.steps or self.best.exhausted(self.options.patience)


# ---- a step

def backward(run: Run, batches: list[Batch], request: Callable[[], int]) -> tuple[dict[str, float], int]:
    """The gradient of one step, summed over micro-batches (gradient accumulation) and ranks, and clipped. Each sum is
    divided by the counts of the whole step, so any cut of the same rows gives the same gradient. Returns what the log
    says of the step, and the largest request of any rank."""
    options, world, dtype = run.options, run.world, DTYPES[run.options.dtype]
    mine = sum(batch.divisor for batch in batches)
    targets, tokens = world.all_reduce(mine, sum(batch.seen for batch in batches))
    parts: list[torch.Tensor] = []                              # what the method says of each micro-batch
    for number, batch in enumerate(batches, 1):
        distributed.reduce_gradients(run.model, now=number == len(batches))
        batch = batch.to(world.device)
        key = options.seed, run.step, world.rank, number
        with distributed.cast(run.model, dtype), learning(run.model, *key):
            with routing(run.model) as routed:
                loss, said = run.method.loss(run.model, batch, options)
            loss = loss / targets
            if routed:
                real = None if batch.real is None else batch.real.flatten()
                loss = loss + options.balance * run.balance.loss(routed, real) / tokens
            loss.backward()
        parts.append(torch.stack([*said.values()]))
    norm = distributed.clip(run.model, options.clip)
    sums = dict(zip(said, torch.stack(parts).sum(0).tolist(), strict=True))
    table = world.all_gather(*sums.values(), sums["loss"] / max(mine, 1), request())    # (ranks, sums + 2)
    totals = dict(zip(sums, table.sum(0).tolist(), strict=False))
    return {
        **means(totals, targets),                                               # loss: nats per target
        "worst_rank_loss": table[:, -2].max().item(),                           # a rank that is broken stands out
        "gradient_norm": norm,                                                  # before clipping
        "balance": run.balance.close(world.all_reduce),
        "targets": int(targets), "tokens": int(tokens),
    }, int(table[:, -1].max())


def take_step(run: Run, batches: list[Batch], request: Callable[[], int]) -> tuple[dict, int]:
    """Step `run.step`, counted from 0: its log entry, and the largest request of any rank, asked at its end. Raises
    RunError before a number that is not finite reaches a weight."""
    options, step = run.options, run.step
    least = options.min_lr / options.lr if options.min_lr else 0.0
    factor = optim.lr_factor(step, options.steps, options.warmup, options.schedule, options.decay, least)
    entry: dict = {"lr": options.lr * factor}
    if any(a <= step < b for a, b in options.skip_steps):
        return entry | {"skipped": "--skip-steps"}, int(run.world.all_gather(request()).max())
    measured, asked = backward(run, batches, request)
    loss, norm = measured["loss"], measured["gradient_norm"]
    if not math.isfinite(loss + norm):
        rows = run.corpus.describe(run.corpus.first_row(step, options), options.batch_size)
        raise RunError(f"step {step + 1}: loss {loss}, gradient norm {norm} on {rows}; no weight was changed by it. A "
                       f"smaller --lr helps most often; --resume --skip-steps {step}:{step + 1} passes over these rows")
    if spike(run.recent, loss, norm, options.skip_sigma):
        entry["skipped"] = f"more than {options.skip_sigma:g} sigma above the last {len(run.recent)} steps"
    else:
        optim.step(run.optimizers, entry["lr"])
        if run.average:
            run.average.update(step + 1)
        run.recent = [*run.recent, (loss, norm)][-RECENT:]
    run.model.zero_grad()
    return entry | measured, asked


# ---- looking at the model

def evaluate(run: Run, log: Log) -> bool:
    """The held-out loss into the log: over some rows, at the end over all. Whether it is the best, over those rows."""
    if run.corpus.held_out is None:
        return False
    found = run.held_out(ROWS)
    run.best.newest = found["loss"]
    better = not run.options.tasks and run.best.judge(run.step, found["loss"])
    found = run.held_out() if run.over else found
    log(run.step, **{f"held_out_{name}": value for name, value in found.items()}, **run.corpus.in_bytes(found["loss"]))
    return better


def sample(run: Run, log: Log, length: int = 100) -> None:
    """How the model continues the prompt, at temperature 0.8, into the log."""
    options, tokenizer = run.options, run.corpus.tokenizer
    with run.whole() as model:
        if model is None or tokenizer is None:
            return
        ids = run.corpus.prompt(options.prompt)
        room = run.model.config.context or len(ids) + length
        new = generate(model, ids[-room + 1 :], min(length, room), temperature=0.8, top_p=0.95,
                       seed=options.seed + run.step, stop_ids=tokenizer.stop_ids)
        log(run.step, sample=(text := tokenizer.decode([*ids, *new])))
        tqdm.write(f"\n── a sample at step {run.step}\n{text}\n")


# ---- the loop

def train(run: Run, saver: state.Saver, log: Log) -> int:
    """Steps until the run is over: then 0. Or until a signal asks to leave: then which. All ranks decide alike."""
    options, world = run.options, run.world
    speed, seen = Speed(run.model.config, options, world), dict[str, float]()
    optim.begin(run.optimizers)
    bar = tqdm(total=options.steps, initial=run.step, desc="training", unit="step", dynamic_ncols=True,
               disable=world.rank > 0)
    with ThreadPoolExecutor(1) as ahead, runs.signals() as requests, runs.gc_frozen(), bar:
        coming = ahead.submit(run.corpus.of_step, run.step, options, world)
        if run.step == 0 and run.best.newest is None and evaluate(run, log) and options.keep_best:
            save(run, saver, log)
        while not run.over:
            began = time.perf_counter()
            rows = coming.result()
            waited = time.perf_counter() - began
            coming = ahead.submit(run.corpus.of_step, run.step + 1, options, world)
            batches, said = run.method.batches(run.model, rows, run.step)
            entry, request = take_step(run, batches, lambda: max(requests.pending, log.request))
            requests.served(request)
            if request == runs.STOP:
                world.on_all_ranks(log.check)
            run.step += 1
            if "loss" in entry:
                entry |= speed.entry(entry["tokens"], time.perf_counter() - began, waited)
            log(run.step, **(entry := entry | said))
            bar.set_postfix(shown(seen := seen | entry, run.best.newest), refresh=False)
            bar.update()
            if "skipped" in entry and world.rank == 0:
                tqdm.write(f"step {run.step} is skipped ({entry['skipped']})")
            better = (run.step == options.steps or run.step % options.eval_every == 0) and evaluate(run, log)
            if tasks.due(options, run.step, run.over):
                better = tasks.score(run, log, run.whole())
            last = run.over
            if last and run.step < options.steps and world.rank == 0:
                tqdm.write(f"--patience ends the run: no {tasks.better(options)} since step {run.best.step}")
            if run.corpus.tokenizer and options.sample_every and (last or run.step % options.sample_every == 0):
                sample(run, log)
            if last or request or run.step % options.save_every == 0 or better and options.keep_best:
                save(run, saver, log)
            if last or request:
                finish(saver, log, needed=last or request >= runs.LEAVE)
            elif saver.thread and not world.all_gather(saver.busy).any():
                finish(saver, log)
            if request and not last:
                export(run)
                if request >= runs.LEAVE:
                    return request
    if options.keep_best and run.best.restored(options.out / "steps", run.step, run.tensors(), world):
        log(run.step, exported=run.best.step, exported_loss=run.held_out()["loss"])
    export(run)                                 # also where an earlier start took the last step, and ended before this
    world.on_all_ranks(log.check)
    return 0


def save(run: Run, saver: state.Saver, log: Log) -> None:
    """Begin to write a checkpoint of this step."""
    finish(saver, log)                                          # the one before, if it is still being written
    run.world.on_all_ranks(run.corpus.unchanged)
    facts = {"balance": run.balance.shares, "recent": run.recent, "best": run.best.facts()}
    spared = run.best.step if run.options.keep_best and run.best.loss is not None else None
    saver.begin(run.step, run.tensors(), facts, spared)


# ---- before and after

def initial(options: argparse.Namespace) -> Decoder:
    """The model of --init, grown as the options say, or with adapters. Raises RunError where it cannot be trained."""
    model = checkpoints.load(options.init, **tuning.loading(options))
    tuning.need_trainable(model, options)
    model = growing.grow(model, options)
    if tuning.tunes(options):
        model = tuning.prepare(model, options, quantize.quantised, quantize.quantize_as)
    return methods.extended(model, options)


def build(options: argparse.Namespace, world: World, given: str) -> Run:
    """The corpus, and the sharded model with its first weights: drawn, or those of --init. Raises NanollmErrors."""
    source = world.on_rank_0(lambda: initial(options)) if options.init else None
    config, dtype, tuned, frozen = world.broadcast(source and (
        source.config, source.embed.weight.dtype, tuning.blank(source, options), tuning.fingerprint(source, options),
    )) or (preset(options.preset, context=options.context), torch.float32, None, None)
    fit_context(options, config)
    growing.need_reach(config, options)
    corpus = open_corpus(options, world, options.vocab or config.vocab)
    fit_steps(options, sum(source.rows for source in corpus.stream.sources))
    need_held_out(options, corpus.held_out)
    growing.need_rows(config, corpus.vocab, options)
    config = config if options.init else dataclasses.replace(config, vocab=corpus.vocab)
    with torch.device("meta"):
        model = methods.extended(tuned or Decoder(config), options)
    blank = copy.deepcopy(model)
    random = surgery.arrange(model, options)
    distributed.shard(model, world.mesh, DTYPES[options.dtype], recompute=options.recompute, compile=options.compile,
                      offload=options.offload, random=random)
    model.to_empty(device="cpu" if options.offload else world.device)
    tuning.share(model, blank)
    values = (distributed.broadcast_parameters(model, source, world.device) if options.init
              else initial_values(model, options.seed))
    distributed.fill(model.eval(), values)
    measured_alone = options.eval_only and not options.resume      # of a folder: no checkpoint of ours is read
    optimizers = [] if measured_alone else tuning.optimizers(model, options, DTYPES[options.dtype])
    before = tuning.Source(given, source.origin if source else None, blank, frozen, dtype)
    load = partial(checkpoints.load, device=world.device)
    method = methods.method_of(options, world, model, blank, corpus, load, many.answers)
    return Run(options, world, corpus, model, before, optimizers, Balance(model), method,
               average=Average(model, options.ema) if options.ema else None)


def restore(run: Run, which: str | None = None) -> bool:
    """Go on from a checkpoint in the run folder: the one that --export names, or the newest, if there is one."""
    steps = run.options.out / "steps"
    if not which and not run.world.broadcast(state.complete(steps)):
        runs.say(f"no checkpoint in {run.options.out}: starting at step 0")
        return False
    found = run.world.on_all_ranks(lambda: find_checkpoint(steps, which or "last"))
    facts = run.world.on_all_ranks(lambda: state.load(found, run.tensors()))
    run.step, run.balance.shares = facts["step"], facts["balance"]
    run.recent = [tuple(pair) for pair in facts["recent"]]
    run.best = Best(**facts.get("best", {}))                    # an older version had none
    return True


def written_as(run: Run) -> str:
    """The layout in which `export` will write the model, for a person, before the first step."""
    if tuning.tunes(run.options):
        return tuning.how_to_use(run.options, run.source.name)
    return f"{run.options.out}: will be {layout_in_words(run.model.config, run.source.origin)}"


def export(run: Run) -> None:
    """The model in the run folder, in the layout of `written_as`: written aside, and moved in when it is complete."""
    options, source = run.options, run.source
    dtype = torch.float32 if tuning.tunes(options) else source.dtype    # of adapters, whatever their base has

    def write() -> None:
        with runs.replacing(options.out) as draft:
            if source.origin:
                whole.origin = source.origin
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)        # `written_as` has said it before the first step
                tuning.export(whole, draft, options, source, checkpoints.save, checkpoints.save_adapter)
            run.corpus.copy_tokenizer(draft)

    with averaged(run.average):
        whole = distributed.gather(run.model, run.world.rank == 0, torch.device("cpu"), dtype, source.blank)
        run.world.on_rank_0(write)


def run() -> None:
    options = parse(__doc__)
    if options.plan:
        from nanollm.training import plan
        config = growing.planned(checkpoints.config(options.init), options) if options.init else preset(
            options.preset, options.vocab, options.context)
        fit_context(options, config)
        adapt = partial(tuning.outline, options=options, quantise_all=quantize.quantize_as)
        return print(plan.report(options, config, adapt))
    with distributed.world(options.device, options.replicas) as world, contextlib.ExitStack() as held:
        options.dtype = world.broadcast(options.dtype)              # which a CPU may have measured
        options.micro_batch = rows_at_once(options.batch_size, options.micro_batch, world.size,
                                           options.gradient_accumulation)
        given, resume, force = options.init, options.resume, options.force
        if options.eval_only and not resume:                        # of a folder: there is no run
            options.out = world.broadcast(Path(held.enter_context(tempfile.TemporaryDirectory())))
        folder, asked = options.out, dict(vars(options))
        options.init = given and world.on_all_ranks(lambda: hub.to_train(str(given)))
        world.on_rank_0(lambda: runs.check(folder, asked, resume, force))
        world.on_rank_0(lambda: tasks.check(options))
        world.on_rank_0(lambda: held.enter_context(runs.locked(folder)))
        world.on_rank_0(lambda: runs.check(folder, asked, resume, force))           # what it holds by now
        here = build(options, world, str(given))
        facts = {"options": vars(options) | {"init": given}, "model": here.model.config.to_dict(),
                 "data": {"fingerprint": here.corpus.stream.fingerprint}, "base": {"weights": here.source.frozen},
                 "muon": optim.constants(options.optimizer)}
        if resume and not force:
            world.on_rank_0(lambda: runs.compare(folder, facts))
        restored = resume and restore(here, options.export or ("last" if options.eval_only else None))
        if not restored:
            reference.measure(here.model, here.corpus, world, options)
        if options.export:
            export(here)
            return world.on_rank_0(lambda: print(f"{folder}: the model is now that of step {here.step}"))
        if options.eval_only:
            loss = here.held_out()["loss"]
            return world.on_rank_0(lambda: print(*measured(here.corpus, loss), sep="\n"))
        world.on_rank_0(lambda: runs.start(folder, facts, resume))  # the first change of what was there
        here.corpus = here.corpus.keep(world)
        if world.rank == 0:
            print(*here.corpus.notes, begun(options, here.model, world.size, here.step), written_as(here), sep="\n")
        log = world.on_all_ranks(lambda: held.enter_context(Log(
            folder if world.rank == 0 else None, here.step if restored else -1, options, facts)))
        left = train(here, state.Saver(folder / "steps", world, options.keep), log)
        world.on_rank_0(lambda: print(report(folder, here.corpus, options.title) if not left else
                                      f"{folder}: saved at step {here.step}, and left as asked; --resume goes on"))
    runs.end_as_asked(left)


if __name__ == "__main__":
    main(run)
