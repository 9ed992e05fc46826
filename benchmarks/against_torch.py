"""Times a guided UNet step on this machine's processor: ours against diffusers in PyTorch, with the same weights.

    python -m benchmarks.against_torch                  # exit 1 if a bar is missed
    python -m benchmarks.against_torch --models demo

Both compute in float32 in this process, with a thread for each core, and take turns. The weights are random, as PyTorch
initialises them. The two outputs must agree before anything is timed. PyTorch runs eagerly, which is the default of
diffusers, in the quicker of its two memory formats. This needs the `parity` extra.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
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
AGREE = 1e-3  # largest difference, as a share of the largest value


@dataclass(frozen=True)
class Case:
    """A UNet, the side of its latents, the bar for our time over PyTorch's, and the steps in a timing."""

    config: Path
    side: int
    bar: float
    steps: int


CASES = {
    "demo": Case(ROOT / "assets/demo-model/unet/config.json", 16, 1.0, 20),
    "stable-diffusion-v1-4": Case(ROOT / "capacity/presets/stable-diffusion-v1-4.json", 64, 1.5, 1),
}


@dataclass(frozen=True)
class Held:
    """A PyTorch tensor with the interface that our loader needs."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> np.ndarray:
        return self.tensor.numpy()


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--runs", type=int, default=7, help="timings of each side")
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
    before = machine()
    figures = [measure(name, CASES[name], arguments.runs, threads) for name in arguments.models]
    complete = arguments.models == list(CASES) and arguments.runs >= parser.get_default("runs")
    title = "One guided step of the UNet, s: ours over diffusers in PyTorch"
    return conclude("torch", title, figures, before, vars(arguments), complete)


def measure(name: str, case: Case, runs: int, threads: int) -> Figure:
    config = read(case)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(GUIDED, case.side, case.side, config["in_channels"])).astype(np.float32)
    timesteps = np.full(GUIDED, 481.0, np.float32)
    embeds = rng.normal(size=(GUIDED, TEXT_LENGTH, config["cross_attention_dim"])).astype(np.float32)
    torch_step, weights = in_torch(config, latents, timesteps, embeds)
    jax_step = in_jax(config, weights, latents, timesteps, embeds)
    expected, got = torch_step(), jax_step()
    if not (off := float(np.abs(got - expected).max() / np.abs(expected).max())) <= AGREE:
        raise UserError(f"{name}: our output differs from PyTorch's by {off:.1e} of the largest value.")
    figure = Figure(f"{threads} threads", name, "guided step, s", case.bar, against="diffusers in PyTorch, eager")
    for _ in range(runs):
        figure.add(seconds(jax_step, case.steps), seconds(torch_step, case.steps))
    return figure


def read(case: Case) -> Mapping[str, Any]:
    config = json.loads(case.config.read_text("utf-8"))
    return config.get("unet", config)  # a preset holds the configurations of all networks


def in_torch(
    config: Mapping[str, Any], latents: np.ndarray, timesteps: np.ndarray, embeds: np.ndarray
) -> tuple[Callable[[], np.ndarray], Mapping[str, Any]]:
    """A function that calls diffusers' UNet, and its weights by name."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(dict(config)).eval()
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    x, t, context = (torch.from_numpy(array) for array in (latents, timesteps, embeds))

    def call(memory_format: torch.memory_format) -> np.ndarray:
        with torch.inference_mode():
            y = unet(x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format), t, context, return_dict=False)[0]
            return y.permute(0, 2, 3, 1).numpy()

    formats = (torch.contiguous_format, torch.channels_last)
    took = {}
    for memory_format in formats:
        unet.to(memory_format=memory_format)
        call(memory_format)
        took[memory_format] = seconds(lambda: call(memory_format), 1)  # noqa: B023
    best = min(formats, key=lambda memory_format: took[memory_format])
    unet.to(memory_format=best)
    return lambda: call(best), weights


def in_jax(
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    latents: np.ndarray,
    timesteps: np.ndarray,
    embeds: np.ndarray,
) -> Callable[[], np.ndarray]:
    """A function that calls our UNet with these weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from app.diffusion.models.config import UNetConfig
    from app.diffusion.models.loading import OneKey, load_module
    from app.diffusion.models.unet import UNet

    problems: list[str] = []
    rngs: Any = OneKey()
    unet_config = UNetConfig.from_json(config, problems)
    held: Any = {name: Held(tensor) for name, tensor in weights.items()}
    unet = load_module(lambda: UNet(unet_config, dtype=jnp.float32, rngs=rngs), held, "unet", problems, problems)
    if problems:
        raise UserError("\n".join(problems))
    graph, params = nnx.split(unet)
    call = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    return lambda: np.asarray(call(params, latents, timesteps, embeds))


def seconds(call: Callable[[], object], steps: int) -> float:
    """Mean seconds of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        call()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    run_command(main)
