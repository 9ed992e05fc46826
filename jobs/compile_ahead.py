"""Compiles a config's programs on the cluster's own hardware and publishes them, so that replicas start without.

    python -m jobs.compile_ahead --config configs/sd14.yaml

They go to the folder that `programs:` of the config names, which all TPU hosts must see. A program stands there under
the hash of all that it depends on, with a checksum, and is never changed; what is there already is not compiled again.
From then on this job alone adds to the folder: replicas load from it and write nothing.
Afterwards each is loaded from there and run once. A replica whose versions, flags, devices or sources differ compiles
its own, and its log says what differed. Loading a program runs what its author wrote: whoever may write to that folder
can run code on every replica (app/program_files.py says what is trusted).
"""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.entry import Invalid, Parser, path, run
from jobs.settings import Settings, config, resources, waiting
from ops.terminal import Stop, say

DRAFT = ".draft"  # kept when the job is killed, so that the next goes on


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=config, default="serve_config.yaml", help="whose args to take (%(default)s)")
    parser.add_argument("--out", type=path, help="instead of the folder that the config's `programs:` names")
    args = parser.parse_args()
    settings = Settings.read(args.config)
    folder = args.out or settings.programs
    if folder is None:
        raise Invalid(f"{args.config}: programs is null, so replicas would look nowhere. Name a folder there.")

    import ray

    ray.init(logging_level=logging.WARNING)
    say(waiting(settings.chips))
    task = ray.remote(num_cpus=1, resources=resources(settings.chips), max_retries=3)(build)
    try:
        told = ray.get(task.remote(settings.pipeline(), folder))
    except ray.exceptions.RayTaskError as error:
        raise Stop(f"It failed on its host: {error.cause}") from None
    new = [one for one in told["programs"] if one["compiled"]]
    say(f"All {len(told['programs'])} were loaded from there and run once, in {told['verified_s']:.1f} s.")
    return (
        f"{folder} has all {len(told['programs'])} programs for {told['device']}, "
        f"{len(new)} of them compiled now ({sum(one['bytes'] for one in new) / 1e6:.1f} MB)."
    )


def build(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """On a host like the replicas'."""
    from app.pipeline import Pipeline
    from app.program_files import PUBLISHED, Place, prepare, publish
    from app.program_keys import fingerprint, key_of
    from app.programs import compiled

    if refusal := prepare(folder):
        raise ValueError(refusal)
    pipeline = Pipeline.load(**{**options, "programs": folder})
    facts = fingerprint(pipeline.mesh.devices.flat)
    seen: dict[int, str] = {}
    places = {program.name: Place(folder, key_of(program, facts, seen)) for program in pipeline.programs}
    missing = [program for program in pipeline.programs if not usable(places[program.name])]
    draft = folder / DRAFT
    compiled(missing, folder=draft, fingerprint=facts)
    for program in missing:
        made = Place(draft, places[program.name].key)
        if not usable(made):
            raise ValueError(f"{program.name} could not be saved in {draft}; the log above says why.")
        publish(made.path, places[program.name].path)
        print(f"published {program.name}", flush=True)
    about = {"by": socket.gethostname(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "fingerprint": facts}
    (folder / f".{PUBLISHED}").write_text(json.dumps(about, indent=2) + "\n")
    os.replace(folder / f".{PUBLISHED}", folder / PUBLISHED)
    shutil.rmtree(draft, ignore_errors=True)
    began = time.perf_counter()
    pipeline.warmup()
    programs = [
        {"name": name, "compiled": name in {one.name for one in missing}, "bytes": place.path.stat().st_size}
        for name, place in places.items()
    ]
    return {"programs": programs, "device": facts["device"], "verified_s": time.perf_counter() - began}


def usable(place: Any) -> bool:
    """Whether this very program lies there, whole, and written by nobody but us."""
    from app.program_files import Unusable, read

    try:
        return bool(read(place.path).header["key"] == place.key)
    except (FileNotFoundError, Unusable):
        return False


if __name__ == "__main__":
    run(main)
