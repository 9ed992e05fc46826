"""Measurements at warm-up: what each dispatch takes (app/diffusion/timing.py), and which colours previews have.

Runs on the host, by the verbs of a pipeline. Nothing here is part of a compiled program.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from app.diffusion.timing import Timed, timed
from app.types import ActiveSlot, Capabilities, DispatchCost, Edit, Size

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

BUDGET_S = 2.0  # for timing, all sizes together, as it delays the start
ENCODES = 3  # of an image, for timing
PREVIEW_STEPS, PREVIEW_S = 10, 2.0  # steps of the images that the preview map is fitted to, and for how long at most


class Calibration(NamedTuple):
    step_s: dict[tuple[Size, int], float]  # seconds of a step by size and row bucket
    launch_s: dict[tuple[Size, int], float]  # what a dispatch adds to its steps, likewise
    decode_s: dict[tuple[Size, int], float]  # seconds of a decode by size and decode bucket
    encode_image_s: dict[Size, float]  # seconds of an image's encode by size; empty where the server takes no images
    reference_step_s: dict[tuple[Size, int], float]  # as `step_s`, of slots that look at images; empty where none can
    dispatch_cost: DispatchCost
    preview_maps: dict[Size, np.ndarray]  # float32 [C + 1, 3]


class Verbs(Protocol):
    """What is measured of a pipeline."""

    sizes: tuple[Size, ...]
    row_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...]
    num_slots: int
    max_steps: int
    capabilities: Capabilities

    def encode(self, texts: Sequence[str]) -> list[Any]: ...
    def empty_state(self, size: Size) -> Any: ...
    def table(self, sampler: str | None, num_inference_steps: int, size: Size | None = None) -> Any: ...
    def insert(
        self, state: Any, slot: int, prompt: Any, negative_prompt: Any, table: Any, guidance_scale: float, seed: int
    ) -> Any: ...
    def step(self, state: Any, active: Sequence[ActiveSlot], count: int = 1) -> Any: ...
    def encode_image(self, edit: Edit, size: Size) -> Any: ...
    def decode(self, state: Any, slots: Sequence[int]) -> Any: ...
    def preview(self, state: Any, slot: int) -> Any: ...
    def export_slot(self, state: Any, slot: int) -> Any: ...
    def unpacked(self, size: Size, packed: bytes) -> Any: ...
    def import_slot(self, state: Any, slot: int, image: Any) -> Any: ...
    def wait(self, done: Any) -> None: ...


def calibrate(pipeline: Verbs) -> Calibration:
    """Runs every program at least once."""
    step_s, launch_s, decode_s, costs = {}, {}, {}, []
    preview_maps, encode_image_s, reference_step_s = {}, {}, {}
    (text,) = pipeline.encode(["warm-up"])
    for size in pipeline.sizes:
        times = times_of(pipeline, size, text)
        step_s.update({(size, rows): seconds for rows, seconds in times.step_s.items()})
        launch_s.update({(size, rows): seconds for rows, seconds in times.launch_s.items()})
        decode_s.update({(size, images): seconds for images, seconds in times.decode_s.items()})
        costs.append(times.dispatch_cost)
        if pipeline.capabilities.edits:
            encode_image_s[size] = time_of_encode(pipeline, size)
        if pipeline.capabilities.references:
            steps = times_with_references(pipeline, size, text, times)
            reference_step_s.update({(size, rows): seconds for rows, seconds in steps.items()})
        preview_maps[size] = preview_map(pipeline, size, text, times.step_s)
        logger.info(
            "warm %dx%d ms a launch + a step by rows: %s; a dispatch %s",
            *size,
            ", ".join(f"{rows}: {1e3 * times.launch_s[rows]:.1f} + {1e3 * s:.1f}" for rows, s in times.step_s.items()),
            "blocks" if times.dispatch_cost.blocks else f"takes the host {1e3 * times.dispatch_cost.host_s:.2f} ms",
        )
    return Calibration(step_s, launch_s, decode_s, encode_image_s, reference_step_s, max(costs), preview_maps)


def time_of_encode(pipeline: Verbs, size: Size) -> float:
    """The quickest of a few runs after the first."""
    edit, seconds = Edit(np.zeros((size[1], size[0], 3), np.uint8), np.ones(size[::-1], np.bool_), 1.0), []
    for _ in range(ENCODES):
        began = time.perf_counter()
        pipeline.wait(pipeline.encode_image(edit, size))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def times_of(pipeline: Verbs, size: Size, text: Any) -> Timed:
    state = filled(pipeline, size, text, pipeline.num_slots, pipeline.table(None, 1, size))

    def step(rows: int, count: int) -> Any:
        nonlocal state
        state, done = pipeline.step(state, slots_of(rows), count)  # also past the end of a table
        return done

    def decode(images: int) -> Any:
        return pipeline.decode(state, range(images))

    buckets = pipeline.row_buckets, pipeline.decode_buckets
    measured = timed(step, decode, pipeline.wait, *buckets, budget_s=BUDGET_S / len(pipeline.sizes))
    jax.block_until_ready(pipeline.preview(state, 0))
    moving = pipeline.unpacked(size, bytes(pipeline.export_slot(state, 0)))
    jax.block_until_ready(pipeline.import_slot(state, 0, moving))
    return measured


def times_with_references(pipeline: Verbs, size: Size, text: Any, times: Timed) -> dict[int, float]:
    """Seconds of a step by row bucket, by the second run: what a launch adds is that of other steps."""
    state, step_s = filled(pipeline, size, text, pipeline.num_slots, pipeline.table(None, 1, size)), {}
    for rows in pipeline.row_buckets:
        for _ in range(2):
            began = time.perf_counter()
            state, done = pipeline.step(state, slots_of(rows, looks=True))
            pipeline.wait(done)
            took_s = time.perf_counter() - began
        step_s[rows] = max(took_s - times.launch_s[rows] - times.dispatch_cost.host_s, times.step_s[rows])
    return step_s


def slots_of(rows: int, *, looks: bool = False) -> list[ActiveSlot]:
    """As many slots as have so many rows, guided but for an odd one."""
    guided = [ActiveSlot(slot, True, looks) for slot in range(rows // 2)]
    return guided + [ActiveSlot(rows // 2, False, looks)] * (rows % 2)


def preview_map(pipeline: Verbs, size: Size, text: Any, step_s: dict[int, float]) -> np.ndarray:
    """The map that comes closest to what this VAE makes of a few images."""
    count = pipeline.decode_buckets[-1]
    seconds = step_s[next(rows for rows in pipeline.row_buckets if rows >= count)]
    table = pipeline.table(None, max(1, min(PREVIEW_STEPS, pipeline.max_steps, int(PREVIEW_S / seconds))), size)
    state = filled(pipeline, size, text, count, table)
    state, _ = pipeline.step(state, [ActiveSlot(slot, False) for slot in range(count)], len(table))
    pixels = np.asarray(pipeline.decode(state, range(count)))
    return fitted_map(np.asarray(state.latents)[:count], pixels)


def fitted_map(latents: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """[C + 1, 3]: the least-squares map from scaled latents, and a one, to colours in [-1, 1]."""
    count, h, w, channels = latents.shape
    height, width = pixels.shape[1:3]
    colours = pixels.astype(np.float32) / 127.5 - 1
    blocks = colours.reshape(count, h, height // h, w, width // w, 3).mean(axis=(2, 4))
    inputs = np.concatenate([latents, np.ones((count, h, w, 1), np.float32)], axis=-1)
    return np.asarray(np.linalg.lstsq(inputs.reshape(-1, channels + 1), blocks.reshape(-1, 3))[0], np.float32)


def filled(pipeline: Verbs, size: Size, text: Any, count: int, table: Any) -> Any:
    """A state with images in its first slots."""
    state = pipeline.empty_state(size)
    for slot in range(count):
        state = pipeline.insert(state, slot, text, text, table, 1.0, slot)
    return state
