"""Finds how many hosts of a TPU type a load needs, by simulating more and more hosts until they meet the target."""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from capacity.chips import Host
from capacity.cluster_simulation import Arrival, Cluster
from capacity.configs import Workload
from capacity.host_costs import HostCosts
from capacity.simulate import Load, Simulated, Timings, pipeline_of, request, simulate
from loadtest.arrivals import Seconds, poisson

MOST_HOSTS = 64
LOAD_S = 600.0  # length of the simulated load, unless that makes too few or too many requests
FEWEST_REQUESTS, MOST_REQUESTS = 200, 4000  # of the simulated load


@dataclass(frozen=True)
class Plan:
    """The hosts of one type that meet the target, or why none do."""

    host: Host
    buckets: tuple[int, ...]  # those that fit, up to the fastest
    images_s: float  # images a second of a busy host
    alone_s: float  # time of an image on an idle host
    hosts: int = 0
    simulated: Simulated | None = None
    why_not: str = ""

    @property
    def slots(self) -> int:
        return 2 * self.buckets[-1] if self.buckets else 0

    @property
    def dollars_hour(self) -> float:
        return self.hosts * self.host.dollars_hour


def plan_hosts(costs: HostCosts, workload: Workload, evaluations: int, rate: float, slo_s: float) -> Plan:
    """The fewest hosts that meet the target with the engine's own admission."""
    size, guided = workload.spec.sizes[0], workload.guidance_scale > 1
    throughputs = costs.throughputs(size, workload.spec.batch_buckets, evaluations, 1 + guided)
    if not throughputs:
        return Plan(costs.host, (), 0.0, math.inf, why_not="its programs do not fit")
    best = min(throughputs, key=lambda throughput: throughput.image_s)
    buckets = tuple(throughput.images for throughput in throughputs if throughput.images <= best.images)
    alone_s = throughputs[0].image_s
    plan = Plan(costs.host, buckets, 1 / best.image_s, alone_s)
    if alone_s > slo_s:
        return replace(plan, why_not=f"a picture takes {alone_s:.2f} s alone, more than the {slo_s:g} s asked for")
    encode = costs.cost("encode")
    timings = Timings(
        {rows: cost.seconds for rows, cost in costs.steps(size).items() if rows <= 2 * best.images},
        {images: cost.seconds for images, cost in costs.decodes(size).items()},
        encode.seconds if encode else 0.0,
        slots=plan.slots,
    )
    args = workload.args
    images_at_once = None if args.images_at_once == "auto" else args.images_at_once
    for hosts in range(max(1, math.floor(rate * best.image_s)), MOST_HOSTS + 1):
        load = Load(arrivals_at(rate), evaluations, guided)
        run = simulate if hosts == 1 else partial(together, hosts=hosts)
        simulated = run(
            timings, load, gain=args.admission_gain, max_waiting=args.max_waiting, images_at_once=images_at_once
        )
        if not simulated.refused and simulated.percentile(95) <= slo_s:
            return replace(plan, hosts=hosts, simulated=simulated)
    return replace(plan, why_not=f"{MOST_HOSTS} hosts are not enough")


def together(
    timings: Timings, load: Load, *, gain: float, max_waiting: int, images_at_once: int | None, hosts: int
) -> Simulated:
    """Hosts behind the ingress's queue and router (app/api/routing/)."""
    cluster = Cluster(
        partial(pipeline_of, timings), hosts, max_waiting=max_waiting, gain=gain, images_at_once=images_at_once
    )
    arrivals = [Arrival(float(at), request(number, load)) for number, at in enumerate(load.arrivals)]
    outcome = cluster.run(arrivals)
    refused = np.isnan(outcome.latencies)
    return Simulated(outcome.latencies[~refused], int(refused.sum()), outcome.ended)


def arrivals_at(rate: float) -> Seconds:
    """Random arrivals, `rate` a second. They are the same in each call."""
    count = min(MOST_REQUESTS, max(FEWEST_REQUESTS, round(rate * LOAD_S)))
    return poisson(count, np.random.default_rng(0)) / rate
