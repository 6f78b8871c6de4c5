"""Train a decoder: from scratch, or on from a checkpoint; on text, or on chats; on a laptop, or on many GPUs.

    python train.py                                     a small Llama on the source of Python's standard library
    python train.py --preset mixtral                    another family: llama, qwen3, mistral, mixtral, mamba
    python train.py --data notes/ --steps 2000          your text: a file, a .jsonl with a "text" a line, or a folder
    python train.py --init FOLDER --chat chats.jsonl    fine-tuning of any Hugging Face folder on chats
    torchrun --nproc-per-node 8 train.py …              the same run on 8 GPUs, sharded (FSDP2); or 8 processes on a CPU
    python train.py … --resume                          continue the run in --out where it stopped, to the bit
    python train.py --preset llama-8b … --plan --world-size 64 --device h100        what that would take, without a GPU
    python generate.py --model runs/demo --prompt "def "

Large text is made into shards once, with python -m nanollm.data, and given as --data FOLDER. SIGTERM saves a checkpoint
and ends the run, SIGUSR1 saves a checkpoint and the model and goes on. The run folder ends up as a Hugging Face model
folder, which transformers loads too, with log.jsonl and loss.png beside it. Held-out (validation) loss is in nats per
token, which depends on the tokenizer, and in bits per byte, which does not.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

# Both are read when torch is imported, and ignored where they mean nothing. A thread that waits sleeps: that costs a
# quarter of the speed on an idle CPU, and saves two thirds of the time on one that others use too. Memory comes in
# large pages, not of 4 KiB.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from tqdm import tqdm

import checkpoints
from checkpoints.export import layout_for
from nanollm.cli import main
from nanollm.data.stream import Batch, stack
from nanollm.errors import RunError
from nanollm.inference.generation import generate
from nanollm.inference.quantize import QuantizedLinear
from nanollm.init import initial_values
from nanollm.layers.moe import routing
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training import distributed, freezing, growing, neftune, optim, runs, shifted_attention, state
from nanollm.training.corpus import Corpus, open_corpus
from nanollm.training.distributed import DTYPES, World
from nanollm.training.flops import Speed
from nanollm.training.log import Log, report, shown
from nanollm.training.losses import RECENT, Balance, spike, token_loss
from nanollm.training.options import fit_context, fit_steps, parse, rows_at_once
from nanollm.training.phase import learning


@dataclass
class Run:
    """All that a step needs and changes. A checkpoint holds model, optimizers, balance, recent and step."""
    options: argparse.Namespace
    world: World
    corpus: Corpus
    model: Decoder
    origin: checkpoints.Origin | None           # of a model that was loaded: it is written back the same way
    dtype: torch.dtype                          # that the model is written in
    optimizers: list[torch.optim.Optimizer]
    balance: Balance
    recent: list[tuple[float, float]] = field(default_factory=list)     # loss and gradient norm of the last steps taken
    step: int = 0                               # steps done


# ---- a step

def backward(run: Run, batches: list[Batch], request: int) -> tuple[dict[str, float], int]:
    """The gradient of one step, summed over micro-batches (gradient accumulation) and ranks, and clipped. Each sum is
    divided by the counts of the whole step, so any cut of the same rows gives the same gradient. Returns what the log
    says of the step, and the largest request of any rank."""
    options, world, dtype = run.options, run.world, DTYPES[run.options.dtype]
    mine = sum(int((batch.targets >= 0).sum()) for batch in batches)
    tokens = sum(batch.tokens.numel() if batch.real is None else int(batch.real.sum()) for batch in batches)
    targets, tokens = world.all_reduce(mine, tokens)
    sums = torch.zeros(2, device=world.device)
    for number, batch in enumerate(batches, 1):
        distributed.reduce_gradients(run.model, now=number == len(batches))
        batch = batch.to(world.device)
        key = options.seed, run.step, world.rank, number
        with distributed.cast(run.model, dtype), learning(run.model, *key):
            with routing(run.model) as routed:
                hidden = run.model.hidden(batch.tokens, batch.positions)
            loss, *measured = token_loss(run.model.head, hidden, batch.targets, options.z_loss)
            loss = loss / targets
            if routed:
                real = None if batch.real is None else batch.real.flatten()
                loss = loss + options.balance * run.balance.loss(routed, real) / tokens
            loss.backward()
        sums += torch.stack(measured)
    norm = distributed.clip(run.model, options.clip)
    nats, squares = sums.tolist()
    table = world.all_gather(nats, squares, nats / max(mine, 1), request)       # (ranks, 4)
    nats, squares = table.sum(0)[:2].tolist()
    return {
        "loss": nats / targets,                                                 # nats per target
        "worst_rank_loss": table[:, 2].max().item(),                            # a rank that is broken stands out
        "gradient_norm": norm,                                                  # before clipping
        "log_z": math.sqrt(squares / targets) if squares >= 0 else math.nan,    # root mean square, see losses.py
        "balance": run.balance.close(world.all_reduce),
        "targets": int(targets),
    }, int(table[:, 3].max())


def take_step(run: Run, batches: list[Batch], request: int) -> tuple[dict, int]:
    """Step `run.step`, counted from 0: its log entry, and the largest request of any rank. Raises RunError before a
    number that is not finite reaches a weight."""
    options, step = run.options, run.step
    factor = optim.lr_factor(step, options.steps, options.warmup, options.schedule, options.decay)
    entry: dict = {"lr": options.lr * factor}
    if any(a <= step < b for a, b in options.skip_steps):
        return entry | {"skipped": "--skip-steps"}, int(run.world.all_gather(request).max())
    measured, request = backward(run, batches, request)
    loss, norm = measured["loss"], measured["gradient_norm"]
    if not math.isfinite(loss + norm):
        rows = run.corpus.describe(step * options.batch_size, options.batch_size)
        raise RunError(f"step {step + 1}: loss {loss}, gradient norm {norm} on {rows}; no weight was changed by it. A "
                       f"smaller --lr helps most often; --resume --skip-steps {step}:{step + 1} passes over these rows")
    if spike(run.recent, loss, norm, options.skip_sigma):
        entry["skipped"] = f"more than {options.skip_sigma:g} sigma above the last {len(run.recent)} steps"
    else:
        optim.step(run.optimizers, entry["lr"])
        run.recent = [*run.recent, (loss, norm)][-RECENT:]
    run.model.zero_grad()
    return entry | measured, request


def my_batches(run: Run, step: int) -> list[Batch]:
    """This rank's micro-batches of a step. The rows of a step are the same however many ranks share them."""
    each = run.options.batch_size // run.world.size
    first = step * run.options.batch_size + run.world.rank * each
    return run.corpus.batches(first, each, run.options.micro_batch)


# ---- looking at the model

@torch.no_grad()
def held_out_loss(run: Run, most: int | None = None) -> float:
    """The validation loss: nats per token over `most` rows of the held-out source, evenly spaced, or over all."""
    source, world, each = run.corpus.held_out, run.world, run.options.micro_batch
    assert source is not None
    rows = range(0, source.rows, 1 if most is None else math.ceil(source.rows / most))
    total = torch.zeros(2, dtype=torch.float64)
    for at in range(0, len(rows), each * world.size):
        mine = rows[at + world.rank * each :][:each]
        batch = stack([source.row(i) for i in mine or rows[:1]]).to(world.device)   # all ranks take part in each pass
        targets = batch.targets if mine else torch.full_like(batch.targets, -100)
        with distributed.cast(run.model, DTYPES[run.options.dtype]):
            _, nats, _ = token_loss(run.model.head, run.model.hidden(batch.tokens, batch.positions), targets)
        total += torch.tensor([nats.item(), (targets >= 0).sum().item()])
    for module in distributed.sharded_modules(run.model):
        module.reshard()                        # a backward pass would have; without one what was gathered stays
    nats, count = world.all_reduce(*total.tolist())
    return nats / count


def sample(run: Run, length: int = 100) -> str | None:
    """How the model continues the prompt, at temperature 0.8. All ranks take part in the all-gather; rank 0 has it."""
    options, tokenizer = run.options, run.corpus.tokenizer
    whole = distributed.gather(run.model, run.world.rank == 0, run.world.device, DTYPES[options.dtype])
    if whole is None or tokenizer is None:
        return None
    ids = run.corpus.prompt(options.prompt)
    room = run.model.config.context or len(ids) + length
    new = generate(whole, ids[-room + 1 :], min(length, room), temperature=0.8, top_p=0.95,
                   seed=options.seed + run.step, stop_ids=tokenizer.stop_ids)
    return tokenizer.decode([*ids, *new])


# ---- the loop

def train(run: Run, saver: state.Saver, log: Log) -> bool:
    """Steps until the last one, or until a signal asks to leave: then False. All ranks decide alike, from the same
    numbers."""
    options, world, held_out = run.options, run.world, None
    speed = Speed(run.model.config, options, world)
    bar = tqdm(total=options.steps, initial=run.step, desc="training", unit="step", dynamic_ncols=True,
               disable=world.rank > 0)
    with ThreadPoolExecutor(1) as ahead, runs.signals() as requests, runs.gc_frozen(), bar:
        coming = ahead.submit(my_batches, run, run.step)
        while run.step < options.steps:
            began = time.perf_counter()
            batches = coming.result()
            waited = time.perf_counter() - began
            coming = ahead.submit(my_batches, run, run.step + 1)
            entry, request = take_step(run, batches, max(requests.pending, log.request))
            requests.served(request)
            if request == runs.STOP:
                world.on_all_ranks(log.check)
            run.step += 1
            if "loss" in entry:
                entry |= speed.entry(time.perf_counter() - began, waited)
            log(run.step, **entry)
            bar.set_postfix(shown(entry, held_out), refresh=False)
            bar.update()
            if "skipped" in entry and world.rank == 0:
                tqdm.write(f"step {run.step} is skipped ({entry['skipped']})")

            last = run.step == options.steps
            if run.corpus.held_out and (last or run.step % options.eval_every == 0):
                held_out = held_out_loss(run, most=None if last else 64)
                log(run.step, held_out_loss=held_out, **run.corpus.in_bytes(held_out))
            if run.corpus.tokenizer and options.sample_every and (last or run.step % options.sample_every == 0):
                if (text := sample(run)) is not None:
                    log(run.step, sample=text)
                    tqdm.write(f"\n── a sample at step {run.step}\n{text}\n")
            if last or request or run.step % options.save_every == 0:
                finish(saver, log)                                  # the one before, if it is still being written
                world.on_all_ranks(run.corpus.unchanged)
                facts = {"balance": run.balance.shares, "recent": run.recent}
                saver.begin(run.step, optim.tensors(run.model, run.optimizers), facts)
            if last or request:
                finish(saver, log, needed=last or request == runs.LEAVE)
            elif saver.thread and not world.all_gather(saver.busy).any():
                finish(saver, log)
            if request and not last:
                export(run)
            if request == runs.LEAVE and not last:
                return False
    export(run)                                 # also where an earlier start took the last step, and ended before this
    world.on_all_ranks(log.check)
    return True


def finish(saver: state.Saver, log: Log, needed: bool = False) -> None:
    """Complete the checkpoint that is being written, if one is. Where that fails training goes on with a warning,
    unless the checkpoint is `needed`."""
    if saver.thread is None:
        return
    step, problem = saver.step, saver.finish()
    log(step, checkpoint=f"steps/{step:08}" if problem is None else f"failed: {problem}")
    if problem and needed:
        raise RunError(f"the checkpoint of step {step} cannot be written: {problem}; make room, then --resume")
    if problem and saver.world.rank == 0:
        tqdm.write(f"warning: no checkpoint at step {step}: {problem}; training goes on, and older checkpoints are as "
                   "they were")


# ---- before and after

def initial(options: argparse.Namespace) -> Decoder:
    """The model of --init, grown as the options say. Raises RunError where its weights have too few bits to be trained.
    """
    folder = options.init
    model = checkpoints.load(folder)
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise RunError(f"{folder}: its weights are quantised, and those are not trained; python -m checkpoints.convert "
                       f"{folder} OUT writes them in 16 bits")
    return growing.grow(model, options)


def build(options: argparse.Namespace, world: World) -> Run:
    """The corpus, and the sharded model with its first weights: drawn, or those of --init. Raises NanollmErrors."""
    source = world.on_rank_0(lambda: initial(options)) if options.init else None
    config, dtype = world.broadcast(source and (source.config, source.embed.weight.dtype)) or (
        preset(options.preset, context=options.context), torch.float32)
    fit_context(options, config)
    if options.init and (most := growing.reach(config)) and options.context > most:
        raise RunError(f"{options.init}: made for {most} tokens, --context is {options.context}; --rope-scaling and "
                       "--rope-factor stretch it")
    corpus = open_corpus(options, world, options.vocab or config.vocab)
    fit_steps(options, sum(source.rows for source in corpus.stream.sources))
    if options.init and corpus.vocab > config.vocab:
        raise RunError(f"{options.init}: has a vocabulary of {config.vocab}, the tokenizer of the data one of "
                       f"{corpus.vocab}; --grow-vocab gives it rows for them")
    config = config if options.init else dataclasses.replace(config, vocab=corpus.vocab)
    with torch.device("meta"):
        model = Decoder(config)
    freezing.freeze(model, options)
    if options.neftune:
        neftune.add_noise(model, options.neftune)
    if options.shift_attention:
        shifted_attention.shift_attention(model, options.shift_attention, options.context)
    distributed.shard(model, world.mesh, DTYPES[options.dtype], recompute=options.recompute, compile=options.compile,
                      offload=options.offload)
    model.to_empty(device="cpu" if options.offload else world.device)
    values = initial_values(model, options.seed)
    if options.init:
        values = distributed.broadcast_parameters(model, source, world.device)
    distributed.fill(model.eval(), values)
    optimizers = optim.build(model, options.optimizer, options.weight_decay, DTYPES[options.dtype])
    return Run(options, world, corpus, model, source.origin if source else None, dtype, optimizers, Balance(model))


def restore(run: Run) -> None:
    """Go on from the newest checkpoint in the run folder, if there is one."""
    found = run.world.broadcast(state.complete(run.options.out / "steps"))
    if found:
        tensors = optim.tensors(run.model, run.optimizers)
        facts = run.world.on_all_ranks(lambda: state.load(found[-1], tensors))
        run.step, run.balance.shares = facts["step"], facts["balance"]
        run.recent = [tuple(pair) for pair in facts["recent"]]


def written_as(run: Run) -> str:
    """The layout in which `export` will write the model, for a person, before the first step."""
    layout, reason = layout_for(run.model.config, run.origin)
    if layout == "hf":
        return f"{run.options.out}: will be a Hugging Face folder, which transformers loads too"
    return (f"{run.options.out}: will be in nanollm's own layout, which checkpoints.load, generate.py and --init read "
            f"and transformers does not: {reason}")


def export(run: Run) -> None:
    """The model in the run folder, in the layout of `written_as`: written aside, and moved in when it is complete."""
    whole = distributed.gather(run.model, run.world.rank == 0, torch.device("cpu"), run.dtype)

    def write() -> None:
        with runs.replacing(run.options.out) as draft:
            if run.origin:
                whole.origin = run.origin
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)        # `written_as` has said it before the first step
                checkpoints.save(whole, draft)
            run.corpus.copy_tokenizer(draft)
    run.world.on_rank_0(write)


def run() -> None:
    options = parse(__doc__)
    if options.plan:
        from nanollm.training import plan
        config = growing.planned(checkpoints.config(options.init), options) if options.init else preset(
            options.preset, options.vocab, options.context)
        fit_context(options, config)
        return print(plan.report(options, config))
    with distributed.world(options.device, options.replicas) as world, contextlib.ExitStack() as held:
        options.dtype = world.broadcast(options.dtype)              # which a CPU may have measured
        options.micro_batch = rows_at_once(options.batch_size, options.micro_batch, world.size)
        folder, resume, force, asked = options.out, options.resume, options.force, dict(vars(options))
        world.on_rank_0(lambda: runs.check(folder, asked, resume, force))
        world.on_rank_0(lambda: held.enter_context(runs.locked(folder)))
        world.on_rank_0(lambda: runs.check(folder, asked, resume, force))           # what it holds by now
        here = build(options, world)
        facts = {"options": dict(vars(options)), "model": here.model.config.to_dict(),
                 "data": {"fingerprint": here.corpus.stream.fingerprint}, "muon": optim.constants(options.optimizer)}
        world.on_rank_0(lambda: runs.start(folder, facts, resume, force))
        if resume:
            restore(here)
        if world.rank == 0:
            print(*here.corpus.notes, sep="\n")
            print(f"{options.init or options.preset}: {sum(p.numel() for p in here.model.parameters()) / 1e6:.2f} M "
                  f"parameters, {options.steps * options.batch_size * options.context / 1e6:.2f} M tokens to see, "
                  f"products in {options.dtype} on {world.size} × {options.device}"
                  + (f", on from step {here.step}" if here.step else ""))
            print(written_as(here))
        log = world.on_all_ranks(lambda: held.enter_context(Log(
            folder if world.rank == 0 else None, here.step, options.tensorboard, options.wandb, facts)))
        finished = train(here, state.Saver(folder / "steps", world, options.keep), log)
        world.on_rank_0(lambda: print(
            report(folder, here.corpus, options.title) if finished
            else f"{folder}: left at step {here.step} as asked; --resume goes on"))


if __name__ == "__main__":
    main(run)
