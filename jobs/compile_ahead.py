"""Compiles a config's programs on the cluster's own hardware and publishes them, so that replicas start without.

    python -m jobs.compile_ahead --config configs/sd14.yaml
    python -m jobs.compile_ahead --config configs/sd14.yaml --tpu v5litepod-4    # right here, before a node is there

They go to the folder that `programs:` of the config names, which all TPU hosts must see. A program stands there under
the hash of all that it depends on, with a checksum, and is never changed; what is there already is not compiled again.
From then on this job alone adds to the folder: replicas load from it and write nothing.
Afterwards each is loaded from there and run once. A replica whose versions, flags, devices or sources differ compiles
its own, and its log says what differed. Loading a program runs what its author wrote: whoever may write to that folder
can run code on every replica (app/aot/store.py says what is trusted).
"""

import argparse
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.types import PipelineSpec
from capacity import libtpu
from capacity.chips import Host, host_of
from capacity.configs import workload_from_args
from cluster.cli import Parser, UsageError, UserError
from cluster.ray_client import connect
from cluster.terminal import say
from jobs.entry import path, run
from jobs.settings import Settings, config, resources, waiting

if TYPE_CHECKING:
    from app.aot.program import Program

DRAFT = ".draft"  # kept when the job is killed, so that the next goes on


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=config, default="serve_config.yaml", help="whose args to take (%(default)s)")
    parser.add_argument("--out", type=path, help="instead of the folder that the config's `programs:` names")
    parser.add_argument("--tpu", type=tpu_host, help="compile here, for such hosts: v5litepod-4, v6e-8, ...")
    args = parser.parse_args()
    settings = Settings.read(args.config)
    folder = args.out or settings.programs
    if folder is None:
        raise UsageError(f"{args.config}: programs is null, so replicas would look nowhere. Name a folder there.")
    told = ahead(settings, args.tpu, folder) if args.tpu else on_the_cluster(settings, folder)
    new = [one for one in told["programs"] if one["compiled"]]
    return (
        f"{folder} has all {len(told['programs'])} programs for {told['device']}, "
        f"{len(new)} of them compiled now ({sum(one['bytes'] for one in new) / 1e6:.1f} MB)."
    )


def tpu_host(text: str) -> Host:
    try:
        return host_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("TPU ")) from None


def on_the_cluster(settings: Settings, folder: Path) -> dict[str, Any]:
    """On a host like the replicas', which also runs each program."""
    connect()
    import ray

    say(waiting(settings.chips))
    task = ray.remote(num_cpus=1, resources=resources(settings.chips), max_retries=3)(build)
    try:
        told: dict[str, Any] = ray.get(task.remote(replace(settings.pipeline_spec, programs=folder)))
    except ray.exceptions.RayTaskError as error:
        raise UserError(f"It failed on its host: {error.cause}") from None
    say(f"All {len(told['programs'])} were loaded from there and run once, in {told['verified_s']:.1f} s.")
    return told


def build(spec: PipelineSpec) -> dict[str, Any]:
    from app.aot.cache_key import fingerprint
    from app.diffusion.pipeline import Pipeline

    assert spec.programs is not None
    pipeline = Pipeline.load(spec)
    told = publish_all(pipeline.programs, fingerprint(pipeline.mesh.devices.flat), spec.programs)
    began = time.perf_counter()
    pipeline.warmup()
    return told | {"verified_s": time.perf_counter() - began}


def ahead(settings: Settings, host: Host, folder: Path) -> dict[str, Any]:
    """In this process, which never sees a TPU."""
    if settings.chips not in (0, host.chips):
        has = f"--tpu: {host.accelerator_type} has {host.chips} chips"
        raise UsageError(f"{has}, and the config's replicas ask for {settings.chips}.")
    libtpu.install()
    libtpu.compile_only()
    from app.aot.cache_key import fingerprint
    from capacity.programs import pipeline_of

    try:
        pipeline = pipeline_of(replace(workload_from_args(settings.args).spec, model=settings.model), host)
    except ValueError as error:
        raise UsageError(str(error)) from None
    say(f"Compiling {len(pipeline.programs)} programs for {host.accelerator_type}. Many minutes for a large model")
    facts = fingerprint(pipeline.mesh.devices.flat) | {"libtpu": libtpu.version()}
    told = publish_all(pipeline.programs, facts, folder)
    say("None was run: there is no TPU here. A replica that cannot load one compiles it, and its log says why.")
    return told


def publish_all(programs: Sequence["Program"], facts: Mapping[str, str], folder: Path) -> dict[str, Any]:
    from app.aot.cache_key import key_of
    from app.aot.program import compiled
    from app.aot.store import PUBLISHED, Place, prepare, publish

    if refusal := prepare(folder):
        raise UserError(refusal)
    seen: dict[int, str] = {}
    places = {program.name: Place(folder, key_of(program, facts, seen)) for program in programs}
    missing = [program for program in programs if not usable(places[program.name])]
    draft = folder / DRAFT
    compiled(missing, folder=draft, fingerprint=facts)
    for program in missing:
        made = Place(draft, places[program.name].key)
        if not usable(made):
            raise UserError(f"{program.name} could not be saved in {draft}; the log above says why.")
        publish(made.path, places[program.name].path)
        print(f"published {program.name}", flush=True)
    about = {"by": socket.gethostname(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "fingerprint": facts}
    (folder / f".{PUBLISHED}").write_text(json.dumps(about, indent=2) + "\n")
    os.replace(folder / f".{PUBLISHED}", folder / PUBLISHED)
    shutil.rmtree(draft, ignore_errors=True)
    new = {program.name for program in missing}
    return {
        "programs": [
            {"name": name, "compiled": name in new, "bytes": place.path.stat().st_size}
            for name, place in places.items()
        ],
        "device": facts["device"],
    }


def usable(place: Any) -> bool:
    """Whether this very program lies there, whole, and written by nobody but us."""
    from app.aot.store import Unusable, read

    try:
        return bool(read(place.path).header["key"] == place.key)
    except (FileNotFoundError, Unusable):
        return False


if __name__ == "__main__":
    run(main)
