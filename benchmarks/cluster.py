"""Measures the cluster's queue and router against Serve's own, in one run: `make bench-cluster`.

Four replicas keep the time of a TPU host of four chips instead of computing, behind the real replica, engine, router,
Serve and HTTP (benchmarks/paced_cluster.py). The baseline is the same with Serve's default router, where requests wait
in the replicas. Both get the same requests at the same times and take turns. The slowdown of a request is its latency
over what it takes alone. Backlog and trace: benchmarks/cluster_scaling.py; the trace runs only by its name.

One key floods: another one's 95th percentile, over what it is without the flood. Router: the processor time of a
request's way through queue and book with 64 requests in flight, in this process.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import aiohttp
import numpy as np

from app.api.routing.costs import Work
from app.api.routing.page import Sent
from app.api.routing.router import Router
from app.engine.virtual import VirtualClock
from app.types import Generation
from benchmarks import cluster_scaling
from benchmarks.cluster_load import KEYS, SYSTEMS, ask, bearer, in_turn, local_serve, offer
from benchmarks.figures import Figure, conclude
from benchmarks.load import equal_requests, mixed_requests, request
from benchmarks.paced import Pace, PacedPipeline
from benchmarks.paced_cluster import BUCKETS, SIZE
from benchmarks.report import log, machine
from capacity.cluster_simulation import Arrival, Cluster
from capacity.policies import alone_s
from capacity.simulated_replica import report_of
from cluster.cli import Parser, run_command
from loadtest.arrivals import Seconds, poisson

REPLICAS = 4
IN_FLIGHT = 64
BARS = {("mixed", 0.8): (0.75, 0.85), ("mixed", 0.6): (0.88, 0.88), ("equal", 0.8): (1.03, 1.03)}
DEVICE = "four paced hosts of four chips"


@contextmanager
def deployed(pace: Pace) -> Iterator[dict[str, str]]:
    """Both applications in a Ray of their own; the URL of each."""
    with local_serve() as place:
        yield {system: place.deploy(system, pace, REPLICAS) for system in SYSTEMS}


async def moved(url: str) -> int:
    """How many requests were to change replicas."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/stats", headers=bearer(KEYS[0])) as response:
        return int((await response.json())["queue"]["rebalanced"])


def capacity(requests: Sequence[Generation], pace: Pace) -> float:
    """Requests a second of all replicas when every row of a chip is used."""
    rows = np.mean([g.rows * g.n * g.num_inference_steps for g in requests])
    return REPLICAS * pace.chips / pace.step_s / float(rows)


def figures_of(device: str, kind: str, load: float) -> list[Figure]:
    names = "mean slowdown", "p95 latency s"
    return [Figure(device, f"{kind}, {load:.0%}", name, bar) for name, bar in zip(names, BARS[kind, load], strict=True)]


def measure(urls: dict[str, str], pace: Pace, kind: str, load: float, count: int, runs: int) -> list[Figure]:
    figures = figures_of(DEVICE, kind, load)
    for run in range(runs):
        rng = np.random.default_rng([run, 2])
        requests = (
            mixed_requests(count, SIZE, rng)
            if kind == "mixed"
            else equal_requests(count, SIZE, steps=20, guidance_scale=1.0)
        )
        arrivals = poisson(count, np.random.default_rng([run, 3])) / (load * capacity(requests, pace))
        alone = np.array([alone_s(generation, pace) for generation in requests])
        latencies = {}
        for system in in_turn(run):
            latencies[system] = asyncio.run(offer(urls[system], requests, arrivals))
        ours, baseline = latencies["ours"], latencies["serve"]
        figures[0].add(np.mean(ours / alone), np.mean(baseline / alone))
        figures[1].add(np.quantile(ours, 0.95), np.quantile(baseline, 0.95))
        log(f"{kind} at {load:.0%}, run {run + 1} of {runs}: {count} requests")
    return figures


def flood(url: str, count: int) -> Figure:
    """A key with 100 requests at any time, beside one with a request now and then."""
    figure = Figure(DEVICE, "one key floods", "p95 latency s of another", 1.5, against="the same key without the flood")
    rare = equal_requests(count, SIZE, steps=20, guidance_scale=1.0)
    arrivals = poisson(count, np.random.default_rng(7)) * 0.4

    async def alone() -> Seconds:
        return await offer(url, rare, arrivals, KEYS[1])

    async def beside_the_flood() -> Seconds:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client(number: int) -> None:
                for seed in range(number, 1_000_000, 100):
                    await ask(session, url, request(SIZE, seed, steps=20, guidance_scale=1.0), KEYS[0])

            clients = [asyncio.ensure_future(client(number)) for number in range(100)]
            await asyncio.sleep(1.0)
            try:
                return await alone()
            finally:
                for task in clients:
                    task.cancel()
                await asyncio.gather(*clients, return_exceptions=True)

    without, beside = asyncio.run(alone()), asyncio.run(beside_the_flood())
    figure.add(np.quantile(beside, 0.95), np.quantile(without, 0.95))
    log(f"one key floods: {count} requests of another")
    return figure


def overhead(pace: Pace) -> Figure:
    """Milliseconds of the processor from a request's arrival to its place, and from its answer to the next one."""
    figure = Figure(DEVICE, f"router, {IN_FLIGHT} in flight", "ms a request", 1.0, against="1 ms")
    sent: list[tuple[str, Sent]] = []
    router = Router(10_000, lambda ticket, name, entry, ahead_s: sent.append((name, entry)))
    cluster = Cluster(lambda clock: PacedPipeline(pace, batch_buckets=BUCKETS, size=SIZE, clock=clock), REPLICAS)
    router.book.list(cluster.replicas, 0.0)
    reports = {name: report_of(replica) for name, replica in cluster.replicas.items()}
    for report in reports.values():
        router.report(report, 0.0)
    requests = mixed_requests(1000, SIZE, np.random.default_rng(0))
    now, began = 0.0, time.process_time()
    for number, generation in enumerate(requests):
        now += 1 / capacity(requests, pace)
        ticket = router.ticket(Work.of(generation), now)
        router.images_together(ticket.work, now)
        router.admit(ticket, 1e6, now)
        router.queue.add(ticket)
        router.pump(now)
        router.rebalance(now)
        if number >= IN_FLIGHT:
            name, entry = sent.pop(0)
            router.answered(entry)
            router.report(reports[name], now)
            router.pump(now)
            router.rebalance(now)
    figure.add(1e3 * (time.process_time() - began) / len(requests), 1.0)
    return figure


def simulated(pace: Pace, load: float, count: int, runs: int) -> list[Figure]:
    """The same two policies on a virtual clock, for machines that are too busy to keep the time."""
    figures = figures_of("simulated", "mixed", load)
    for run in range(runs):
        requests = mixed_requests(count, SIZE, np.random.default_rng([run, 2]))
        at = poisson(count, np.random.default_rng([run, 3])) / (load * capacity(requests, pace))
        alone = np.array([alone_s(generation, pace) for generation in requests])
        arrivals = [Arrival(float(moment), generation) for moment, generation in zip(at, requests, strict=True)]

        def device(clock: VirtualClock) -> PacedPipeline:
            return PacedPipeline(pace, batch_buckets=BUCKETS, size=SIZE, clock=clock)

        ours, baseline = (
            Cluster(device, REPLICAS, routing=routing, seed=run).run(arrivals).latencies
            for routing in ("book", "serve")
        )
        figures[0].add(np.mean(ours / alone), np.mean(baseline / alone))
        figures[1].add(np.quantile(ours, 0.95), np.quantile(baseline, 0.95))
    return figures


def main() -> int:
    parser = Parser(__doc__)
    parts = ("mixed80", "mixed60", "equal", "flood", "backlog", "router", "simulated")
    parser.add_argument("--part", choices=(*parts, "trace", "all"), default="all", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each side (%(default)s)")
    parser.add_argument("--requests", type=int, default=480, help="in each run (%(default)s)")
    parser.add_argument("--pace-ms", type=float, default=20.0, help="of a step of up to four rows (%(default)s)")
    args = parser.parse_args()
    before = machine()
    pace = Pace(chips=4, step_s=args.pace_ms / 1000)
    wanted = set(parts) if args.part == "all" else {args.part}
    figures: list[Figure] = []
    if wanted & {"mixed80", "mixed60", "equal", "flood"}:
        with deployed(pace) as urls:
            for url in urls.values():  # both are warm then
                asyncio.run(offer(url, equal_requests(8, SIZE, steps=4, guidance_scale=1.0), np.zeros(8)))
            for part, kind, load in (("mixed80", "mixed", 0.8), ("mixed60", "mixed", 0.6), ("equal", "equal", 0.8)):
                if part in wanted:
                    figures += measure(urls, pace, kind, load, args.requests, args.runs)
            if "flood" in wanted:
                figures.append(flood(urls["ours"], 40))
            log(f"{asyncio.run(moved(urls['ours']))} requests were to change replicas")
    if "backlog" in wanted:
        figures.append(cluster_scaling.backlog(pace, args.runs))
    if "trace" in wanted:
        figures += cluster_scaling.wave(pace, args.runs)
    if "router" in wanted:
        figures.append(overhead(pace))
    if "simulated" in wanted:
        for load in (0.8, 0.6):
            figures += simulated(pace, load, args.requests, args.runs)
    title = "The cluster's queue and router: ours over Serve's own"
    return conclude("cluster", title, figures, before, vars(args), args.part == "all")


if __name__ == "__main__":
    run_command(main)
