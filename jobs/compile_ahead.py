"""Compiles a config's programs on the cluster's own hardware and publishes them, so that replicas start without.

    python -m jobs.compile_ahead --config configs/sd14.yaml
    python -m jobs.compile_ahead --config configs/sd14.yaml --tpu v5litepod-4    # on the head, before a node exists

They go to the folder that `programs:` of the config names, which all TPU hosts must share. The name of a file is a hash
of all that the program depends on, and the file has a checksum. A file never changes, and what is present is not
compiled again. From then on only this job adds to the folder: replicas load from it and write nothing.
Afterwards each program is loaded and run once. A replica whose versions, flags, devices or sources differ compiles its
own programs, and its log says what differed. Loading a program runs code of its author: whoever can write to the folder
can run code on every replica (app/aot/store.py describes what is trusted).
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
from jobs.replica_config import ReplicaConfig, config_path, resources, waiting_message

if TYPE_CHECKING:
    from app.aot.program import Program

UNFINISHED = ".draft"  # a folder; it survives a killed job, and the next one continues with it


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument(
        "--config", type=config_path, default="serve_config.yaml", help="config whose args to use (%(default)s)"
    )
    parser.add_argument("--out", type=path, help="folder, in place of `programs:` of the config")
    parser.add_argument(
        "--tpu", type=tpu_host, help="compile on the head, for this type of host: v5litepod-4, v6e-8, ..."
    )
    args = parser.parse_args()
    config = ReplicaConfig.read(args.config)
    folder = args.out or config.programs
    if folder is None:
        raise UsageError(f"{args.config}: programs is null, so replicas would look nowhere. Name a folder there.")
    report = compile_on_head(config, args.tpu, folder) if args.tpu else compile_on_cluster(config, folder)
    new = [program for program in report["programs"] if program["compiled"]]
    return (
        f"{folder} has all {len(report['programs'])} programs for {report['device']}, "
        f"{len(new)} of them compiled now ({sum(program['bytes'] for program in new) / 1e6:.1f} MB)."
    )


def tpu_host(text: str) -> Host:
    try:
        return host_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("TPU ")) from None


def compile_on_cluster(config: ReplicaConfig, folder: Path) -> dict[str, Any]:
    """Compiles on a host like those of the replicas, which also runs each program."""
    connect()
    import ray

    say(waiting_message(config.chips))
    task = ray.remote(num_cpus=1, resources=resources(config.chips), max_retries=3)(build)
    try:
        report: dict[str, Any] = ray.get(task.remote(replace(config.pipeline_spec, programs=folder)))
    except ray.exceptions.RayTaskError as error:
        raise UserError(f"It failed on its host: {error.cause}") from None
    say(f"All {len(report['programs'])} were loaded from there and run once, in {report['verified_s']:.1f} s.")
    return report


def build(spec: PipelineSpec) -> dict[str, Any]:
    from app.aot.cache_key import fingerprint
    from app.diffusion.pipeline import Pipeline

    assert spec.programs is not None
    pipeline = Pipeline.load(spec)
    report = publish_all(pipeline.programs, fingerprint(pipeline.mesh.devices.flat), spec.programs)
    began = time.perf_counter()
    pipeline.warmup()
    return report | {"verified_s": time.perf_counter() - began}


def compile_on_head(config: ReplicaConfig, host: Host, folder: Path) -> dict[str, Any]:
    """Compiles in this process, without a TPU."""
    if config.chips not in (0, host.chips):
        has = f"--tpu: {host.accelerator_type} has {host.chips} chips"
        raise UsageError(f"{has}, and the config's replicas ask for {config.chips}.")
    libtpu.install()
    libtpu.compile_only()
    from app.aot.cache_key import fingerprint
    from capacity.programs import pipeline_of

    try:
        pipeline = pipeline_of(replace(workload_from_args(config.args).spec, model=config.model), host)
    except ValueError as error:
        raise UsageError(str(error)) from None
    say(f"Compiling {len(pipeline.programs)} programs for {host.accelerator_type}. Many minutes for a large model")
    facts = fingerprint(pipeline.mesh.devices.flat) | {"libtpu": libtpu.version()}
    report = publish_all(pipeline.programs, facts, folder)
    say("None was run: there is no TPU here. A replica that cannot load one compiles it, and its log says why.")
    return report


def publish_all(programs: Sequence["Program"], facts: Mapping[str, str], folder: Path) -> dict[str, Any]:
    from app.aot.cache_key import key_of
    from app.aot.compile import compiled
    from app.aot.store import PUBLISHED, Place, prepare, publish

    if refusal := prepare(folder):
        raise UserError(refusal)
    seen: dict[int, str] = {}
    places = {program.name: Place(folder, key_of(program, facts, seen)) for program in programs}
    missing = [program for program in programs if not usable(places[program.name])]
    unfinished = folder / UNFINISHED
    compiled(missing, folder=unfinished, fingerprint=facts)
    for program in missing:
        made = Place(unfinished, places[program.name].key)
        if not usable(made):
            raise UserError(f"{program.name} could not be saved in {unfinished}; the log above says why.")
        publish(made.path, places[program.name].path)
        print(f"published {program.name}", flush=True)
    about = {"by": socket.gethostname(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "fingerprint": facts}
    (folder / f".{PUBLISHED}").write_text(json.dumps(about, indent=2) + "\n")
    os.replace(folder / f".{PUBLISHED}", folder / PUBLISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
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
