"""What a job takes from a Serve config: the model and how it is run, as the replicas have it."""

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.api.settings import Service
from app.builders import Args, locate
from app.diffusion.models.config import STEMS
from app.types import PipelineSpec
from cluster.cli import UsageError, UserError
from cluster.config.documents import loaded
from jobs import hub
from jobs.entry import path

BUILDER = "app.builders:text_to_image"
DEPLOYMENT = "StableDiffusion"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The `args:` of the application that draws, with folders as this cluster has them."""

    args: Args
    model: str  # a folder, or a repo id
    name: str
    chips: int = 0  # that a replica has, all of a TPU host; 0: no TPU

    @classmethod
    def read(cls, file: Path) -> "Settings":
        try:
            content = loaded(file, f"--config: there is no file {file}.")
        except UserError as reason:
            raise UsageError(str(reason)) from None
        applications = content.get("applications") if isinstance(content, dict) else None
        ours = [app for app in applications or () if isinstance(app, dict) and app.get("import_path") == BUILDER]
        if len(ours) != 1:
            raise UsageError(f"--config: {file} must have one application of {BUILDER}, got {len(ours)}.")
        return cls.of(ours[0].get("args") or {}, str(file), chips_of(ours[0]))

    @classmethod
    def of(cls, given: dict[str, Any], where: str, chips: int = 0) -> "Settings":
        try:
            args = Args.model_validate(given)
            folder = path(args.model)
            model, name = locate(str(folder) if folder.is_dir() else args.model)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise UsageError(f"{where}: {'; '.join(problems)}.") from None
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
        return cls(args, model, name, chips)

    def changed(self, given: Mapping[str, Any], where: str) -> "Settings":
        return Settings.of({**self.args.model_dump(exclude_unset=True), **given}, where, self.chips)

    @cached_property
    def identity(self) -> list[str | None]:
        """What of the model decides its pictures: what a folder holds, wherever it stands, or a repo at its revision;
        and the dtype. Reads all weights."""
        folder = Path(self.model)
        which = [fingerprint(folder)] if folder.is_dir() else [self.model, self.args.revision]
        return [*which, self.args.dtype]

    @property
    def service(self) -> Service:
        args = self.args
        return Service(self.name, tuple(args.sizes), args.limits, args.defaults, args.encoding)

    @property
    def programs(self) -> Path | None:
        return path(self.args.programs) if self.args.programs else None

    @property
    def pipeline_spec(self) -> PipelineSpec:
        """The one that the replicas have."""
        return self.args.pipeline_spec(self.model, self.programs)

    @property
    def full_batch_spec(self) -> PipelineSpec:
        """The replicas' with the largest buckets alone: a job that always fills them needs no others."""
        batch_buckets, decode_buckets = self.args.batch_buckets, self.args.decode_buckets
        return dataclasses.replace(
            self.pipeline_spec,
            batch_buckets=(max(batch_buckets),),
            decode_buckets=(max(decode_buckets),) if decode_buckets else (),
        )


def fingerprint(folder: Path) -> str:
    """What stands for a commit where there is none: the hash of all that is loaded from a folder in diffusers layout.
    What is missing there, the loader says."""
    weights = [folder / part / f"{stem}.safetensors" for part, stem in STEMS.items()]
    files = [*filter(Path.is_file, weights), *sorted([*folder.glob("*/*.json"), *folder.glob("tokenizer/*.txt")])]
    hashes = "".join(f"{file.relative_to(folder)} {hub.sha256_of(file)}\n" for file in files)
    return f"files {hashlib.sha256(hashes.encode()).hexdigest()}"


def chips_of(application: Mapping[str, Any]) -> int:
    for deployment in application.get("deployments") or ():
        if deployment.get("name") == DEPLOYMENT:
            return int(((deployment.get("ray_actor_options") or {}).get("resources") or {}).get("TPU", 0))
    return 0


def resources(chips: int) -> dict[str, float]:
    """What an actor or a task asks for that is to have a TPU host as a replica has it."""
    return {"TPU": chips} if chips else {}


def waiting(chips: int) -> str:
    return f"Waiting for a TPU host with {chips} chips" if chips else "Waiting for a host"


def config(text: str) -> Path:
    """A config travels with the job's code; one that did not is looked for where relative paths start."""
    return Path(text).absolute() if Path(text).is_file() else path(text)
