"""What a conversion takes, beside a plain copy of the same bytes and beside transformers' load and save, in one run.

    python -m benchmarks.convert [--gigabytes 3] [--rounds 4] [--folder PLACE] [--write]

A checkpoint of Llama's shape with random weights is made on the spot. Then, in turn, each in a process of its own:

    copy             the folder's bytes to new files, by the kernel (shutil.copyfile), and forced to disk
    copy, uncached   the same, and after every 16 MB the system's cache gives up what was written, as with us: the floor
    hf → hf          python -m checkpoints.convert: through the table, every value checked
    hf → nanollm     the same with other names
    meta → hf        from params.json and consolidated.00.pth: q and k are turned on the way
    hf → float32     every value is cast, and twice the bytes are written
    hf → hf, verify  and read back
    transformers     from_pretrained(folder, dtype="auto").save_pretrained(out)

Peak memory is the most that was resident (VmHWM) less what the process held before it began, its imports done. All of
them read from the page cache, and write to the same disk; all import torch before they begin, as a virtual machine
gives freed memory back in that time, and asks for it again more slowly; all are timed until the disk has it. A round
runs them one after another, every other round backwards, and what is compared is compared within a round: the figures
are medians, ratios of the round's own copy.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.generate import machine
from checkpoints import convert, export
from checkpoints.source import open_source
from checkpoints.storage import stream
from nanollm.config import MLP, Attention, Layer, ModelConfig, Rope
from nanollm.model import Decoder

LAYER = Layer(Attention(20, 4, 128, Rope(5e5)), MLP(6912))
BYTES_A_LAYER = 2 * (2560 * (2560 + 512 + 512 + 2560) + 3 * 2560 * 6912)

COPY = """
    import os, shutil, sys
    from pathlib import Path
    import torch
    def work(source, out):
        Path(out).mkdir()
        for path in Path(source).iterdir():
            shutil.copyfile(path, Path(out) / path.name)
            handle = os.open(Path(out) / path.name, os.O_RDONLY)
            os.fsync(handle)
"""
UNCACHED = """
    import os
    from pathlib import Path
    import torch
    def work(source, out):
        Path(out).mkdir()
        for path in Path(source).iterdir():
            with open(path, "rb") as old, open(Path(out) / path.name, "wb") as new:
                while os.sendfile(new.fileno(), old.fileno(), None, 1 << 24):
                    os.posix_fadvise(new.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                os.fsync(new.fileno())
"""
CONVERT = """
    from pathlib import Path
    import torch
    from checkpoints.convert import convert, plan
    from checkpoints.source import open_source
    def work(source, out):
        convert(plan(open_source(Path(source), allow_pickle=True), {to!r}, {dtype}), Path(out), verify={verify})
"""
TRANSFORMERS = """
    import os, torch, transformers
    from transformers.models.llama import modeling_llama
    transformers.logging.disable_progress_bar()
    def work(source, out):
        transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(out)
        for name in os.listdir(out):
            os.fsync(os.open(os.path.join(out, name), os.O_RDONLY))
"""
MEASURE = """
    import sys, time
    def high(reset=False):
        if reset:
            open("/proc/self/clear_refs", "w").write("5")
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
    before, start = high(reset=True), time.perf_counter()
    work(sys.argv[1], sys.argv[2])
    print(time.perf_counter() - start, high() - before)
"""


def make(folder: Path, gigabytes: float) -> int:
    """The checkpoint in both layouts: folder/hf and folder/meta. Returns its bytes."""
    layers = max(1, round((gigabytes * 1e9 - 2 * 2 * 32000 * 2560) / BYTES_A_LAYER))
    with torch.device("meta"):
        model = Decoder(ModelConfig(32000, 2560, (LAYER,) * layers, context=8192))
    parameters = dict(model.named_parameters())
    written = export.plan_export(model.config, parameters, dict.fromkeys(parameters, torch.bfloat16), None)
    (folder / "hf").mkdir()
    places = written.lay_out(folder / "hf", 1_000_000_000)
    with stream.Writer() as out:
        for name, stored in places.items():
            stream.write(stored, 0, torch.randn(stored.shape).bfloat16(), name, out)
    convert.convert(convert.plan(open_source(folder / "hf"), "meta"), folder / "meta")
    return written.nbytes


def measure(code: str, source: Path, out: Path) -> tuple[float, int]:
    """Seconds, and bytes of memory, in a process of its own."""
    for path in source.iterdir():                        # into the page cache
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    os.sync()
    body = "\n".join(line[4:] for line in (code + MEASURE).splitlines())
    command = [sys.executable, "-c", body, str(source), str(out)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(out)
    seconds, memory = ran.stdout.split()
    return float(seconds), int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, metavar="N", help="of the checkpoint (default 3)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is run (default 5)")
    parser.add_argument("--folder", type=Path,
                        help="where there is room for four times as much (default: the system's temporary folder)")
    parser.add_argument("--write", action="store_true", help="keep the table as benchmarks/convert.md")
    args = parser.parse_args()

    def converting(to: str = "hf", dtype: str = "None", verify: bool = False) -> str:
        return CONVERT.format(to=to, dtype=dtype, verify=verify)

    runs = {
        "copy": ("hf", COPY),
        "copy, uncached": ("hf", UNCACHED),
        "hf → hf": ("hf", converting()),
        "hf → nanollm": ("hf", converting("nanollm")),
        "meta → hf": ("meta", converting()),
        "hf → hf, verify": ("hf", converting(verify=True)),
        "hf → float32": ("hf", converting(dtype="torch.float32")),
        "transformers": ("hf", TRANSFORMERS),
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = make(folder, args.gigabytes)
        stored = open_source(folder / "hf").stored
        largest = max(one.size for one in stored.values())
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
        for round in range(args.rounds):
            for name, (source, code) in list(runs.items())[:: -1 if round % 2 else 1]:
                found[name].append(measure(code, folder / source, folder / "out"))
                seconds, memory = found[name][-1]
                print(f"{name:16} {size / seconds / 1e6:7,.0f} MB/s {memory / 1e6:7,.0f} MB", file=sys.stderr)
    lines = [f"A checkpoint of {size / 1e9:.2f} GB in bfloat16, {len(stored)} tensors, the largest of "
             f"{largest / 1e6:.0f} MB; {args.rounds} rounds, medians.",
             f"{machine()}.", "",
             "| | MB/s of the source | of the copy's speed | peak memory | of the largest tensor |",
             "|---|--:|--:|--:|--:|"]
    for name, rounds in found.items():
        seconds = statistics.median(seconds for seconds, _ in rounds)
        ratio = statistics.median(copy / mine for (mine, _), (copy, _) in zip(rounds, found["copy"], strict=True))
        memory = statistics.median(memory for _, memory in rounds)
        lines.append(f"| {name} | {size / seconds / 1e6:,.0f} | {ratio:.0%} | {memory / 1e6:,.0f} MB "
                     f"| {memory / largest:.2f} × |")
    print(*lines, sep="\n")
    if args.write:
        head = ("# Conversion\n\nWritten by `python -m benchmarks.convert --write`; "
                "what each row is says its docstring.\n\n")
        Path(__file__).with_suffix(".md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
