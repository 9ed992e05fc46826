"""Measures one NVIDIA GPU: Stable Diffusion's networks with random weights, ours beside diffusers in PyTorch.

    python -m benchmarks.on_gpu                      # under eight minutes; exit 1 if a bar is missed or a part failed
    python -m benchmarks.on_gpu --tiny --parts ours  # tries the script itself, with a tiny model on any device

It times a step of the UNet and a decode by bucket, and the engine without Ray, alone and saturated. Every part is a
process with a time limit, and tells each value as soon as it has it. So what fails or hangs costs only its own values:
the table and OUT/bench-gpu.json have the others. `python -P benchmarks/on_gpu.py` keeps the packages of PYTHONPATH.

This module imports neither JAX nor PyTorch, which would take the GPU's memory, nor any package beside Python's own.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "value of on_gpu: "  # begins the lines in which a part tells its values
MINUTES = 7.75
LEAST_S = 5.0  # a part with less time is left out
TINY = {"model": "demo", "size": [64, 64], "batches": [1], "steps": 2, "minutes": 60.0}
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "torch", "triton", "diffusers")
Report = Callable[[str, Any], None]
Values = Mapping[str, Mapping[str, Any]]  # by part, and by name


@dataclass(frozen=True)
class Part:
    """A function of the same name in a module of benchmarks/, in the order of value: the last may find no time left."""

    module: str
    limit_s: float


PARTS = {
    "ours": Part("gpu_ours", 270),
    "diffusers": Part("gpu_torch", 75),
    "compiled": Part("gpu_torch", 170),
    "kernels": Part("gpu_ours", 75),
    "restart": Part("gpu_ours", 90),
    "xla_attention": Part("gpu_ours", 90),
}


@dataclass(frozen=True)
class Bar:
    """The limit of a ratio of two values, each named by its part and its name."""

    text: str
    ours: tuple[str, str]
    baseline: tuple[str, str]
    limit: float
    at_most: bool = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stable-diffusion-v1-4", help="a preset of capacity/, or a folder")
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="images that share a step")
    parser.add_argument("--steps", type=int, default=20, help="of a guided request")
    parser.add_argument("--tiny", action="store_true", help="by default the demo model, at 64x64 in two steps; no bars")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--programs", type=Path, help=argparse.SUPPRESS)
    if "--tiny" in sys.argv:
        parser.set_defaults(**TINY)
    arguments = parser.parse_args()
    if arguments.part:
        module = importlib.import_module(f"benchmarks.{PARTS[arguments.part].module}")
        getattr(module, arguments.part)(tell, arguments)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the part that runs too
    return run_all(arguments)


def tell(name: str, value: Any) -> None:
    print(f"{MARK}{json.dumps([name, value])}", flush=True)


def run_all(arguments: argparse.Namespace) -> int:
    values: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, str] = {}
    file = arguments.out / "bench-gpu.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = machine()
    deadline = time.monotonic() + 60 * arguments.minutes

    def write() -> None:
        """Writes what is known so far."""
        options = {name: value for name, value in vars(arguments).items() if name not in ("out", "part", "programs")}
        content = {"machine": facts, "arguments": options, "parts": outcomes, "values": values}
        verdicts = [] if arguments.tiny else [verdict(bar, values) for bar in bars(max(arguments.batches))]
        file.write_text(json.dumps(content | {"bars": verdicts}, indent=2) + "\n", "utf-8")

    with tempfile.TemporaryDirectory(prefix="on-gpu-") as programs:
        for name in arguments.parts:
            values[name] = {}

            def note(key: str, value: Any, part: str = name) -> None:
                values[part][key] = value
                write()

            limit_s = min(PARTS[name].limit_s * arguments.minutes / MINUTES, deadline - time.monotonic())
            if limit_s < LEAST_S:
                outcomes[name] = "left out: no time was left"
                write()
                continue
            print(f"== {name}, {limit_s:.0f} s at most", flush=True)
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--part", name, "--programs", programs]
            outcomes[name] = run_part(command, limit_s, note)
            write()
    print(summary(arguments, facts, values, outcomes), flush=True)
    print(f"Written to {file}.")
    sound = all(outcome.startswith("done") for outcome in outcomes.values())
    return int(not sound or (not arguments.tiny and any(not met(bar, values) for bar in bars(max(arguments.batches)))))


def run_part(command: Sequence[str], limit_s: float, note: Report) -> str:
    """Runs a part in a process of its own, and returns how it ended."""
    began = time.monotonic()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    late = threading.Event()
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            assert process.stdout
            for line in process.stdout:
                if line.startswith(MARK):
                    note(*json.loads(line.removeprefix(MARK)))
                print(line.removeprefix(MARK), end="", flush=True)
            status = process.wait()
        except BaseException:  # such as Ctrl-C, which a process of another session does not get
            end()
            raise
        finally:
            timer.cancel()
    seconds = f"{time.monotonic() - began:.0f} s"
    if late.is_set():
        return f"ended after {seconds}, its limit"
    return f"done in {seconds}" if status == 0 else f"failed with status {status} after {seconds}"


def bars(largest_batch: int) -> list[Bar]:
    most = f"step_ms.{2 * largest_batch}"
    return [
        Bar(f"step of {2 * largest_batch} rows over torch.compile", ("ours", most), ("compiled", most), 1.0),
        Bar("step of 2 rows over compile with CUDA graph", ("ours", "step_ms.2"), ("compiled", "graph_ms.2"), 1.2),
        Bar("lone request over the bare verbs", ("ours", "lone_s"), ("ours", "bare_lone_s"), 1.05),
        Bar("saturated images/s over the bare verbs", ("ours", "images_s"), ("ours", "bare_images_s"), 0.97, False),
    ]


def ratio(bar: Bar, values: Values) -> float | None:
    ours, baseline = (values.get(part, {}).get(name) for part, name in (bar.ours, bar.baseline))
    return ours / baseline if ours and baseline else None


def met(bar: Bar, values: Values) -> bool:
    measured = ratio(bar, values)
    return measured is not None and (measured <= bar.limit if bar.at_most else measured >= bar.limit)


def verdict(bar: Bar, values: Values) -> dict[str, Any]:
    limit = f"{'at most' if bar.at_most else 'at least'} {bar.limit:g}"
    return {"bar": bar.text, "limit": limit, "ratio": ratio(bar, values), "met": met(bar, values)}


def summary(
    arguments: argparse.Namespace, facts: Mapping[str, Any], values: Values, outcomes: Mapping[str, str]
) -> str:
    lines = ["", f"{facts['gpu']}: {arguments.model}, {'x'.join(map(str, arguments.size))}, random weights", ""]
    columns = [
        ("ours", "ours", "{}_ms.{}"),
        ("XLA's attention", "xla_attention", "{}_ms.{}"),
        ("diffusers", "diffusers", "{}_ms.{}"),
        ("torch.compile", "compiled", "{}_ms.{}"),
        ("and CUDA graph", "compiled", "graph_ms.{1}"),
    ]
    for kind, what in (("step", "rows of a step"), ("decode", "images of a decode")):
        shown = columns if kind == "step" else columns[:3:2]
        names = {name for part in values.values() for name in part if name.startswith(f"{kind}_ms.")}
        lines.append(f"{what:20}" + "".join(f"{heading + ', ms':>21}" for heading, _, _ in shown))
        for count in sorted(int(name.partition(".")[2]) for name in names):
            cells = [values.get(part, {}).get(form.format(kind, count)) for _, part, form in shown]
            lines.append(f"{count:20}" + "".join(f"{'' if cell is None else f'{cell:.2f}':>21}" for cell in cells))
        lines.append("")
    for name, value in ((name, value) for part in values.values() for name, value in part.items()):
        if isinstance(value, int | float) and "_ms." not in name:
            lines.append(f"{name:30}{value:10.4g}")
    if not arguments.tiny:
        lines.append("")
    for result in [] if arguments.tiny else [verdict(bar, values) for bar in bars(max(arguments.batches))]:
        measured = "not measured" if result["ratio"] is None else f"{result['ratio']:.3f}"
        lines.append(f"{result['bar']:46}{measured:>14}   {result['limit']} {'met' if result['met'] else 'MISSED'}")
    return "\n".join([*lines, "", *(f"{name}: {outcome}" for name, outcome in outcomes.items())])


def machine() -> dict[str, Any]:
    return {
        "gpu": gpu(),
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "packages": {package: version(package) for package in PACKAGES},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip() or "no GPU"
    except (OSError, subprocess.TimeoutExpired):
        return "no GPU"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
