"""Times a guided UNet step on this machine's processor: ours against diffusers in PyTorch, with the same weights.

    python -m benchmarks.against_torch                  # exit 1 if a bar is missed
    python -m benchmarks.against_torch --models demo

Both compute in float32, with a thread for each core, and take turns. The weights are random, drawn for each tensor by
its name. The two outputs must agree before a figure counts. PyTorch runs eagerly, which is the default of diffusers, in
the quicker of its two memory formats. SDXL's weights stand in memory once: a process of its own times each side, again
in each run. This needs the `parity` extra.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Figure, conclude
from benchmarks.report import machine
from cluster import ROOT
from cluster.cli import Parser, UserError, run_command

GUIDED = 2  # rows of a step
TEXT_LENGTH = 77
SIZE_NUMBERS = 6  # of SDXL: original size, crop, target size
ADDED = ("text_embeds", "time_ids")  # that SDXL has beside
AGREE = 1e-3  # largest difference, as a share of the largest value


@dataclass(frozen=True)
class Case:
    """A UNet, the side of its latents, the bar for our time over PyTorch's, and the steps in a timing.

    Where two copies of the weights do not fit in memory, the sides are `apart`.
    """

    config: Path
    side: int
    bar: float
    steps: int
    apart: bool = False


CASES = {
    "demo": Case(ROOT / "assets/demo-model/unet/config.json", 16, 1.0, 20),
    "stable-diffusion-v1-4": Case(ROOT / "capacity/presets/stable-diffusion-v1-4.json", 64, 1.5, 1),
    "stable-diffusion-xl-base-1.0": Case(
        ROOT / "capacity/presets/stable-diffusion-xl-base-1.0.json", 64, 1.2, 1, apart=True
    ),
}
SIDES = ("ours", "torch")
Step = Callable[[], np.ndarray]


@dataclass(frozen=True)
class RandomTensor:
    """A tensor whose values follow from its name, with the interface that our loader needs."""

    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Values that keep the networks' activations near 1: float32 [*shape]."""
        values = np.random.default_rng(zlib.crc32(self.name.encode())).standard_normal(self.shape, np.float32)
        if len(self.shape) > 1:
            values /= np.float32(np.sqrt(np.prod(self.shape[1:])))
        else:
            values *= np.float32(0.1)
            values += np.float32("norm" in self.name and self.name.endswith("weight"))
        return values


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--runs", type=int, default=7, help="timings of each side")
    parser.add_argument("--side", choices=SIDES, help="time one side alone, and print its seconds")
    parser.add_argument("--output", type=Path, help="with --side: file for what a step gives")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs must be at least 1, got {arguments.runs}.")
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: make bench-torch installs it (several GB).", file=sys.stderr)
        return 2
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    if arguments.side:
        time_side(CASES[arguments.models[0]], arguments.side, arguments.output)
        return 0
    before = machine()
    figures = [measure(name, CASES[name], arguments.runs, threads) for name in arguments.models]
    complete = arguments.models == list(CASES) and arguments.runs >= parser.get_default("runs")
    title = "One guided step of the UNet, s: ours over diffusers in PyTorch"
    return conclude("torch", title, figures, before, vars(arguments), complete)


def measure(name: str, case: Case, runs: int, threads: int) -> Figure:
    figure = Figure(f"{threads} threads", name, "guided step, s", case.bar, against="diffusers in PyTorch, eager")
    for ours, torch in apart(name, runs) if case.apart else together(case, runs):
        expected, got = torch.output, ours.output
        if not (off := float(np.abs(got - expected).max() / np.abs(expected).max())) <= AGREE:
            raise UserError(f"{name}: our output differs from PyTorch's by {off:.1e} of the largest value.")
        figure.add(ours.seconds, torch.seconds)
    return figure


@dataclass(frozen=True)
class Timing:
    """Mean seconds of a step, and what it gave."""

    seconds: float
    output: np.ndarray


def together(case: Case, runs: int) -> Iterator[tuple[Timing, Timing]]:
    """Both sides in this process, in turns."""
    steps = [step_of(case, side) for side in SIDES]
    outputs = [step() for step in steps]
    for _ in range(runs):
        ours, torch = (Timing(seconds(step, case.steps), out) for step, out in zip(steps, outputs, strict=True))
        yield ours, torch


def apart(name: str, runs: int) -> Iterator[tuple[Timing, Timing]]:
    """Each side in a process of its own, in turns."""
    for _ in range(runs):
        ours, torch = (in_own_process(name, side) for side in SIDES)
        yield ours, torch


def in_own_process(name: str, side: str) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.npy"
        command = [sys.executable, "-m", "benchmarks.against_torch", "--models", name, "--side", side]
        printed = subprocess.run(
            [*command, "--output", str(output)], cwd=ROOT, check=True, stdout=subprocess.PIPE
        ).stdout
        return Timing(json.loads(printed)["seconds"], np.load(output))


def time_side(case: Case, side: str, output: Path) -> None:
    step = step_of(case, side)
    np.save(output, step())
    print(json.dumps({"seconds": seconds(step, case.steps)}))


def read(case: Case) -> Mapping[str, Any]:
    config = json.loads(case.config.read_text("utf-8"))
    return config.get("unet", config)  # a preset holds the configurations of all networks


def inputs_of(config: Mapping[str, Any], side: int) -> dict[str, np.ndarray]:
    """Latents, timesteps and embeddings of a guided step, under the names of our UNet's parameters."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((GUIDED, *shape), np.float32)

    inputs = {
        "x": normal(side, side, config["in_channels"]),
        "timesteps": np.full(GUIDED, 481.0, np.float32),
        "prompt_embeds": normal(TEXT_LENGTH, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        sizes = SIZE_NUMBERS * config["addition_time_embed_dim"]
        inputs["text_embeds"] = normal(config["projection_class_embeddings_input_dim"] - sizes)
        inputs["time_ids"] = np.tile(np.array([8 * side, 8 * side, 0, 0, 8 * side, 8 * side], np.float32), (GUIDED, 1))
    return inputs


def step_of(case: Case, side: str) -> Step:
    """A function that takes a guided step on one side."""
    config = read(case)
    return (in_jax if side == "ours" else in_torch)(config, inputs_of(config, case.side))


def in_torch(config: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> Step:
    """A function that calls diffusers' UNet."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config)).eval()
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(torch.from_numpy(RandomTensor(name, tuple(parameter.shape)).read()))
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    x, added = tensors["x"].permute(0, 3, 1, 2), {name: tensors[name] for name in ADDED if name in tensors}

    def call(memory_format: torch.memory_format) -> np.ndarray:
        with torch.inference_mode():
            y = unet(
                x.contiguous(memory_format=memory_format),
                tensors["timesteps"],
                tensors["prompt_embeds"],
                added_cond_kwargs=added or None,
                return_dict=False,
            )[0]
            return y.permute(0, 2, 3, 1).numpy()

    formats = (torch.contiguous_format, torch.channels_last)
    took = {}
    for memory_format in formats:
        unet.to(memory_format=memory_format)
        call(memory_format)
        took[memory_format] = seconds(lambda: call(memory_format), 1)  # noqa: B023
    best = min(formats, key=lambda memory_format: took[memory_format])
    unet.to(memory_format=best)
    return lambda: call(best)


def in_jax(config: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> Step:
    """A function that calls our UNet."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from app.diffusion.models.config import UNetConfig
    from app.diffusion.models.loading import OneKey, load_module
    from app.diffusion.models.unet import UNet

    problems: list[str] = []
    rngs: Any = OneKey()
    unet_config = UNetConfig.from_json(config, problems)
    tensors: Any = {name: RandomTensor(name, shape) for name, shape in shapes_of(config).items()}
    unet = load_module(lambda: UNet(unet_config, dtype=jnp.float32, rngs=rngs), tensors, "unet", problems, problems)
    if problems:
        raise UserError("\n".join(problems))
    graph, params = nnx.split(unet)
    call = jax.jit(lambda params, inputs: nnx.merge(graph, params)(**inputs))
    return lambda: np.asarray(call(params, inputs))


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of diffusers' parameters, by name."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}


def seconds(call: Callable[[], object], steps: int) -> float:
    """Mean seconds of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        call()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    run_command(main)
