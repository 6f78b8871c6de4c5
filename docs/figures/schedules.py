"""Learning-rate schedules: the share of the peak rate at each step.

    warm-up, then   cosine ╱‾╲_    linear ╱╲    wsd ╱‾‾╲            `lr_factor` in nanollm/training/optim.py

Loshchilov & Hutter 2016 (arXiv 1608.03983); Hu et al. 2024 (arXiv 2404.06395) §4.
"""

from docs.figures.drawing import Axes, Picture, legend
from nanollm.training.optim import SCHEDULES, lr_factor

STEPS, WARMUP = 1000, 100
HUES = dict(zip(SCHEDULES, "abc", strict=True))


def draw() -> Picture:
    """One panel, and in grey what `least` does to the cosine."""
    picture = Picture(560, 300, "Learning-rate schedules: cosine, linear, and warm-up, stable, decay")
    axes = Axes(picture, (56, 68, 340, 180), (0, STEPS), (0, 1.05))
    axes.ticks([(x, str(x)) for x in range(0, 1001, 250)], [(0, "0"), (0.25, "¼"), (0.5, "½"), (0.75, "¾"), (1, "1")])
    axes.named("Learning rate", "step", "share of the peak")
    steps = [*range(0, STEPS, 20), STEPS - 1]
    axes.curve([(s, lr_factor(s, STEPS, WARMUP, "cosine", least=0.1)) for s in steps], "f dash")
    for name, hue in HUES.items():
        axes.curve([(s, lr_factor(s, STEPS, WARMUP, name)) for s in steps], hue)
    names = [*((hue, name) for name, hue in HUES.items()), ("f dash", "cosine, least 0.1")]
    legend(picture, 416, 90, names, 22)
    picture.text(416, 196, f"{STEPS} steps,", "small dim")
    picture.text(416, 212, f"{WARMUP} of warm-up", "small dim")
    return picture
