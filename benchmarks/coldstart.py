"""Measures what saved programs save: the time from process start to ready, without saved programs and with them.

    python -m benchmarks.coldstart         # exit 1 if the bar is missed

The model has the layers of Stable Diffusion 1.x at a fortieth of their width. So compiling dominates, as it does for a
full model on an accelerator. Each start is a process of its own. Cold and warm starts take turns: a cold start fills
the folder of programs for the next warm start. Processor seconds are reported too, as other load affects them less.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, conclude
from benchmarks.report import machine
from cluster import ROOT
from cluster.cli import Parser, UserError, run_command
from tests import tiny

BAR = 0.3
MODEL = "sd1-narrow"

# Channels are divided by 40 in the UNet and by 16 in the VAE. Embeddings have 24 channels, and the vocabulary is tiny.
TEXT = {768: 24, 3072: 96, 49408: 526}
WIDTHS: dict[str, Any] = {
    "unet": {"over": 40, "text": TEXT},
    "vae": {"over": 16, "text": {}},
    "text_encoder": {"over": 10**6, "text": TEXT},
}
NARROWED: dict[str, dict[str, Any]] = {
    "unet": {
        "attention_head_dim": 8,
        "block_out_channels": [8, 16, 32, 32],
        "cross_attention_dim": 24,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "norm_num_groups": 4,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    "vae": {
        "block_out_channels": [8, 16, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 12, "num_hidden_layers": 12},
    "scheduler": {},
}
SIZES, BUCKETS, MAX_STEPS = ((64, 64),), (1, 2), 50
MEASURES = {"seconds": "process start to ready, s", "warmup": "of which programs, s", "processor": "processor seconds"}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=int, default=5, help="pairs of a cold and a warm start (%(default)s)")
    parser.add_argument("--start", nargs=2, type=Path, metavar=("MODEL", "PROGRAMS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        start(*args.start)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / MODEL)
        pairs = []
        for run in range(args.runs):
            programs = Path(scratch) / f"programs-{run}"
            pairs.append((timed_start(model, programs, "compiled"), timed_start(model, programs, "loaded")))
            print(
                f"run {run + 1}: cold {pairs[-1][0]['seconds']:.1f} s, warm {pairs[-1][1]['seconds']:.1f} s", flush=True
            )
        saved = sum(file.stat().st_size for file in programs.iterdir())
    figures = []
    for measure, name in MEASURES.items():
        bar = BAR if measure == "seconds" else None
        figure = Figure(
            "this machine", "start of a replica", name, bar, against="the same start without saved programs"
        )
        for cold, warm in pairs:
            figure.add(warm[measure], cold[measure])
        figures.append(figure)
    facts = {"programs": len(pairs[0][0]["how"]), "megabytes": saved / 1e6, "warm_compiles": pairs[-1][1]["compiles"]}
    title = "Start of a replica with saved programs over a start without"
    return conclude("coldstart", title, figures, machine(), vars(args), **facts)


def timed_start(model: Path, programs: Path, expected: str) -> dict[str, Any]:
    """Seconds from the start of a process until its pipeline is ready, with the report that the process prints."""
    # JAX's own cache would make the cold start a warm one.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "benchmarks.coldstart", "--start", str(model), str(programs)]
    used, began = processor_seconds(), time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(f"The start failed with exit code {process.returncode}.")
    report: dict[str, Any] = json.loads(line)
    if set(report["how"]) != {expected}:
        raise UserError(f"Every program must be {expected} in this start, got {report['how']}.")
    return report | {"seconds": seconds, "processor": processor_seconds() - used}


def processor_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(model: Path, programs: Path) -> None:
    """Does what a replica does until it is ready. Runs in a process of its own."""
    import jax

    from app.aot import compile as compiling
    from app.aot.jax_internals import BACKEND_COMPILE
    from app.diffusion.pipeline import Pipeline
    from app.types import PipelineSpec

    how: list[str] = []
    compiles: list[str] = []

    def note_program(record: logging.LogRecord) -> bool:
        how.append(record.getMessage().split()[0])
        return True

    def note_compile(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == BACKEND_COMPILE:
            compiles.append(str(kwargs.get("fun_name")))

    compiling.logger.setLevel(logging.INFO)
    compiling.logger.addFilter(note_program)
    jax.monitoring.register_event_duration_secs_listener(note_compile)
    pipeline = Pipeline.load(PipelineSpec(str(model), SIZES, BUCKETS, MAX_STEPS, programs=programs))
    began = time.perf_counter()
    pipeline.warmup()
    print(json.dumps({"warmup": time.perf_counter() - began, "how": how, "compiles": compiles}), flush=True)


def write_model(folder: Path) -> Path:
    """Writes all tensors of Stable Diffusion 1.4, narrowed. Does not start JAX, which would claim the accelerator."""
    tiny.MODELS[MODEL] = {part: tiny.MODELS["tiny-sd1"][part] | changes for part, changes in NARROWED.items()}
    full = tiny.tensor_shapes()["stable-diffusion-v1-4"]
    shapes = {
        part: {name: [width(size, **WIDTHS[part]) for size in shape] for name, shape in tensors.items()}
        for part, tensors in full.items()
    }
    return tiny.write_checkpoint(folder, MODEL, shapes)


def width(size: int, over: int, text: dict[int, int]) -> int:
    return text.get(size, size // over if size % over == 0 else size)


if __name__ == "__main__":
    run_command(main)
