"""Makes an application of serve_config.yaml's `args:`. It is the only place that joins ingress and replica.

Deployment options (replicas, autoscaling, resources) are in the YAML and nowhere in code. Serve may run this on a node
without an accelerator, so nothing here imports JAX or reads weights.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from ray import serve
from ray.serve import Application

from app.api.api_keys import ApiKeys
from app.api.files.storage import storage_at
from app.api.ingress import APIIngress
from app.api.jobs.webhooks import read_secret
from app.api.settings import (
    Alias,
    Defaults,
    Encoding,
    HostName,
    Jobs,
    Limits,
    Origin,
    Quality,
    Service,
    Settings,
    no_repeats,
)
from app.diffusion.samplers import SAMPLERS
from app.engine.stall import STALL_S
from app.serving.replica import StableDiffusion
from app.types import Dtype, InvalidField, PipelineSpec, Sharded, parse_size

ROOT = Path(__file__).resolve().parents[1]
SINGLE_FILE = ".safetensors"


def sizes_written_well(sizes: list[str]) -> list[str]:
    for size in sizes:
        if not re.fullmatch(r"[1-9][0-9]{1,3}x[1-9][0-9]{1,3}", size) or any(side % 8 for side in parse_size(size)):
            raise ValueError(f"sizes must be WIDTHxHEIGHT in multiples of 8, such as 512x512, got {size}.")
    return no_repeats(sizes)


Buckets = Annotated[list[Annotated[int, Field(ge=1, le=1024)]], AfterValidator(no_repeats)]


class Args(Settings):
    """The keys of `args:` in serve_config.yaml. Any other key is refused."""

    model: str = Field(
        description="a folder in diffusers layout or one .safetensors file, relative to the repository, "
        "or a Hugging Face repo id"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a repo id; null: its main branch")
    variant: str | None = Field(
        default=None,
        pattern=r"^\w+$",
        description="which of several files with the same weights: fp16 takes *.fp16.safetensors; null: *.safetensors",
    )
    tokenizer: str | None = Field(
        default=None,
        description="only of one .safetensors file, which has none: a folder, relative to the repository, or a repo id",
    )
    dtype: Dtype = Field(default="float32", description="compute type of the networks")
    sizes: Annotated[list[str], AfterValidator(sizes_written_well)] = Field(
        min_length=1, description="WIDTHxHEIGHT; each is compiled at start, the first is the default"
    )
    batch_buckets: Buckets = Field(
        default=[1, 2, 4], min_length=1, description="how many images share a step; each is compiled at start"
    )
    decode_buckets: Buckets | None = Field(
        default=None,
        min_length=1,
        description="how many images are decoded together, at most twice the largest of batch_buckets; "
        "null: those of batch_buckets up to 4",
    )
    shard_weights: Literal["auto"] | Annotated[list[Sharded], AfterValidator(no_repeats)] = Field(
        default="auto",
        description="networks whose weights the chips of a host divide: text_encoders, denoiser, vae; "
        "auto: in this order, as many as must be for the weights to fit",
    )
    shard_images: bool | Literal["auto"] = Field(
        default="auto",
        description="whether the chips of a host divide an image where a step has fewer rows than chips; "
        "auto: where the model can",
    )
    edits: bool = Field(
        default=False, description="whether requests may have images to begin from; loads the VAE's encoder"
    )
    references: Annotated[int, Field(ge=1, le=16)] | None = Field(
        default=None,
        description="with edits: most images that a request may look at, of models that look at images; null: one",
    )
    images_at_once: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        default="auto", description="how many images of a size denoise at once; auto: as many as measured to pay"
    )
    admission_gain: float = Field(
        default=0.05, ge=0, le=1, description="with auto: another image joins only if images per second rise by this"
    )
    max_waiting: int = Field(
        default=32, ge=1, description="requests that wait for each replica; beyond it a request gets 503"
    )
    prompt_cache: int = Field(default=256, ge=1, le=65536, description="encoded prompts that a replica keeps")
    encoding_threads: int = Field(default=2, ge=1, le=64, description="threads that make files of pixels")
    stall_s: float = Field(
        default=STALL_S, ge=1, le=3600, description="a device that is silent this long, and 10 times too long, is lost"
    )
    programs: str | None = Field(
        default=None, description="folder of compiled programs, relative to the repository; null: each start compiles"
    )
    aliases: Annotated[list[Alias], AfterValidator(no_repeats)] = Field(
        default=[], description="other names that a request may give to the model, such as gpt-image-1"
    )
    qualities: dict[Quality, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="num_inference_steps of a request by OpenAI's quality: low, medium, high or hd"
    )
    cors_origins: Annotated[list[Origin], AfterValidator(no_repeats)] = Field(
        default=[], description="origins whose pages may ask from a browser, such as https://studio.example.com"
    )
    image_hosts: Annotated[list[HostName], AfterValidator(no_repeats)] = Field(
        default=[], description="hosts that an image_url of an edit may name, such as images.example.com"
    )
    api_keys_file: str | None = Field(
        default=None,
        description="hashes of API keys, relative to the repository; null: only this machine itself may ask",
    )
    jobs: Jobs = Jobs()
    limits: Limits = Limits()
    defaults: Defaults = Defaults()
    encoding: Encoding = Encoding()

    def pipeline_spec(self, model: str, programs: Path | None = None, tokenizer: str | None = None) -> PipelineSpec:
        """What a replica loads and compiles. The arguments are paths on the machine where it runs, or repo ids."""
        return PipelineSpec(
            model=model,
            revision=self.revision,
            variant=self.variant,
            tokenizer=tokenizer,
            dtype=self.dtype,
            sizes=tuple(parse_size(size) for size in self.sizes),
            batch_buckets=tuple(self.batch_buckets),
            decode_buckets=tuple(self.decode_buckets or ()),
            max_steps=self.limits.num_inference_steps[1],
            shard_weights=self.shard_weights if self.shard_weights == "auto" else tuple(self.shard_weights),
            shard_images=self.shard_images,
            edits=self.edits,
            references=self.references,
            programs=programs,
        )

    @model_validator(mode="after")
    def pipeline_spec_is_valid(self) -> "Args":
        self.pipeline_spec(self.model)
        return self

    @model_validator(mode="after")
    def defaults_are_allowed(self) -> "Args":
        for name in ("num_inference_steps", "guidance_scale"):
            low, high = getattr(self.limits, name)
            value = getattr(self.defaults, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"defaults.{name} must be within limits.{name}, {low} to {high}, got {value}.")
        low, high = self.limits.num_inference_steps
        for quality, steps in self.qualities.items():
            if not low <= steps <= high:
                raise ValueError(
                    f"qualities.{quality} must be within limits.num_inference_steps, {low} to {high}, got {steps}."
                )
        if self.defaults.sampler not in (None, *SAMPLERS):
            raise ValueError(
                f"defaults.sampler must be null or one of {', '.join(SAMPLERS)}, got {self.defaults.sampler}."
            )
        return self


def text_to_image(args: Args) -> Application:
    """APIIngress -> StableDiffusion."""
    location, name = locate(args.model)
    tokenizer = locate_tokenizer(args, location)
    rules = (args.limits, args.defaults, args.encoding)
    service = Service(
        name,
        tuple(args.sizes),
        *rules,
        aliases=tuple(args.aliases),
        qualities=dict[str, int](args.qualities.items()),
        jobs=located(args.jobs),
        image_hosts=tuple(args.image_hosts),
    )
    replicas = serve.deployment()(StableDiffusion).bind(
        args.pipeline_spec(location, ROOT / Path(args.programs).expanduser() if args.programs else None, tokenizer),
        name=name,
        max_waiting=args.max_waiting,
        images_at_once=None if args.images_at_once == "auto" else args.images_at_once,
        admission_gain=args.admission_gain,
        prompt_cache=args.prompt_cache,
        encoding_threads=args.encoding_threads,
        stall_s=args.stall_s,
    )
    keys = None if args.api_keys_file is None else keys_file(args.api_keys_file)
    return serve.deployment()(serve.ingress()(APIIngress)).bind(
        replicas,
        service,
        api_keys_file=keys,
        cors_origins=tuple(args.cors_origins),
        max_waiting=args.max_waiting,
    )


def keys_file(name: str) -> Path:
    """Reads the file, as the ingress will do again, to report a mistake in it before a model is loaded."""
    path = ROOT / Path(name).expanduser()
    try:
        ApiKeys(path)
    except ValueError as error:
        raise InvalidField("api_keys_file", f"api_keys_file {error}") from None
    return path


def located(jobs: Jobs) -> Jobs:
    """With absolute paths. Reads what the ingress will read again, to report a mistake before a model is loaded."""

    def absolute(name: str | None) -> str | None:
        return name if name is None or "://" in name else str(ROOT / Path(name).expanduser())

    paths = {name: absolute(getattr(jobs, name)) for name in ("database", "files", "webhook_secret_file")}
    located = jobs.model_copy(update=paths)
    checks: dict[str, Callable[[], object]] = {"files": lambda: storage_at(located.files)}
    if located.webhook_secret_file is not None:
        secret_file = Path(located.webhook_secret_file)
        checks["webhook_secret_file"] = lambda: read_secret(secret_file)
    for name, check in checks.items():
        try:
            check()
        except ValueError as error:
            raise InvalidField(f"jobs.{name}", f"jobs.{name} {error}") from None
    return located


def locate(model: str) -> tuple[str, str]:
    """Where to load `model` from, and its name: a folder or a file if there is one, else a Hugging Face repo id."""
    path = (ROOT / Path(model).expanduser()).resolve()
    if model and (path.is_dir() or (path.is_file() and path.suffix == SINGLE_FILE)):
        return str(path), path.name.removesuffix(SINGLE_FILE)
    if path.is_file():
        raise InvalidField("model", f"model must be a {SINGLE_FILE} file where it is one file, got {model}.")
    if not path.suffix == SINGLE_FILE and is_repo_id(model):
        return model, model
    message = (
        f"model must be a folder in diffusers layout, a {SINGLE_FILE} file or a Hugging Face repo id, "
        f"got {model} ({path})."
    )
    raise InvalidField("model", message)


def locate_tokenizer(args: Args, location: str) -> str | None:
    """Where to load the tokenizer of a model in one file from. Raises InvalidField where it is needed and not named."""
    if not location.endswith(SINGLE_FILE):
        if args.tokenizer is not None:
            raise InvalidField("tokenizer", f"tokenizer is only of a model in one file; {args.model} has its own.")
        return None
    if args.variant is not None:
        raise InvalidField("variant", f"variant is only of a folder or a repo id, and {args.model} is one file.")
    if args.tokenizer is None:
        raise InvalidField(
            "tokenizer",
            f"tokenizer must be a folder with CLIP's vocabulary, or a repo id such as openai/clip-vit-large-patch14: "
            f"{args.model} is one file, which holds none.",
        )
    folder = (ROOT / Path(args.tokenizer).expanduser()).resolve()
    if args.tokenizer and folder.is_dir():
        return str(folder)
    if is_repo_id(args.tokenizer):
        return args.tokenizer
    message = f"tokenizer must be a folder or a Hugging Face repo id, got {args.tokenizer} ({folder})."
    raise InvalidField("tokenizer", message)


def is_repo_id(name: str) -> bool:
    # A slip in a path must not turn into a download: assets/demo-modle looks like a repo id, but assets is a folder.
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not (ROOT / name).parent.is_dir()
