"""The parts of benchmarks/on_gpu.py that run our own code: networks with random weights, and the engine without Ray."""

import argparse
import dataclasses
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from app.aot.compile import CompileWatch, compiled
from app.diffusion.models import attention
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.pipeline import Pipeline
from app.diffusion.weights import DTYPES
from app.engine.engine import Engine
from app.types import ActiveSlot, Generation, PipelineSpec
from benchmarks.on_gpu import ROOT, Report
from capacity.models import shapes_of

TOKENIZER = ROOT / "assets" / "demo-model" / "tokenizer"  # of presets, which have none
SAMPLER = "dpmpp_2m"
GUIDANCE = 7.5
REPEATS, RUNS = 10, 5  # steps, or decodes, that are dispatched together; timings, of which the median counts
BATCHES = 4  # of the largest bucket, to saturate it
TIMEOUT_S = 120.0
TOP = 25  # kernels


def ours(report: Report, options: argparse.Namespace) -> None:
    """Every bucket, then the engine beside the bare verbs."""
    logging.basicConfig(level=logging.INFO)  # what is compiled, and how long it takes
    pipeline = pipeline_of(options)
    began = time.perf_counter()
    pipeline.warmup()
    report("warmup_s", time.perf_counter() - began)
    report("devices", [f"{device.platform} {device.device_kind}" for device in jax.devices()])
    bare = Bare(pipeline)
    for rows in pipeline.row_buckets:
        report(f"step_ms.{rows}", 1e3 * bare.step_s(rows))
    for images in pipeline.decode_buckets:
        report(f"decode_ms.{images}", 1e3 * bare.decode_s(images))
    bare.serve(report, options.steps)
    memory = jax.devices()[0].memory_stats() or {}
    report("memory_bytes", {name: memory.get(name) for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")})
    serve(report, pipeline, options.steps)


def serve(report: Report, pipeline: Pipeline, steps: int) -> None:
    engine = Engine(pipeline, max_waiting=10_000)
    watch = CompileWatch()
    watch.ready()
    engine.start()

    def request(seed: int) -> Generation:
        width, height = pipeline.sizes[0]
        return Generation("a red boat", "", width, height, steps, GUIDANCE, seed, SAMPLER, 1)

    def answer_s(requests: int) -> float:
        began = time.perf_counter()
        for future in [engine.submit(request(seed)) for seed in range(requests)]:
            future.result(TIMEOUT_S)
        return time.perf_counter() - began

    try:
        answer_s(1)  # encodes the prompt, which stays in the cache
        report("lone_s", median(lambda: answer_s(1)))
        many = BATCHES * pipeline.row_buckets[-1] // 2
        report("images_s", statistics.median(many / answer_s(many) for _ in range(3)))
        report("lone_s_after_load", median(lambda: answer_s(1)))
        report("compiles_while_serving", watch.count)
        report("stats", engine.stats())
    finally:
        engine.close()
        watch.close()


def restart(report: Report, options: argparse.Namespace) -> None:
    """A second start, with the programs that `ours` has saved."""
    logging.basicConfig(level=logging.INFO)  # why one is compiled anew
    pipeline = pipeline_of(options)
    watch = CompileWatch()
    watch.ready()
    began = time.perf_counter()
    pipeline.warmup()
    report("restart_warmup_s", time.perf_counter() - began)
    report("restart_compiles", watch.count)
    watch.close()


def xla_attention(report: Report, options: argparse.Namespace) -> None:
    """The smallest guided and the largest step without cuDNN's fused attention."""
    attention.fused = lambda q: False
    buckets = sorted({2, 2 * max(options.batches)})
    bare = Bare(with_steps(options, buckets))
    for rows in buckets:
        report(f"step_ms.{rows}", 1e3 * bare.step_s(rows))


def kernels(report: Report, options: argparse.Namespace) -> None:
    """The kernels of the smallest guided step: their milliseconds a step, and how often each is launched."""
    bare = Bare(with_steps(options, [2]))
    bare.step_s(2)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            bare.step_s(2)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    steps = REPEATS * (RUNS + 1)
    launched: dict[str, list[float]] = {}  # milliseconds a step
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                launched.setdefault(event.name, []).append(event.duration_ns / 1e6 / steps)
    longest = sorted(launched, key=lambda name: -sum(launched[name]))
    report("kernels_ms", sum(sum(times) for times in launched.values()))
    report("kernels_launched", sum(len(times) for times in launched.values()) / steps)
    report(
        "longest_kernels", [[name[:100], sum(launched[name]), len(launched[name]) / steps] for name in longest[:TOP]]
    )


def with_steps(options: argparse.Namespace, buckets: Sequence[int]) -> Pipeline:
    """A pipeline of which nothing is compiled but what these steps need."""
    pipeline = pipeline_of(options)
    needed = ("encode", "insert"), tuple(f" rows {rows}" for rows in buckets)
    programs = [p for p in pipeline.programs if p.name.startswith(needed[0]) or p.name.endswith(needed[1])]
    pipeline.run = compiled(programs, folder=None, fingerprint={})
    return pipeline


class Bare:
    """The verbs of a pipeline, called with nothing in between."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        (self.text,) = pipeline.encode(["a red boat"])

    def inserted(self, images: int, steps: int, state: Any = None) -> Any:
        state = self.pipeline.empty_state(self.pipeline.sizes[0]) if state is None else state
        table = self.pipeline.table(SAMPLER, steps)
        for slot in range(images):
            state = self.pipeline.insert(state, slot, self.text, self.text, table, GUIDANCE, slot)
        return state

    def step_s(self, rows: int) -> float:
        """Seconds of a step, of REPEATS that are dispatched together."""
        active = [ActiveSlot(slot, True) for slot in range(rows // 2)] or [ActiveSlot(0, False)]

        def run() -> float:
            state = self.inserted(len(active), REPEATS)
            jax.block_until_ready(state)
            began = time.perf_counter()
            state, done = self.pipeline.step(state, active, REPEATS)
            self.pipeline.wait(done)
            return (time.perf_counter() - began) / REPEATS

        return median(run)

    def decode_s(self, images: int) -> float:
        state, _ = self.pipeline.step(self.inserted(images, 1), [ActiveSlot(slot, True) for slot in range(images)], 1)
        jax.block_until_ready(state)

        def run() -> float:
            began = time.perf_counter()
            jax.block_until_ready([self.pipeline.decode(state, range(images)) for _ in range(REPEATS)])
            return (time.perf_counter() - began) / REPEATS

        return median(run)

    def serve(self, report: Report, steps: int) -> None:
        report("bare_lone_s", median(lambda: self.request_s(steps)))
        report("bare_images_s", statistics.median(self.images_s(steps) for _ in range(3)))

    def request_s(self, steps: int) -> float:
        """Seconds from the insertion of a guided image to its pixels on the host."""
        state = self.pipeline.empty_state(self.pipeline.sizes[0])
        jax.block_until_ready(state)
        began = time.perf_counter()
        for pixels in self.draw(state, 1, steps)[1]:
            np.asarray(pixels)
        return time.perf_counter() - began

    def images_s(self, steps: int) -> float:
        """Guided images a second in full buckets, until their pixels are on the host."""
        images = self.pipeline.row_buckets[-1] // 2
        state = self.pipeline.empty_state(self.pipeline.sizes[0])
        jax.block_until_ready(state)
        began = time.perf_counter()
        decoded: list[jax.Array] = []
        for _ in range(BATCHES):
            state, pixels = self.draw(state, images, steps)
            decoded += pixels
        for image in decoded:
            np.asarray(image)
        return BATCHES * images / (time.perf_counter() - began)

    def draw(self, state: Any, images: int, steps: int) -> tuple[Any, list[jax.Array]]:
        """Dispatches all of these guided images, and returns the state after them and their pixels to be."""
        state = self.inserted(images, steps, state)
        active = [ActiveSlot(slot, True) for slot in range(images)]
        state, _ = self.pipeline.step(state, active, len(self.pipeline.table(SAMPLER, steps)))
        bucket = self.pipeline.decode_buckets[-1]
        groups = [range(first, min(first + bucket, images)) for first in range(0, images, bucket)]
        return state, [self.pipeline.decode(state, slots) for slots in groups]


def pipeline_of(options: argparse.Namespace) -> Pipeline:
    spec = PipelineSpec(
        options.model,
        sizes=((options.size[0], options.size[1]),),
        batch_buckets=tuple(options.batches),
        max_steps=max(REPEATS, options.steps),
        dtype="bfloat16",
        programs=options.programs,
    )
    checkpoint = shapes_of(options.model, DTYPES[spec.dtype])
    networks = {name: with_random_weights(network) for name, network in checkpoint.networks.items()}
    folder = own if (own := checkpoint.path / "tokenizer").is_dir() else TOKENIZER
    tokenizers = {name: Tokenizer(folder, length) for name, length in checkpoint.family.text_lengths.items()}
    return Pipeline(dataclasses.replace(checkpoint, networks=networks, tokenizers=tokenizers), spec)


def with_random_weights(module: nnx.Module) -> nnx.Module:
    """The module with a repeated block of noise in place of shapes. Its size keeps activations near 1."""
    block = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)
    graph, shapes = nnx.split(module)

    def weights(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if len(leaf.shape) == 1:
            return jax.device_put(np.full(leaf.shape, "scale" in name, leaf.dtype))
        scaled = block / math.sqrt(math.prod(leaf.shape[:-1]))
        return jax.device_put(np.resize(scaled.astype(leaf.dtype), leaf.shape))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(weights, shapes))


def median(run: Callable[[], float]) -> float:
    """Of RUNS timings, after one that does not count."""
    run()
    return statistics.median(run() for _ in range(RUNS))
