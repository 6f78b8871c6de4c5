"""A training step and a run: losses, optimizers, ranks, checkpoints of a run, its log and its options."""
