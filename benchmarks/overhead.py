"""Measures what HTTP costs, what mixing unlike requests costs, and what edits cost beside generations.

    python -m benchmarks.overhead          # starts and ends a local cluster of its own; exit 1 if a bar is missed

HTTP: images per second over HTTP at saturation, including file encoding. The baseline is a loop over the pipeline's
verbs in this process, with the batch size of the highest throughput. The two take turns; the server is idle meanwhile.

Mixed: UNet rows per second of the engine under requests with random steps, samplers and guidance. The baseline is a
stream of equal guided requests and a stream of equal unguided ones, with the same mean number of steps. Each row of the
mix is compared with a row of its own kind, so the ratio is the price of mixing alone.

Edits: benchmarks/edits.py.
"""

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import psutil
import yaml

from app.builders import Args
from app.diffusion.samplers import SAMPLERS
from app.engine.verbs import Verbs
from app.types import Generation, RequestDefaults
from benchmarks import edits
from benchmarks.devices import demo_pipeline, served_by_engine
from benchmarks.figures import Figure, conclude
from benchmarks.load import GUIDANCE_SCALE, equal_requests, offer_all, request
from benchmarks.local_cluster import TIMEOUT_S, leave, local_cluster
from benchmarks.paced import SD1_ENCODE_STEPS, Pace, PacedPipeline
from benchmarks.report import log, machine
from benchmarks.whole_batch import Images, Picture, draw
from cluster import ROOT
from cluster.cli import Parser, run_command
from cluster.local.state import running

RUN_DIR = ROOT / ".run" / "bench"
REPLICA = ":StableDiffusion"  # in its process's title
PACED, DEMO = "paced as a TPU host", "demo model"
MIXED_STEPS = (5, 50)
MIXED_SCALES = (1.5, 12.0)


def over_http(runs: int, count: int, concurrency: int) -> Figure:
    config = read_config()
    args = Args(**config["applications"][0]["args"])
    steps, guidance_scale = args.defaults.numbers or RequestDefaults()
    with local_cluster(RUN_DIR, config) as api:
        pipeline = demo_pipeline(args.batch_buckets, args.limits.num_inference_steps[1])
        requests = [
            request(pipeline.sizes[0], seed, steps=steps, guidance_scale=guidance_scale) for seed in range(count)
        ]
        batch = best_batch(pipeline, requests[0])
        figure = Figure(
            *(DEMO, f"{concurrency} clients", "images/s over HTTP"),
            bar=0.95,
            at_most=False,
            against=f"encode, insert, steps, decode in batches of {batch}",
        )
        url = f"{api}/v1/images/generations"
        asyncio.run(ask(url, requests[:concurrency], concurrency))  # warms the server up
        for run in range(runs):
            seconds = {}
            for way in ("HTTP", "loop") if run % 2 else ("loop", "HTTP"):
                began = time.monotonic()
                if way == "HTTP":
                    before = processor_s()
                    asyncio.run(ask(url, requests, concurrency))
                    log_processor({name: spent - before.get(name, 0.0) for name, spent in processor_s().items()}, count)
                else:
                    loop(pipeline, requests, batch)
                seconds[way] = time.monotonic() - began
            figure.add(count / seconds["HTTP"], count / seconds["loop"])
            log(f"{count} images: {seconds['HTTP']:.1f} s over HTTP, {seconds['loop']:.1f} s in a loop")
    return figure


def processor_s() -> dict[str, float]:
    """Processor seconds of the cluster's processes so far: the replica's, and those of all others together."""
    spent = {"the replica": 0.0, "proxy, ingress and Ray": 0.0}
    for process in running(RUN_DIR).search():
        with suppress(psutil.Error):
            part = "the replica" if REPLICA in " ".join(process.cmdline()) else "proxy, ingress and Ray"
            times = process.cpu_times()
            spent[part] += times.user + times.system
    return spent


def log_processor(spent: Mapping[str, float], images: int) -> None:
    times = ", ".join(f"{name} {1e3 * seconds / images:.0f}" for name, seconds in spent.items())
    log(f"processor ms per image: {times}")


def mixed(device: str, pipeline: Verbs, samplers: Sequence[str | None], runs: int, count: int) -> Figure:
    figure = Figure(
        *(device, "mixed requests", "UNet rows/s"), bar=0.97, at_most=False, against="guided and unguided, each alike"
    )
    for run in range(runs):
        rng = np.random.default_rng(run)
        various = [vary(request(pipeline.sizes[0], seed, steps=1), samplers, rng) for seed in range(count)]
        steps = round(float(np.mean([evaluations(pipeline, generation) for generation in various])))
        size = pipeline.sizes[0]
        streams = {
            "mixed": various,
            "guided": equal_requests(count, size, steps=steps, guidance_scale=GUIDANCE_SCALE),
            "unguided": equal_requests(count, size, steps=steps, guidance_scale=1.0),
        }
        row_s = {}
        for name in list(streams) if run % 2 else list(streams)[::-1]:
            with served_by_engine(pipeline) as submit:
                row_s[name] = offer_all(submit, streams[name]).makespan_s / rows(pipeline, streams[name])
        guided = rows(pipeline, [generation for generation in various if Picture(generation, 0).guided]) / rows(
            pipeline, various
        )
        figure.add(1 / row_s["mixed"], 1 / (guided * row_s["guided"] + (1 - guided) * row_s["unguided"]))
        log(f"{device}: ms per row " + ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in row_s.items()))
    return figure


def vary(generation: Generation, samplers: Sequence[str | None], rng: np.random.Generator) -> Generation:
    guided = rng.random() < 0.5
    return replace(
        generation,
        num_inference_steps=int(rng.integers(*MIXED_STEPS, endpoint=True)),
        guidance_scale=float(rng.uniform(*MIXED_SCALES)) if guided else 1.0,
        sampler=samplers[int(rng.integers(len(samplers)))],
    )


def evaluations(pipeline: Verbs, generation: Generation) -> int:
    return len(pipeline.table(generation.sampler, generation.num_inference_steps))


def rows(pipeline: Verbs, requests: Sequence[Generation]) -> int:
    return sum(evaluations(pipeline, generation) * Picture(generation, 0).rows for generation in requests)


def loop(pipeline: Verbs, requests: Sequence[Generation], batch: int) -> list[Images]:
    state = pipeline.empty_state(pipeline.sizes[0])
    batches = []
    for first in range(0, len(requests), batch):
        pictures = [Picture(generation, 0) for generation in requests[first : first + batch]]
        state, pixels = draw(pipeline, state, pictures)
        batches.append(pixels)
    return batches


def best_batch(pipeline: Verbs, generation: Generation) -> int:
    """The batch size with the highest throughput. Each is measured."""
    rates = {}
    most = pipeline.row_buckets[-1] // Picture(generation, 0).rows
    for batch in [bucket for bucket in pipeline.row_buckets if bucket <= most]:
        loop(pipeline, [generation] * batch, batch)
        count = max(8, 2 * batch)
        began = time.monotonic()
        loop(pipeline, [generation] * count, batch)
        rates[batch] = count / (time.monotonic() - began)
    log("images/s of the loop by batch: " + ", ".join(f"{batch}: {rate:.3g}" for batch, rate in rates.items()))
    return max(rates, key=lambda batch: rates[batch])


async def ask(url: str, requests: Sequence[Generation], concurrency: int) -> None:
    """Runs a closed loop: each client sends the next request when it has its picture, until none is left."""
    pending = iter(requests)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:

        async def client() -> None:
            for generation in pending:
                body = {
                    "prompt": generation.prompt,
                    "seed": generation.seed,
                    "num_inference_steps": generation.num_inference_steps,
                    "guidance_scale": generation.guidance_scale,
                }
                async with session.post(url, json=body) as answer:
                    content = await answer.read()
                    if answer.status != 200:
                        raise RuntimeError(f"The server answers {answer.status}: {content[:300]!r}")

        await asyncio.gather(*(client() for _ in range(concurrency)))


def read_config() -> dict[str, Any]:
    """serve_config.yaml with a fixed single replica, as the baseline is a single pipeline too."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    for deployment in config["applications"][0]["deployments"]:
        if deployment.pop("autoscaling_config", None):
            deployment["num_replicas"] = 1
    return config


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--part", choices=("http", "mixed", "edits", "all"), default="all", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of each side (%(default)s)")
    parser.add_argument("--requests", type=int, default=48, help="in each run (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=12, help="HTTP clients (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a single run of 16 requests, as a check")
    args = parser.parse_args()
    before = machine()
    runs, count = (1, 16) if args.quick else (args.runs, args.requests)
    signal.signal(signal.SIGTERM, leave)

    figures = []
    if args.part in ("http", "all"):
        figures.append(over_http(runs, count, args.concurrency))
    if args.part in ("mixed", "edits", "all"):
        paced = PacedPipeline(Pace(step_s=0.005, encode_steps=SD1_ENCODE_STEPS), batch_buckets=[1, 2, 4, 8])
        demo = demo_pipeline(edits=True)
        if args.part != "edits":
            figures.append(mixed(PACED, paced, [None], runs, 8 * count))
            figures.append(mixed(DEMO, demo, SAMPLERS, runs, count))
        if args.part != "mixed":
            figures += edits.measured(PACED, paced, runs, 8 * count)
            figures += edits.measured(DEMO, demo, runs, count)
        figures.sort(key=lambda figure: figure.device)
    complete = not args.quick and args.part == "all"
    title = "What HTTP, mixing and edits cost: ours over baseline"
    return conclude("overhead", title, figures, before, vars(args), complete)


if __name__ == "__main__":
    run_command(main)
