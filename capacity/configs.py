"""Reads a Serve config for the programs that it has compiled, and a cluster file for the TPUs that will run them."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from app.builders import Args
from app.types import PipelineSpec, RequestDefaults, parse_size
from capacity.chips import CHIPS, Host, host_of
from cluster.cli import UserError
from cluster.config import cluster_config, serve_config


@dataclass(frozen=True)
class Workload:
    """A config's model and shapes, and the defaults of its requests."""

    spec: PipelineSpec
    args: Args

    @property
    def sampler(self) -> str | None:
        return self.args.defaults.sampler

    @property
    def num_inference_steps(self) -> int:
        return self.defaults.num_inference_steps

    @property
    def guidance_scale(self) -> float:
        return self.defaults.guidance_scale

    @cached_property
    def defaults(self) -> RequestDefaults:
        """Raises ValueError where the model, which may have to complete them, is not one that is supported."""
        if numbers := self.args.defaults.numbers:
            return numbers
        from capacity.models import architecture_of  # which imports JAX, whose environment a caller may yet set

        _, family, schedule = architecture_of(self.spec.model)
        return self.args.defaults.completed(family.defaults(schedule), self.args.limits)[0]


def workload_of(config: Path, model: str = "", size: str = "") -> Workload:
    """Reads the first application of app.builders:text_to_image. Raises UserError with the mistakes in its args.

    `model` replaces the config's model, in bfloat16, as it would be served on a TPU; `size` replaces its sizes.
    """
    applications = serve_config.read(config).image_applications
    if not applications:
        raise UserError(f"{config} has no application that {serve_config.BUILDER} builds.")
    return workload_from_args(applications[0].image_args(), model, size)


def workload_from_args(args: Args, model: str = "", size: str = "") -> Workload:
    try:
        sizes = tuple(parse_size(text) for text in ([size] if size else args.sizes))
    except ValueError:
        raise UserError(f"SIZE must be WIDTHxHEIGHT, such as 512x512, got {size}.") from None
    spec = replace(args.pipeline_spec(model or args.model), sizes=sizes, dtype="bfloat16" if model else args.dtype)
    return Workload(spec, args)


def hosts_of(tpus: str, cluster: Path, dollars: str = "") -> list[Host]:
    """The hosts that `tpus` names, such as v5litepod-4,v6e-8, or else those of the cluster file's TPU node types.

    `dollars` replaces the prices of a chip-hour, such as v5e=0.9,v6e=1.5. Raises UserError.
    """
    prices = prices_of(dollars)
    names = [name.strip() for name in tpus.split(",") if name.strip()]
    if not names:
        names = [node.slice.name for node in cluster_config.read(cluster).node_types.values() if node.slice]
        if not names:
            raise UserError(f"{cluster} has no TPU nodes. Name a TPU: TPU=v5litepod-4")
    try:
        hosts = [host_of(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise UserError(str(error)) from None
    return [
        Host(replace(host.chip, dollars_hour=prices.get(host.chip.name, host.chip.dollars_hour)), host.chips)
        for host in hosts
    ]


def prices_of(dollars: str) -> dict[str, float]:
    prices = {}
    for entry in filter(None, (entry.strip() for entry in dollars.split(","))):
        name, _, amount = entry.partition("=")
        try:
            prices[name] = float(amount)
            if name not in CHIPS or not 0 < prices[name] < math.inf:
                raise ValueError
        except ValueError:
            known = ", ".join(CHIPS)
            raise UserError(f"DOLLARS must be like v5e=0.9,v6e=1.5, a chip's hour of {known}, got {entry}.") from None
    return prices
