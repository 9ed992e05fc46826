"""Measures what edits cost a server beside generations: part `edits` of benchmarks/overhead.py.

An edit of strength s takes s of its steps and one encode of its image. So each edit here is compared with a generation
of as many steps: alone, and as UNet rows per second of a stream in which every other request is an edit. The encodes
count as time, not as rows.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from app.engine.verbs import Verbs
from app.types import Edit, Generation
from benchmarks.devices import served_by_engine
from benchmarks.figures import Figure
from benchmarks.load import offer_all, request
from benchmarks.report import log

STEPS, STRENGTH = 25, 0.8  # of an edit, which evaluates the UNet as often as a generation of STEPS * STRENGTH steps
LONE = 8  # requests, one after the other


def measured(device: str, pipeline: Verbs, runs: int, count: int) -> Iterator[Figure]:
    """A lone edit, and a stream of edits among generations."""
    generations = [request(pipeline.sizes[0], seed, steps=round(STEPS * STRENGTH)) for seed in range(count)]
    edits = [edit_of(generation) for generation in generations]
    for edit, generation in zip(edits, generations, strict=True):
        assert evaluations(pipeline, edit) == evaluations(pipeline, generation)
    streams = {
        "lone edit": edits[:LONE],
        "lone generation": generations[:LONE],
        "generations": generations,
        "both": [edit if seed % 2 else generations[seed] for seed, edit in enumerate(edits)],
    }
    encode_s = pipeline.encode_image_s[pipeline.sizes[0]]

    alone = Figure(device, "a lone edit", "s", bar=1.05, at_most=True, against="as many steps, and one encode")
    rate = Figure(device, "edits among generations", "UNet rows/s", bar=0.97, at_most=False, against="generations")
    for run in range(runs):
        seconds = {}
        for name in list(streams) if run % 2 else list(streams)[::-1]:
            with served_by_engine(pipeline) as submit:
                if name.startswith("lone"):
                    lone = [offer_all(submit, [generation]).makespan_s for generation in streams[name]]
                    seconds[name] = float(np.median(lone))
                else:
                    seconds[name] = offer_all(submit, streams[name]).makespan_s
        alone.add(seconds["lone edit"], seconds["lone generation"] + encode_s)
        rate.add(1 / seconds["both"], 1 / seconds["generations"])
        log(f"{device}: an encode {1e3 * encode_s:.3g} ms, s " + ", ".join(f"{k} {v:.3g}" for k, v in seconds.items()))
    yield alone
    yield rate


def edit_of(generation: Generation) -> Generation:
    rng = np.random.default_rng(generation.seed)
    image = rng.integers(0, 256, (generation.height, generation.width, 3), dtype=np.uint8)
    return replace(generation, num_inference_steps=STEPS, edit=Edit(image, strength=STRENGTH))


def evaluations(pipeline: Verbs, generation: Generation) -> int:
    strength = generation.edit.strength if generation.edit else None
    size = (generation.width, generation.height)
    return len(pipeline.table(generation.sampler, generation.num_inference_steps, size, strength))
