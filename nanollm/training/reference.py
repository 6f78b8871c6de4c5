"""The reference model of DPO and its kin, without a second model.

The reference is what the model is before its first step. Its log-probabilities do not change while the model is
trained, so they are computed once, in one forward pass over the rows of the run, and kept: two numbers a row.

                              memory              forward passes of the reference, over E epochs
    a frozen copy             a second model      E
    adapters switched off     none                E
    computed once (here)      8 bytes a row       1, for all of full, frozen, LoRA and QLoRA alike

Under adapters this *is* the same weights with the adapter off, as B is 0 before the first step; an adapter that goes on
(--adapter) is compared with what it was, as in trl. A checkpoint keeps the numbers, so a run that is resumed goes on
with the same ones.
"""

import argparse
from collections.abc import Sequence

import torch

from nanollm.data.preferences import Pairs
from nanollm.model import Decoder
from nanollm.training import distributed
from nanollm.training.corpus import Corpus
from nanollm.training.distributed import DTYPES, World
from nanollm.training.log_probs import answer_log_probs
from nanollm.training.preferences import needs_reference


def measure(model: Decoder, corpus: Corpus, world: World, options: argparse.Namespace) -> None:
    """log p of each answer that the run will see, under the model as it is, where its method needs them. All ranks call
    it."""
    if not needs_reference(options):
        return
    stream, held_out = corpus.stream, corpus.held_out
    seen = {stream.place(row)[::2] for row in range(options.steps * options.batch_size)}       # (source, row of it)
    for number, source in enumerate(stream.sources):
        assert isinstance(source, Pairs)
        measure_rows(model, source, sorted(row for which, row in seen if which == number), world, options)
    if isinstance(held_out, Pairs):
        measure_rows(model, held_out, range(held_out.rows), world, options)


@torch.no_grad()
def measure_rows(model: Decoder, source: Pairs, rows: Sequence[int], world: World, options: argparse.Namespace) -> None:
    """Of these rows of a source. The ranks share them out."""
    each, found = options.micro_batch, torch.zeros(source.rows, 2, dtype=torch.float64)
    for at in range(0, len(rows), each * world.size):
        mine = rows[at + world.rank * each :][:each]
        batch = source.stack([source.row(i) for i in mine or rows[:1]]).to(world.device)
        with distributed.cast(model, DTYPES[options.dtype]):            # all ranks take part in each forward pass
            total = answer_log_probs(model, batch.tokens, batch.targets).total
        if mine:
            found[list(mine)] = total.view(2, -1).T.double().cpu()
    for module in distributed.sharded_modules(model):
        module.reshard()
    sums = torch.tensor(world.all_reduce(*found.flatten().tolist())).view(-1, 2)
    source.reference[list(rows)] = sums[list(rows)].float()
