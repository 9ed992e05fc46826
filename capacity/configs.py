"""What a serve config and a cluster file say about what is compiled, and for which TPU."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from app.builders import Args
from app.types import PipelineSpec, parse_size
from capacity.chips import CHIPS, Host, host_of
from cluster.cli import UserError
from cluster.config.documents import Document, read
from cluster.config.lint import refuse_errors
from cluster.config.lint_cluster import node_types
from cluster.config.lint_serve import apps


@dataclass(frozen=True)
class Asked:
    """A config's model and shapes, and what a request is that says nothing."""

    served: PipelineSpec
    sampler: str | None
    num_inference_steps: int
    guidance_scale: float
    args: Args


def asked_of(config: Path, model: str = "", size: str = "") -> Asked:
    """Of the first application here that is built from app.builders' Args; another `model` in bfloat16, as one would
    serve it on a TPU. Raises UserError with what is wrong."""
    args = next(
        (app.args for app in apps(sound(config, "applications", "a serve config")) if isinstance(app.args, Args)), None
    )
    if args is None:
        raise UserError(f"{config} has no application that app.builders:text_to_image builds.")
    return of_args(args, model, size)


def of_args(args: Args, model: str = "", size: str = "") -> Asked:
    try:
        sizes = tuple(parse_size(one) for one in ([size] if size else args.sizes))
    except ValueError:
        raise UserError(f"SIZE must be WIDTHxHEIGHT, such as 512x512, got {size}.") from None
    served = replace(args.pipeline_spec(model or args.model), sizes=sizes, dtype="bfloat16" if model else args.dtype)
    defaults = args.defaults
    return Asked(served, defaults.sampler, defaults.num_inference_steps, defaults.guidance_scale, args)


def hosts_of(tpus: str, cluster: Path, dollars: str = "") -> list[Host]:
    """`v5litepod-4,v6e-8`, or else what the cluster file's TPU nodes are; at these `dollars` for a chip's hour, such as
    `v5e=0.9,v6e=1.5`. Raises UserError."""
    prices = prices_of(dollars)
    names = [name.strip() for name in tpus.split(",") if name.strip()]
    if not names:
        names = [
            one["slice"].name
            for one in node_types(sound(cluster, "available_node_types", "a cluster file")).values()
            if one["slice"]
        ]
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
    found = {}
    for entry in filter(None, (entry.strip() for entry in dollars.split(","))):
        name, _, amount = entry.partition("=")
        try:
            found[name] = float(amount)
            if name not in CHIPS or not 0 < found[name] < math.inf:
                raise ValueError
        except ValueError:
            known = ", ".join(CHIPS)
            raise UserError(f"DOLLARS must be like v5e=0.9,v6e=1.5, a chip's hour of {known}, got {entry}.") from None
    return found


def sound(path: Path, key: str, kind: str) -> Document:
    """The file, if the linter finds no error in it and it is of this kind."""
    refuse_errors([path])
    document, _ = read(path)
    assert document is not None
    if not document.has((key,)):
        raise UserError(f"{path} must be {kind}, with {key}.")
    return document
