"""Parses a query string or a JSON body into an ImageRequest. Knows nothing of JAX, Ray or HTTP libraries.

FIELDS declares every request field; CONTRIBUTING.md says how to add one.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl

from app.api.errors import ApiError
from app.api.field_rules import LOSSLESS, check_job, check_together
from app.api.fields import (
    Check,
    asynchronous,
    choice,
    flag,
    integer,
    invalid,
    literal,
    model,
    number,
    pair,
    seconds,
    share,
    shown,
    size,
    text,
    webhook,
)
from app.api.messages import ImageRequest
from app.api.settings import Service
from app.diffusion.samplers import SAMPLERS
from app.types import SEEDS, Generation, InvalidField, parse_size

FORMATS = ("png", "webp", "jpeg")


# What SDXL knows of a picture's size, under diffusers' names, each with the lowest number allowed. Other models refuse
# them.
SIZE_FIELDS = {"original_size": 1, "crops_coords_top_left": 0, "target_size": 1}


class Field(NamedTuple):
    check: Check
    default: Callable[[Service], object] | None  # None: a request must have this field
    numeric: bool = False  # in a query string and in a CSV file, text that spells a number is one
    query: bool = True  # GET /imagine takes this field, too
    edit: bool = False  # only POST /v1/images/edits takes this field


def longest_prompt(service: Service) -> int:
    return service.limits.prompt_characters


def response_formats(service: Service) -> tuple[str, ...]:
    """A service without a database of jobs keeps no picture that a URL could point to."""
    return ("b64_json",) if service.jobs.database is None else ("b64_json", "url")


FIELDS: Mapping[str, Field] = {
    "prompt": Field(text(longest_prompt, empty=False), None),
    "negative_prompt": Field(text(longest_prompt), lambda service: ""),
    "size": Field(size, lambda service: parse_size(service.sizes[0])),
    "num_inference_steps": Field(
        integer(lambda service: service.limits.num_inference_steps),
        lambda service: service.defaults.num_inference_steps,
        numeric=True,
    ),
    "guidance_scale": Field(
        number(lambda service: service.limits.guidance_scale),
        lambda service: service.defaults.guidance_scale,
        numeric=True,
    ),
    "seed": Field(integer(lambda service: (0, SEEDS - 1)), lambda service: secrets.randbelow(SEEDS), numeric=True),
    "sampler": Field(choice(lambda service: SAMPLERS), lambda service: service.defaults.sampler),
    "output_format": Field(choice(lambda service: FORMATS), lambda service: service.encoding.output_format),
    "output_compression": Field(
        integer(lambda service: (0, LOSSLESS)), lambda service: service.encoding.quality, numeric=True
    ),
    **{name: Field(pair(low), lambda service: None, query=False) for name, low in SIZE_FIELDS.items()},
    "timeout": Field(seconds, lambda service: service.limits.timeout_s, numeric=True),
    "model": Field(model, lambda service: service.model, query=False),
    "n": Field(integer(lambda service: (1, service.limits.images)), lambda service: 1, numeric=True, query=False),
    "response_format": Field(choice(response_formats), lambda service: None, query=False),
    "async": Field(asynchronous, lambda service: False, query=False),
    "webhook_url": Field(webhook, lambda service: None, query=False),
    # The next two identify an end user and have no effect.
    "user": Field(text(longest_prompt), lambda service: "", query=False),
    "safety_identifier": Field(text(longest_prompt), lambda service: "", query=False),
    "stream": Field(flag, lambda service: False, query=False),
    "partial_images": Field(
        integer(lambda service: (0, service.limits.partial_images)), lambda service: 0, numeric=True, query=False
    ),
    "progress": Field(flag, lambda service: False, query=False),
    "strength": Field(share, lambda service: None, numeric=True, query=False, edit=True),
}
QUERY_FIELDS = tuple(name for name, field in FIELDS.items() if field.query)  # of GET /imagine
BODY_FIELDS = tuple(name for name, field in FIELDS.items() if not field.edit)  # of POST /v1/images/generations
EDIT_FIELDS = tuple(FIELDS)  # of POST /v1/images/edits, besides its images
NUMERIC_FIELDS = tuple(name for name, field in FIELDS.items() if field.numeric)

# Fields of OpenAI's API that this service does not support, each with the values that have no effect. Any other value
# is refused, because a field that is accepted must not be ignored. Only the two routes with a body take them.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": ("auto", "opaque"),
    "complexity": ("low",),  # no image is planned
    "frame_count": (),
    "frame_duration_ms": (),
    "moderation": ("auto", "low"),  # nothing is filtered
    "quality": ("auto", "standard"),  # and those of args.qualities
    "style": ("vivid", "natural"),  # either leaves the style to the prompt
    "svg": (),
}
EDIT_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **NEUTRAL,
    "input_fidelity": ("low",),  # strength says how much of an image stays
    "markup": (),
}


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
    values = unique([(name, literal(value) if name in NUMERIC_FIELDS else value) for name, value in pairs])
    return resolve(values, service, QUERY_FIELDS)


def parse_body(body: bytes, service: Service) -> ImageRequest:
    """The JSON body of POST /v1/images/generations."""
    return resolve(parse_json(body), service, BODY_FIELDS)


def parse_json(body: bytes) -> dict[str, object]:
    try:
        values = json.loads(body.decode(), object_pairs_hook=unique, parse_constant=refuse_constant)
    except UnicodeDecodeError:
        raise ApiError(400, "The body must be JSON in UTF-8.", None, "invalid_encoding") from None
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        raise ApiError(400, message, None, "invalid_json") from None
    except InvalidField:
        raise
    except (ValueError, RecursionError):  # an integer of thousands of digits, arrays in arrays in arrays
        raise ApiError(400, "The body is not JSON of a sensible shape.", None, "invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"The body must be a JSON object, got {shown(values)}.", None, "invalid_json")
    return values


def resolve(values: Mapping[str, object], service: Service, fields: Sequence[str]) -> ImageRequest:
    """Checks every field and fills in those that were left out; null counts as left out. Raises InvalidField."""
    values = {name: value for name, value in values.items() if value is not None}
    neutral = NEUTRAL if fields is BODY_FIELDS else EDIT_NEUTRAL if fields is EDIT_FIELDS else {}
    for name, value in values.items():
        if name in neutral:
            check_neutral(name, value, service)
        elif name not in fields:
            message = f"Unknown field {shown(name)}; the fields are {', '.join(fields)}."
            raise InvalidField(name, message, "unknown_parameter")
    model("model", values.get("model", service.model), service)  # before the others, whose limits may be the model's
    resolved: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if name in values:
            resolved[name] = field.check(name, values[name], service)
        elif field.default is None:
            raise InvalidField(name, f"{name} is required.", "missing_required_parameter")
        else:
            resolved[name] = field.default(service)
    if "quality" in values and "num_inference_steps" not in values:
        resolved["num_inference_steps"] = service.qualities.get(str(values["quality"]), resolved["num_inference_steps"])
    check_together(resolved, values)
    check_job(resolved)
    width, height = resolved["size"]
    generation = Generation(
        prompt=resolved["prompt"],
        negative_prompt=resolved["negative_prompt"],
        width=width,
        height=height,
        num_inference_steps=resolved["num_inference_steps"],
        guidance_scale=resolved["guidance_scale"],
        seed=resolved["seed"],
        sampler=resolved["sampler"],
        n=resolved["n"],
        fields=tuple((name, resolved[name]) for name in SIZE_FIELDS if resolved[name] is not None),
    )
    changes = {"output_format": resolved["output_format"], "quality": resolved["output_compression"]}
    return ImageRequest(
        generation=generation,
        encoding=service.encoding.model_copy(update=changes),
        timeout_s=resolved["timeout"],
        stream=resolved["stream"],
        partial_images=resolved["partial_images"],
        progress=resolved["progress"],
        response_format=resolved["response_format"],
        asynchronous=resolved["async"],
        webhook_url=resolved["webhook_url"],
        seeded="seed" in values,
    )


def check_neutral(name: str, value: object, service: Service) -> None:
    """Takes the values without an effect, and for `quality` those for which the config declares numbers of steps."""
    allowed = neutral_values(name, service)
    if not allowed:
        raise InvalidField(name, f"{name} is not supported here; leave it out.", "unsupported_parameter")
    if not any(type(value) is type(neutral) and value == neutral for neutral in allowed):
        raise invalid(name, " or ".join(map(shown, allowed)), value, "unsupported_value")


def neutral_values(name: str, service: Service) -> tuple[object, ...]:
    return (*EDIT_NEUTRAL[name], *(service.qualities if name == "quality" else ()))


def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidField(name, f"Field {shown(name)} was given twice.", "duplicate_parameter")
        values[name] = value
    return values


def refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"The body is not JSON: {name} is not a JSON number.", None, "invalid_json")
