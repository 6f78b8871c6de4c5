"""What --train puts behind a model in place of load: how its weights are drawn, and a loop over the bytes of a text."""

import inspect
import re
from typing import Any

from torch import nn

from checkpoints.flatten.sources import code_of
from nanollm.errors import ConfigError
from nanollm.init import Draw
from nanollm.model import Decoder

TEXT = '''
@torch.no_grad()
def init_weights(model: Decoder) -> None:
    """Draw every parameter, as FIRST says."""
    stream = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        FIRST[re.sub(r"(?<=layers\\.)\\d+", "{i}", name)](p.data, stream, len(model.layers))


if __name__ == "__main__":                  # python FILE TEXT.txt: a token is a byte
    B, T, STEPS, RATE, WARMUP = 8, 128, 500, 3e-3, 10
    data = torch.frombuffer(bytearray(Path(sys.argv[1]).read_bytes()), dtype=torch.uint8).long()
    training, validation = data[: -len(data) // 10], data[-len(data) // 10 :]       # the last tenth is not trained on
    torch.manual_seed(0)
    model = Decoder()
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)

    def loss_on(source: Tensor) -> Tensor:
        """Mean cross-entropy of B windows of the source, in nats per byte."""
        starts = torch.randint(len(source) - T, (B, 1))
        windows = source[starts + torch.arange(T + 1)]                              # (B, T + 1)
        logits = model(windows[:, :-1])                                             # (B, T, V): of the next byte
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    for step in range(STEPS):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * cosine
        loss = loss_on(training)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            with torch.no_grad():
                measured = sum(loss_on(validation).item() for _ in range(4)) / 4
            print(f"step {step + 1}: training loss {loss:.3f}, validation loss {measured:.3f} nats per byte")
    print(bytes(t for t in generate(model, [10], 200, temperature=0.8) if t < 256).decode(errors="replace"))
'''


def rules(model: Decoder) -> dict[str, Draw]:
    """Parameter, with {i} for the layer → how it is drawn: that of the outermost module which names it."""
    found: dict[str, Draw] = {}
    for owner, module in model.named_modules():
        for leaf, rule in getattr(module, "INIT", {}).items():
            found.setdefault(f"{owner}.{leaf}" if owner else leaf, rule)
    return {re.sub(r"(?<=layers\.)\d+", "{i}", name): found[name] for name, _ in model.named_parameters()}


def drawing(model: nn.Module) -> list[str]:
    """FIRST, and the functions in it, from nanollm/init.py and the modules that have some of their own."""
    assert isinstance(model, Decoder)
    functions: dict[str, list[str]] = {}
    table = ["FIRST = {                               # how each parameter is drawn"]
    for name, rule in rules(model).items():
        table.append(f'    "{name}": {written(rule, functions)},')
    draw = "Draw = Callable[[Tensor, torch.Generator, int], Tensor]  # (empty value, random stream, layers) → the value"
    return [draw, *(line for lines in functions.values() for line in ["", "", *lines]), "", "", *table, "}"]


def written(rule: Any, functions: dict[str, list[str]]) -> str:
    """A rule as an expression; the functions that it needs are added."""
    outer = rule.__qualname__.partition(".")[0]
    maker = getattr(inspect.getmodule(rule), outer)
    if not inspect.isfunction(maker):
        raise ConfigError(f"--train does not go with this model yet: {rule.__qualname__} is written inside a class")
    add(maker, functions)
    if maker is rule:
        return outer
    given = [cell.cell_contents for cell in rule.__closure__]   # normal(0.02)
    names = dict(zip(rule.__code__.co_freevars, given, strict=True))
    return f"{outer}({', '.join(repr(names[one]) for one in inspect.signature(maker).parameters)})"


def add(function: Any, functions: dict[str, list[str]]) -> None:
    """The source of a function, after those that it calls."""
    code = code_of(function)
    if code.name in functions:
        return
    module = inspect.getmodule(function)
    for name in re.findall(r"(?<![\w.])([a-z_]\w+)\(", code.source.text(code.node)):
        inner = getattr(module, name, None)
        if inspect.isfunction(inner) and inner is not function:
            add(inner, functions)
    functions[code.name] = code.source.lines(code.node.lineno, code.node.end_lineno or 0)
