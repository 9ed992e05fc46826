"""The parts of benchmarks/on_gpu.py that run diffusers in PyTorch: eager, compiled, and compiled with a CUDA graph."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from benchmarks.on_gpu import ROOT, Report

TEXT_LENGTH = 77
REPEATS, RUNS = 10, 5  # as in benchmarks/gpu_ours.py
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[[], Any]


def diffusers(report: Report, options: argparse.Namespace) -> None:
    """The default of diffusers, with channels last."""
    unet = network(UNet2DConditionModel, config_of(options.model, "unet"))
    factor = 2 ** (len(config_of(options.model, "vae")["block_out_channels"]) - 1)
    for rows in sorted({rows for images in options.batches for rows in (images, 2 * images)}):
        report(f"step_ms.{rows}", milliseconds(step(unet, unet.config, rows, options.size, factor)))
    vae = network(AutoencoderKL, config_of(options.model, "vae"))
    for images in sorted(images for images in options.batches if images <= 4):
        report(f"decode_ms.{images}", milliseconds(decode(vae, images, options.size, factor)))


def compiled(report: Report, options: argparse.Namespace) -> None:
    """The smallest guided and the largest step. A CUDA graph of it is captured and replayed."""
    eager = network(UNet2DConditionModel, config_of(options.model, "unet"))
    unet: Any = torch.compile(eager, fullgraph=True, dynamic=False)
    factor = 2 ** (len(config_of(options.model, "vae")["block_out_channels"]) - 1)
    for rows in sorted({2, 2 * max(options.batches)}):
        call = step(unet, eager.config, rows, options.size, factor)
        began = time.perf_counter()
        call()
        report(f"compile_s.{rows}", time.perf_counter() - began)
        report(f"step_ms.{rows}", milliseconds(call))
        if DEVICE == "cuda":
            report(f"graph_ms.{rows}", milliseconds(graphed(call)))


def config_of(model: str, part: str) -> Mapping[str, Any]:
    folder = ROOT / ("assets/demo-model" if model == "demo" else model)
    if folder.is_dir():
        return json.loads((folder / part / "config.json").read_text("utf-8"))
    return json.loads((ROOT / "capacity" / "presets" / f"{model}.json").read_text("utf-8"))[part]


def network(kind: Any, config: Mapping[str, Any]) -> Any:
    with torch.device(DEVICE):  # random weights are made where they are used
        module = kind.from_config(dict(config))
    return module.to(DEVICE, torch.bfloat16).to(memory_format=torch.channels_last).eval()


def step(unet: Any, config: Mapping[str, Any], rows: int, size: tuple[int, int], factor: int) -> Call:
    x = latents(rows, config["in_channels"], size, factor)
    timesteps = torch.full((rows,), 481.0, device=DEVICE)
    embeds = torch.randn(rows, TEXT_LENGTH, config["cross_attention_dim"], device=DEVICE, dtype=torch.bfloat16)

    def call() -> Any:
        with torch.inference_mode():
            return unet(x, timesteps, embeds, return_dict=False)[0]

    return call


def decode(vae: Any, images: int, size: tuple[int, int], factor: int) -> Call:
    x = latents(images, vae.config.latent_channels, size, factor)

    def call() -> Any:
        with torch.inference_mode():
            return vae.decode(x, return_dict=False)[0]

    return call


def latents(rows: int, channels: int, size: tuple[int, int], factor: int) -> Any:
    x = torch.randn(rows, channels, size[1] // factor, size[0] // factor, device=DEVICE, dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last)


def graphed(call: Call) -> Call:
    """Replays the kernels of a call, without the host's work between them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(call: Call) -> float:
    """Of a call, of REPEATS that are dispatched together: the median of RUNS, after one that does not count."""

    def run() -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(REPEATS):
            call()
        synchronize()
        return 1e3 * (time.perf_counter() - began) / REPEATS

    run()
    return statistics.median(run() for _ in range(RUNS))


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
