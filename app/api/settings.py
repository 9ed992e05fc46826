"""The part of serve_config.yaml that concerns the API: limits, defaults and encoding.

Every key has a type, a range and a description, which `make lint` and the docs read. Knows nothing of requests.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from app.types import Capabilities, RequestDefaults

# Bytes. A request's head should hold no more than this and 16 KiB of headers, and uvicorn's parser takes 65,535 bytes
# of a URL. A prompt of 4,000 characters fits in if every character takes 12 bytes.
LONGEST_QUERY = 48 << 10

# Bytes that Serve's proxy takes of a body (proxy.py), whatever the config says.
LARGEST_BODY = 4 << 20
LARGEST_UPLOAD = 64 << 20  # of POST /v1/images/edits

Bounds = TypeVar("Bounds", tuple[int, int], tuple[float, float])
Values = TypeVar("Values", list[str], list[int], tuple[str, ...])


def in_order(bounds: Bounds, lowest: int = 1) -> Bounds:
    if not lowest <= bounds[0] <= bounds[1]:
        raise ValueError(f"a range must be [lowest, highest] with lowest at least {lowest}, got {list(bounds)}.")
    return bounds


def origin(text: str) -> str:
    if not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", text):
        raise ValueError(f"an origin must be http:// or https:// and a host in lower case, without a path, got {text}.")
    return text


def base_url(text: str) -> str:
    if not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+(/[A-Za-z0-9._~-]+)*", text):
        raise ValueError(
            f"a base URL must be http:// or https://, a host and maybe a path, without a / at its end, got {text}."
        )
    return text


def host_name(text: str) -> str:
    if not re.fullmatch(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*(:[0-9]{1,5})?", text):
        raise ValueError(
            f"a host must be a name in lower case, such as hooks.example.com or hooks.example.com:8443, got {text}."
        )
    return text


def no_repeats(values: Values) -> Values:
    if len(set(values)) < len(values):
        raise ValueError(f"a value must not stand twice, got {list(values)}.")
    return values


Alias = Annotated[str, Field(min_length=1, max_length=200)]
BaseUrl = Annotated[str, AfterValidator(base_url)]
Origin = Annotated[str, AfterValidator(origin)]
HostName = Annotated[str, AfterValidator(host_name)]
Quality = Literal["low", "medium", "high", "hd"]


class Settings(BaseModel):
    """Base class of what serve_config.yaml may set: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Settings):
    """The range of each request field. The error for a value outside names the range."""

    images: int = Field(default=4, ge=1, le=64, description="most images in one request (n)")
    num_inference_steps: Annotated[tuple[int, int], AfterValidator(in_order)] = Field(
        default=(1, 100), description="[lowest, highest]"
    )
    guidance_scale: Annotated[tuple[float, float], AfterValidator(partial(in_order, lowest=0))] = Field(
        default=(1.0, 20.0), description="[lowest, highest]"
    )
    prompt_characters: int = Field(default=4000, ge=1, description="longest prompt, and longest negative prompt")
    query_bytes: int = Field(
        default=LONGEST_QUERY, ge=1, le=LONGEST_QUERY, description="longest query string of GET /imagine"
    )
    body_bytes: int = Field(
        default=131072, ge=1, le=LARGEST_BODY, description="largest body of POST /v1/images/generations"
    )
    upload_bytes: int = Field(
        default=20 << 20, ge=1, le=LARGEST_UPLOAD, description="largest body of POST /v1/images/edits"
    )
    input_images: int = Field(default=4, ge=1, le=16, description="most images in an edit, without its mask")
    input_pixels: int = Field(
        default=25_000_000, ge=1, le=100_000_000, description="most pixels of an image or a mask in an edit"
    )
    partial_images: int = Field(default=3, ge=0, le=16, description="most previews in one streamed answer")
    timeout_s: float = Field(
        default=120.0, gt=0, description="longest wait for an answer, including the queue; also the default"
    )


class Defaults(Settings):
    """The values of request fields that a request leaves out."""

    num_inference_steps: int | None = Field(default=20, description="denoising steps; null: the checkpoint's own")
    guidance_scale: float | None = Field(
        default=7.5, description="classifier-free guidance; 1 is none; null: the checkpoint's own"
    )
    sampler: str | None = Field(default=None, description="null: the one that the checkpoint names")

    @property
    def numbers(self) -> RequestDefaults | None:
        """None where the checkpoint has to complete them."""
        if self.num_inference_steps is None or self.guidance_scale is None:
            return None
        return RequestDefaults(self.num_inference_steps, self.guidance_scale)

    def completed(self, own: RequestDefaults, limits: Limits) -> tuple[RequestDefaults, tuple[str, ...]]:
        """The numbers, with the checkpoint's own in place of null; and a sentence for each that a limit changes."""
        steps, guidance = limits.num_inference_steps, limits.guidance_scale
        values, remarks = own._asdict(), []
        for name, (low, high) in {"num_inference_steps": steps, "guidance_scale": guidance}.items():
            value, nearest = values[name], min(max(values[name], low), high)
            if (configured := getattr(self, name)) is not None:
                values[name] = configured
            elif nearest != value:
                values[name] = nearest
                remarks.append(
                    f"The checkpoint's {name} is {value:g}, outside limits.{name}; the default is {nearest:g}."
                )
        return RequestDefaults(**values), tuple(remarks)


class Jobs(Settings):
    """Requests that outlive their connection, and pictures behind URLs."""

    database: str | None = Field(
        default=".state/jobs.sqlite3",
        description="a file on the head's own disk, relative to the repository; null: neither jobs nor URLs",
    )
    files: str = Field(
        default=".state/files",
        min_length=1,
        description="where pictures lie: a folder, relative to the repository, or a URL of fsspec: gs://bucket/prefix",
    )
    base_url: BaseUrl | None = Field(
        default=None, description="what the URLs of pictures begin with; null: the address that the client used"
    )
    keep_s: float = Field(
        default=86400.0,
        ge=60,
        le=30 * 86400,
        description="a job that has not ended this long after its request fails; one that has ended is deleted then",
    )
    url_keep_s: float = Field(
        default=3600.0, ge=60, le=30 * 86400, description="how long a picture of response_format url is kept"
    )
    max_jobs: int = Field(default=10000, ge=1, le=1_000_000, description="most jobs that have not ended")
    max_jobs_per_key: int = Field(default=1000, ge=1, le=1_000_000, description="the same of one API key")
    max_bytes: int = Field(default=10 << 30, ge=1 << 20, description="most bytes of all files together")
    attempts: int = Field(
        default=10, ge=1, le=100, description="runs that may end in a lost replica or an error before a job fails"
    )
    at_once: int = Field(default=4, ge=1, le=1024, description="images of jobs that one replica draws at a time")
    share: float = Field(
        default=0.2, ge=0, lt=1, description="of the devices' time, for jobs, while somebody waits for an answer"
    )
    webhook_hosts: Annotated[tuple[HostName, ...], AfterValidator(no_repeats)] = Field(
        default=(), description="hosts that a request's webhook_url may name, such as hooks.example.com"
    )
    webhook_secret_file: str | None = Field(
        default=None, description="file with the secret that signs webhooks, whsec_..., relative to the repository"
    )

    @model_validator(mode="after")
    def webhooks_are_signed(self) -> "Jobs":
        if self.webhook_hosts and self.webhook_secret_file is None:
            raise ValueError("webhook_hosts needs a webhook_secret_file: every webhook is signed.")
        return self


class Encoding(Settings):
    """The file format of the images."""

    output_format: Literal["png", "webp", "jpeg"] = "png"
    quality: int = Field(default=90, ge=0, le=100, description="of webp and jpeg; a request's output_compression")
    png_level: int = Field(default=6, ge=0, le=9, description="zlib level: 0 is quick, 9 is small")


@dataclass(frozen=True)
class Service:
    """The rules for requests to one model: its name, its sizes and the settings above."""

    model: str
    sizes: tuple[str, ...]  # "WIDTHxHEIGHT", the first is the default
    limits: Limits = Limits()
    defaults: Defaults = Defaults()
    encoding: Encoding = Encoding()
    aliases: tuple[str, ...] = ()  # other names that a request may give to the model
    qualities: Mapping[str, int] = field(default_factory=dict)  # num_inference_steps by OpenAI's `quality`
    jobs: Jobs = Jobs(database=None)
    image_hosts: tuple[str, ...] = ()  # where images of edits may be fetched
    notes: tuple[str, ...] = ()  # sentences on where the defaults are not the checkpoint's own
    capabilities: Capabilities = Capabilities()  # of the replica

    def completed(self, own: RequestDefaults) -> "Service":
        """With the checkpoint's own defaults where the config leaves them to it."""
        numbers, notes = self.defaults.completed(own, self.limits)
        return replace(self, defaults=self.defaults.model_copy(update=numbers._asdict()), notes=notes)

    @property
    def names(self) -> tuple[str, ...]:
        return self.model, *self.aliases
