"""Pictures: the loss curve, the difference of two models by depth, the loss by place in a context, and what is found
where in one. Only this file imports matplotlib."""

import statistics
from pathlib import Path
from typing import Any


def blank_figure() -> tuple[Any, Any] | None:
    """A figure and its axes; None: there is no matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def loss_curve(
    path: Path, train: list[tuple[int, float]], held_out: list[tuple[int, float]],
    references: dict[str, float], title: str,
) -> bool:
    """Write a .png: (step, loss) of training and of the held-out text, and up to three references as horizontal lines.

    False: there is no matplotlib.
    """
    if (blank := blank_figure()) is None:
        return False
    figure, axes = blank
    steps, losses = zip(*train, strict=True)
    smooth = [statistics.fmean(losses[max(0, i - 10) : i + 11]) for i in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot(steps, smooth, color="tab:blue", label="training, averaged over 21 steps")
    if held_out:
        label = f"held out, {held_out[-1][1]:.3f} at the end"
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label=label)
    for (name, value), style in zip(references.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="tab:gray", linestyle=style, label=f"{name}, {value:.3f}")
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token", xlim=(0, steps[-1]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def error_by_depth(path: Path, errors: list[tuple[str, float]], bound: float) -> bool:
    """Write a .png: (what, relative difference) from the embedding to the logits, on a log scale, and the bound.

    False: there is no matplotlib.
    """
    if (blank := blank_figure()) is None:
        return False
    least = min([bound, *(error for _, error in errors if error > 0)]) / 10
    figure, axes = blank
    heights, label = [max(error, least) for _, error in errors], f"difference; {least:.0e} stands for none"
    axes.plot(heights, color="tab:blue", marker="o", markersize=4, label=label)
    axes.axhline(bound, color="tab:gray", linestyle="--", label=f"bound, {bound:g}")
    axes.set(yscale="log", xlabel="depth", ylabel="largest difference over the spread")
    shown = range(0, len(errors), -(-len(errors) // 24))             # of many layers not every name fits
    axes.set_xticks(list(shown), [errors[i][0] for i in shown], rotation=60, ha="right")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def loss_by_place(path: Path, curves: dict[str, list[tuple[int, float]]], context: int | None, title: str) -> bool:
    """Write a .png: (place, loss) of each curve, and a line where the model's own context ends.

    False: there is no matplotlib.
    """
    if (blank := blank_figure()) is None:
        return False
    figure, axes = blank
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    if context is not None:
        axes.axvline(context, color="tab:gray", linestyle="--", label=f"context, {context:,}")
    axes.set(title=title, xlabel="tokens before, in the window", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def found_where(path: Path, lengths: list[int], depths: list[float], shares: list[list[float]], title: str) -> bool:
    """Write a .png: the share that was found, 0 to 1, in a row a depth (0: the beginning), a column a length.

    False: there is no matplotlib.
    """
    if (blank := blank_figure()) is None:
        return False
    figure, axes = blank
    drawn = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(title=title, xlabel="tokens of the prompt", ylabel="depth of the needle")
    figure.colorbar(drawn, label="found")
    figure.savefig(path, dpi=120)
    return True
