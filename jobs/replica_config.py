"""Reads a serve config for a job: the model, and how replicas run it."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.api.settings import Service
from app.builders import Args, locate, locate_tokenizer
from app.diffusion.models.checkpoint_files import INDEX, read_file, read_folder
from app.diffusion.models.hub_files import cached_folder
from app.serving.replica import StableDiffusion
from app.types import Capabilities, PipelineSpec, RequestDefaults
from cluster.cli import UsageError, UserError
from cluster.config import serve_config
from cluster.terminal import say
from jobs.content_hash import content_hash, tokenizer_hash
from jobs.entry import path

DEPLOYMENT = StableDiffusion.__name__


@dataclasses.dataclass(frozen=True)
class ReplicaConfig:
    """The `args:` of the application of app.builders:text_to_image, with folders as they are on this cluster."""

    args: Args
    model: str  # a folder, a file, or a repo id
    tokenizer: str | None  # of a file: a folder, or a repo id
    name: str
    chips: int = 0  # of a replica, which are all of a TPU host; 0: no TPU

    @classmethod
    def read(cls, file: Path) -> "ReplicaConfig":
        try:
            applications = serve_config.read(file).image_applications
        except UserError as reason:
            raise UsageError(f"--config: {reason}") from None
        if (count := len(applications)) != 1:
            raise UsageError(f"--config: {file} must have one application of {serve_config.BUILDER}, got {count}.")
        (application,) = applications
        model = application.deployment(StableDiffusion)
        chips = int(model.actor.resources.get("TPU", 0)) if model else 0
        return cls.of(application.at("args") or {}, str(file), chips)

    @classmethod
    def of(cls, options: Mapping[str, Any], where: str, chips: int = 0) -> "ReplicaConfig":
        try:
            args = Args.model_validate(options)
            model, name = locate(local(args.model))
            words = args.tokenizer and local(args.tokenizer)
            tokenizer = locate_tokenizer(args.model_copy(update={"tokenizer": words}), model)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise UsageError(f"{where}: {'; '.join(problems)}.") from None
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
        return cls(args, model, tokenizer, name, chips)

    def changed(self, changes: Mapping[str, Any], where: str) -> "ReplicaConfig":
        return ReplicaConfig.of({**self.args.model_dump(exclude_unset=True), **changes}, where, self.chips)

    @cached_property
    def identity(self) -> list[str | None]:
        """What decides the pictures: the content of a folder or file, or a repo and its revision; and the dtype.

        Reads all weights.
        """
        model, variant = Path(self.model), self.args.variant
        which = [content_hash(model, variant)] if model.exists() else [self.model, self.args.revision]
        if self.tokenizer:
            words = Path(self.tokenizer)
            which.append(tokenizer_hash(words) if words.is_dir() else self.tokenizer)
        return [*which, *([variant] if variant else []), self.args.dtype]

    @cached_property
    def service(self) -> Service:
        """Raises UsageError where the config leaves defaults to a checkpoint that this machine does not have."""
        args = self.args
        able = Capabilities(edits=args.edits, masks=args.edits)  # a checkpoint that is not may refuse rows later
        rules = (args.limits, args.defaults, args.encoding)
        service = Service(self.name, tuple(args.sizes), *rules, capabilities=able)
        if args.defaults.numbers is None:
            service = service.completed(self.checkpoint_defaults())
            for note in service.notes:
                say(note)
        return service

    def checkpoint_defaults(self) -> RequestDefaults:
        """By the small files of the checkpoint and the headers of its weights."""
        model, problems = Path(self.model), list[str]()
        folder = model if model.exists() else cached_folder(self.model, self.args.revision, [INDEX])
        if folder is None:
            raise UsageError(
                f"args.defaults must be numbers and not null for this job: {self.model} is not on this machine, "
                "so its own are not known."
            )
        if folder.is_file():
            files = read_file(folder, None, problems)
        else:
            files = read_folder(folder, self.args.variant, problems)
        family, schedule = (files.family(problems), files.schedule(problems)[0]) if files else (None, None)
        if problems or family is None or schedule is None:
            raise UsageError(f"{self.model} cannot be loaded: {' '.join(problems)}")
        return family.defaults(schedule)

    @property
    def programs(self) -> Path | None:
        return path(self.args.programs) if self.args.programs else None

    @property
    def pipeline_spec(self) -> PipelineSpec:
        """The model and shapes of the replicas."""
        return self.args.pipeline_spec(self.model, self.programs, self.tokenizer)

    @property
    def full_batch_spec(self) -> PipelineSpec:
        """The replicas' with the largest buckets alone: a job that always fills them needs no others."""
        batch_buckets, decode_buckets = self.args.batch_buckets, self.args.decode_buckets
        return dataclasses.replace(
            self.pipeline_spec,
            batch_buckets=(max(batch_buckets),),
            decode_buckets=(max(decode_buckets),) if decode_buckets else (),
        )


def local(name: str) -> str:
    """A path as jobs read it, where something is there, else the name, which may be a repo id."""
    return str(path(name)) if name and path(name).exists() else name


def resources(chips: int) -> dict[str, float]:
    """The resources of an actor or a task that needs a whole TPU host, as a replica does."""
    return {"TPU": chips} if chips else {}


def waiting_message(chips: int) -> str:
    return f"Waiting for a TPU host with {chips} chips" if chips else "Waiting for a host"


def config_path(text: str) -> Path:
    """A config is packed with the job's code; any other is looked up where relative paths start."""
    return Path(text).absolute() if Path(text).is_file() else path(text)
