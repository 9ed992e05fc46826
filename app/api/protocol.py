"""What travels: a request as a client writes it, as a replica receives it, the answer, and every refusal.

Both doors, the query string and the JSON body, meet in `resolve`, so a rule and its sentence are written once.
Knows nothing of JAX, Ray or HTTP libraries, and nothing of which replica will do the work.
"""

import json
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn, TypeVar
from urllib.parse import parse_qsl

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.diffusion.samplers import SAMPLERS
from app.types import SEEDS, Generation

FORMATS = ("png", "webp", "jpeg")

# GET /imagine takes the first; POST /v1/images/generations takes both and NEUTRAL.
QUERY_FIELDS = (
    *("prompt", "negative_prompt", "size", "num_inference_steps", "guidance_scale", "seed", "sampler"),
    *("output_format", "output_compression", "timeout"),
)
BODY_FIELDS = (
    *(*QUERY_FIELDS, "model", "n", "response_format", "user", "safety_identifier", "stream", "partial_images"),
)
NUMERIC_FIELDS = ("num_inference_steps", "guidance_scale", "seed", "output_compression", "timeout")

# OpenAI's fields that this service has no means to honour, each with the values that ask for nothing more than
# what happens anyway. Any other value is refused: a field that is accepted and ignored would be a lie.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": ("auto", "opaque"),
    "complexity": ("low",),  # no picture is planned
    "frame_count": (),
    "frame_duration_ms": (),
    "moderation": ("auto", "low"),  # nothing is filtered
    "quality": ("auto", "standard"),
    "style": ("vivid", "natural"),  # either leaves the style to the prompt
    "svg": (),
}
# Bytes. With 16 KiB of headers that is as much as the head of a request should have, and uvicorn's parser takes 65,535
# of a URL. It has room for one prompt of 4,000 characters that all take 12 bytes.
LONGEST_QUERY = 48 << 10
LOSSLESS = 100  # the output_compression that a png has anyway


Bounds = TypeVar("Bounds", tuple[int, int], tuple[float, float])


def in_order(bounds: Bounds) -> Bounds:
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"a range must be [lowest, highest] with lowest at least 1, got {list(bounds)}.")
    return bounds


class Settings(BaseModel):
    """Base of what serve_config.yaml may set: frozen, and a key that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Settings):
    """What one request may ask for. A value outside is refused with a sentence that names the range."""

    images: int = Field(default=4, ge=1, le=64, description="most images in one request (n)")
    num_inference_steps: Annotated[tuple[int, int], AfterValidator(in_order)] = Field(
        default=(1, 100), description="[lowest, highest]"
    )
    guidance_scale: Annotated[tuple[float, float], AfterValidator(in_order)] = Field(
        default=(1.0, 20.0), description="[lowest, highest]"
    )
    prompt_characters: int = Field(default=4000, ge=1, description="longest prompt, and longest negative prompt")
    query_bytes: int = Field(
        default=LONGEST_QUERY, ge=1, le=LONGEST_QUERY, description="longest query string of GET /imagine"
    )
    body_bytes: int = Field(default=131072, ge=1, description="largest body of POST /v1/images/generations")
    partial_images: int = Field(default=3, ge=0, le=16, description="most previews in one streamed answer")
    timeout_s: float = Field(
        default=120.0, gt=0, description="longest wait for an answer, the wait in the queue included; also the default"
    )


class Defaults(Settings):
    """What a request gets that does not say."""

    num_inference_steps: int = Field(default=20, description="denoising steps")
    guidance_scale: float = Field(default=7.5, description="classifier-free guidance; 1 is none")
    sampler: str | None = Field(default=None, description="null: the one that the checkpoint names")


class Encoding(Settings):
    """How pixels become bytes."""

    output_format: Literal["png", "webp", "jpeg"] = "png"
    quality: int = Field(default=90, ge=0, le=100, description="of webp and jpeg; a request's output_compression")
    png_level: int = Field(default=6, ge=0, le=9, description="zlib level: 0 is quick, 9 is small")


@dataclass(frozen=True)
class Service:
    """What a request may say. serve_config.yaml says all of it; the model and the sizes that run are the replicas'."""

    model: str
    sizes: tuple[str, ...]  # "WIDTHxHEIGHT", the first is the default
    limits: Limits = Limits()
    defaults: Defaults = Defaults()
    encoding: Encoding = Encoding()


@dataclass(frozen=True)
class Description:
    """What a replica says of itself. Its checkpoint names the samplers; the model and the sizes are those that it has
    loaded, which differ from the config's while a deployment rolls, or after it has failed."""

    samplers: tuple[str, ...]
    default_sampler: str
    model: str = ""  # empty: a replica of a version that did not say it, and it is the config's
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageRequest:
    """What travels to a replica."""

    generation: Generation
    encoding: Encoding
    timeout_s: float
    stream: bool = False
    partial_images: int = 0  # previews, while it streams


@dataclass(frozen=True)
class Accepted:
    """First item of a replica's stream: the engine has queued the request, so a refusal can no longer come."""


@dataclass(frozen=True)
class Preview:
    """A picture in the making."""

    index: int
    encoded: bytes


@dataclass(frozen=True)
class Images:
    """A replica's answer. The facts are what a client needs in order to make the same picture again."""

    encoded: tuple[bytes, ...]
    seeds: tuple[int, ...]
    facts: Mapping[str, str | int | float | bool]
    timings: Mapping[str, float]  # seconds
    model: str = ""  # that drew them; empty: a replica of a version that did not say it


class ApiError(Exception):
    """A refusal or a failure, in words that a client may read. All arguments are positional, so it pickles."""

    def __init__(
        self, status: int, message: str, param: str | None, code: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def written(fact: str | int | float | bool) -> str:
    """A fact as headers and a PNG's text carry it: JSON, but strings without quotes."""
    return fact if isinstance(fact, str) else json.dumps(fact)


def parse_query(query: bytes, service: Service) -> ImageRequest:
    """The query string of GET /imagine."""
    if len(query) > service.limits.query_bytes:
        message = (
            f"The query string must be at most {service.limits.query_bytes} bytes, got {len(query)}; "
            "POST /v1/images/generations takes more."
        )
        raise ApiError(414, message, None, "uri_too_long")
    try:
        pairs = parse_qsl(query.decode(), keep_blank_values=True, errors="strict", max_num_fields=100)
    except UnicodeDecodeError:
        raise ApiError(400, "The query string must be percent-encoded UTF-8.", None, "invalid_encoding") from None
    except ValueError:
        raise ApiError(400, "The query string has over 100 fields.", None, "unknown_parameter") from None
    given = unique([(name, literal(value) if name in NUMERIC_FIELDS else value) for name, value in pairs])
    return resolve(given, service, QUERY_FIELDS)


def parse_body(body: bytes, service: Service) -> ImageRequest:
    """The JSON body of POST /v1/images/generations."""
    try:
        given = json.loads(body.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except UnicodeDecodeError:
        raise ApiError(400, "The body must be JSON in UTF-8.", None, "invalid_encoding") from None
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        raise ApiError(400, message, None, "invalid_json") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, arrays in arrays in arrays
        raise ApiError(400, "The body is not JSON of a sensible shape.", None, "invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"The body must be a JSON object, got {shown(given)}.", None, "invalid_json")
    return resolve(given, service, BODY_FIELDS)


def resolve(given: Mapping[str, object], service: Service, fields: Sequence[str]) -> ImageRequest:
    """Check every field against its limits and fill in what was left out; null counts as left out."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in NEUTRAL and fields is BODY_FIELDS:
            refuse_unless_neutral(name, value)
        elif name not in fields:
            message = f"Unknown field {shown(name)}; the fields are {', '.join(fields)}."
            raise ApiError(400, message, name, "unknown_parameter")
    if "prompt" not in given:
        raise ApiError(400, "prompt is required.", "prompt", "missing_required_parameter")
    check_model(given.get("model", service.model), service)
    compressed = "output_compression" in given

    limits, defaults, encoding = service.limits, service.defaults, service.encoding
    given = {
        "negative_prompt": "",
        "size": "auto",
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "seed": secrets.randbelow(SEEDS),
        "n": 1,
        "output_format": encoding.output_format,
        "output_compression": encoding.quality,
        "response_format": "b64_json",
        "user": "",
        "safety_identifier": "",
        "timeout": limits.timeout_s,
        "stream": False,
        "partial_images": 0,
        **given,
    }
    for name in ("user", "safety_identifier"):  # they name an end user and ask for nothing
        text(given, name, limits.prompt_characters)
    choice(given, "response_format", ("b64_json",))  # no "url": nothing is kept that a link could point to
    prompt = text(given, "prompt", limits.prompt_characters)
    if not prompt.strip():
        raise ApiError(400, "prompt must not be empty.", "prompt", "invalid_value")
    size = choice(given, "size", (*service.sizes, "auto"))
    width, height = width_height(service.sizes[0] if size == "auto" else size)
    generation = Generation(
        prompt=prompt,
        negative_prompt=text(given, "negative_prompt", limits.prompt_characters),
        width=width,
        height=height,
        num_inference_steps=whole(given, "num_inference_steps", *limits.num_inference_steps),
        guidance_scale=number(given, "guidance_scale", *limits.guidance_scale),
        seed=whole(given, "seed", 0, SEEDS - 1),
        sampler=choice(given, "sampler", SAMPLERS) if "sampler" in given else defaults.sampler,
        n=whole(given, "n", 1, limits.images),
    )
    chosen = {
        "output_format": choice(given, "output_format", FORMATS),
        "quality": whole(given, "output_compression", 0, LOSSLESS),
    }
    if compressed and chosen["output_format"] == "png" and chosen["quality"] != LOSSLESS:
        message = f"output_compression below {LOSSLESS} needs output_format webp or jpeg: png loses nothing."
        raise ApiError(400, message, "output_compression", "invalid_value")
    stream, partial_images = flag(given, "stream"), whole(given, "partial_images", 0, limits.partial_images)
    if partial_images and not stream:
        raise ApiError(400, "partial_images needs stream to be true.", "partial_images", "invalid_value")
    if stream and generation.n > 1:  # OpenAI's events do not say which of several pictures they belong to
        raise ApiError(400, f"n must be 1 where stream is true, got {generation.n}.", "n", "invalid_value")
    timeout_s = seconds(given, "timeout", limits.timeout_s)
    return ImageRequest(generation, encoding.model_copy(update=chosen), timeout_s, stream, partial_images)


def check_model(model: object, service: Service) -> None:
    """Refuses every model but the one that is served."""
    if model != service.model:
        raise invalid("model", service.model, model, status=404, code="model_not_found")


def width_height(size: str) -> tuple[int, int]:
    """'512x384' -> (512, 384)."""
    width, height = size.split("x")
    return int(width), int(height)


def text(given: Mapping[str, object], name: str, longest: int) -> str:
    value = given[name]
    if not isinstance(value, str):
        raise invalid(name, "a string", value)
    if len(value) > longest:
        raise ApiError(400, f"{name} must be at most {longest} characters, got {len(value)}.", name, "invalid_value")
    # Lone surrogates have no UTF-8; a NUL or an escape has no place in a prompt and none in a PNG's text.
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in value):
        raise ApiError(400, f"{name} must be text without control characters.", name, "invalid_value")
    return value


def whole(given: Mapping[str, object], name: str, low: int, high: int) -> int:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid(name, f"an integer between {low} and {high}", value)
    return value


def number(given: Mapping[str, object], name: str, low: float, high: float) -> float:
    value = given[name]
    # Compared before float(), which a huge integer overflows; the comparison also refuses infinity.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise invalid(name, f"a number between {low:g} and {high:g}", value)
    return float(value)


def seconds(given: Mapping[str, object], name: str, longest: float) -> float:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= longest:
        raise invalid(name, f"a number of seconds above 0 and at most {longest:g}", value)
    return float(value)


def flag(given: Mapping[str, object], name: str) -> bool:
    value = given[name]
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)
    return value


def choice(given: Mapping[str, object], name: str, allowed: Sequence[str]) -> str:
    value = given[name]
    if not isinstance(value, str) or value not in allowed:
        raise invalid(name, "one of " * (len(allowed) > 1) + ", ".join(allowed), value)
    return value


def refuse_unless_neutral(name: str, value: object) -> None:
    allowed = NEUTRAL[name]
    if not allowed:
        raise ApiError(400, f"{name} is not supported here; leave it out.", name, "unsupported_parameter")
    if not any(type(value) is type(neutral) and value == neutral for neutral in allowed):
        raise invalid(name, " or ".join(map(shown, allowed)), value, code="unsupported_value")


def invalid(name: str, rule: str, value: object, *, status: int = 400, code: str = "invalid_value") -> ApiError:
    return ApiError(status, f"{name} must be {rule}, got {shown(value)}.", name, code)


def shown(value: object) -> str:
    """A client's own value in its error, on one line and never long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    written = json.dumps(value)
    return written if len(written) <= 60 else f"{written[:57]}..."


def literal(value: str) -> object:
    """A query value as the JSON number that it spells; anything else stays text, for the field's check to refuse."""
    if re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    if re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?", value):
        return float(value)
    return value


def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    given: dict[str, object] = {}
    for name, value in pairs:
        if name in given:
            raise ApiError(400, f"Field {shown(name)} was given twice.", name, "duplicate_parameter")
        given[name] = value
    return given


def no_constant(name: str) -> NoReturn:
    raise ApiError(400, f"The body is not JSON: {name} is not a JSON number.", None, "invalid_json")
