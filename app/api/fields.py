"""Checks of the values of request fields. A check returns the value or raises InvalidField.

Each takes the field's name, its value from the request, and the service, whose limits are the ranges. Its schema says
the same to programs: GET /openapi.json, the docs and the fuzz test derive from it.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.api.settings import Service
from app.types import InvalidField, Size, parse_size

LARGEST = 16384  # pixels along a side of a picture that a model may have been trained on
LONGEST_URL = 2000

Schema = Mapping[str, object]  # JSON Schema 2020-12, which OpenAPI 3.1 takes
Read = Callable[[str, object, Service], Any]


@dataclass(frozen=True)
class Check:
    """Reads the value of a field, or raises InvalidField. `schema` tells which values it takes."""

    read: Read
    schema: Callable[[Service], Schema]

    def __call__(self, name: str, value: object, service: Service) -> Any:
        return self.read(name, value, service)


def takes(schema: Callable[[Service], Schema]) -> Callable[[Read], Check]:
    return lambda read: Check(read, schema)


@takes(lambda service: {"type": "string", "enum": [*service.sizes, "auto"]})
def size(name: str, value: object, service: Service) -> Size:
    chosen = choice(lambda service: (*service.sizes, "auto"))(name, value, service)
    return parse_size(service.sizes[0] if chosen == "auto" else chosen)


@takes(lambda service: {"type": "string", "enum": [*service.names]})
def model(name: str, value: object, service: Service) -> str:
    if value not in service.names:
        raise invalid(name, service.model, value, "model_not_found")
    return service.model


@takes(lambda service: {"type": "number", "exclusiveMinimum": 0, "maximum": service.limits.timeout_s})
def seconds(name: str, value: object, service: Service) -> float:
    longest = service.limits.timeout_s
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= longest:
        raise invalid(name, f"a number of seconds above 0 and at most {longest:g}", value)
    return float(value)


@takes(lambda service: {"type": "number", "exclusiveMinimum": 0, "maximum": 1})
def share(name: str, value: object, service: Service) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise invalid(name, "a number above 0 and at most 1", value)
    return float(value)


def webhook_schema(service: Service) -> Schema:
    hosts = "|".join(map(re.escape, service.jobs.webhook_hosts))
    pattern = rf"^https://({hosts})(:443)?([/?#][!-~]*)?$"
    return {"type": "string", "maxLength": LONGEST_URL, "pattern": pattern} if hosts else {"not": {}}


@takes(webhook_schema)
def webhook(name: str, value: object, service: Service) -> str:
    """An https URL whose host the config names: no client chooses what this server connects to."""
    hosts = service.jobs.webhook_hosts
    if not hosts:
        raise InvalidField(name, f"{name} is not supported here; leave it out.", "unsupported_parameter")
    schema = webhook_schema(service)
    # The authority is compared as it is written, so none has a user's name or a backslash in it.
    if not isinstance(value, str) or len(value) > LONGEST_URL or not re.fullmatch(str(schema["pattern"]), value):
        raise invalid(name, f"an https URL at {' or '.join(hosts)}", value)
    return value


@takes(lambda service: {"type": "boolean"} if service.jobs.database else {"const": False})
def asynchronous(name: str, value: object, service: Service) -> bool:
    if value is True and service.jobs.database is None:
        raise InvalidField(name, f"{name} must be false: this service keeps no jobs.", "unsupported_value")
    return bool(flag(name, value, service))


@takes(lambda service: {"type": "boolean"})
def flag(name: str, value: object, service: Service) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)
    return value


def text(longest: Callable[[Service], int], *, empty: bool = True) -> Check:
    @takes(lambda service: {"type": "string", "minLength": 0 if empty else 1, "maxLength": longest(service)})
    def check(name: str, value: object, service: Service) -> str:
        if not isinstance(value, str):
            raise invalid(name, "a string", value)
        if len(value) > longest(service):
            raise InvalidField(name, f"{name} must be at most {longest(service)} characters, got {len(value)}.")
        # Lone surrogates have no UTF-8. A NUL or an escape has no place in a prompt and cannot stand in a PNG's text.
        if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in value):
            raise InvalidField(name, f"{name} must be text without control characters.")
        if not empty and not value.strip():
            raise InvalidField(name, f"{name} must not be empty.")
        return value

    return check


def integer(bounds: Callable[[Service], tuple[int, int]]) -> Check:
    @takes(lambda service: {"type": "integer"} | in_range(bounds(service)))
    def check(name: str, value: object, service: Service) -> int:
        low, high = bounds(service)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise invalid(name, f"an integer between {low} and {high}", value)
        return value

    return check


def number(bounds: Callable[[Service], tuple[float, float]]) -> Check:
    @takes(lambda service: {"type": "number"} | in_range(bounds(service)))
    def check(name: str, value: object, service: Service) -> float:
        low, high = bounds(service)
        # Compared before float(), which a huge integer overflows; the comparison also refuses infinity.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise invalid(name, f"a number between {low:g} and {high:g}", value)
        return float(value)

    return check


def pair(low: int) -> Check:
    """Two numbers of pixels, along a picture's height and along its width."""
    items = {"type": "integer", "minimum": low, "maximum": LARGEST}

    @takes(lambda service: {"type": "array", "items": items, "minItems": 2, "maxItems": 2})
    def check(name: str, value: object, service: Service) -> tuple[int, int]:
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(x) is not int or not low <= x <= LARGEST for x in value)
        ):
            raise invalid(name, f"an array of two integers between {low} and {LARGEST}", value)
        return value[0], value[1]

    return check


def choice(choices: Callable[[Service], Sequence[str]]) -> Check:
    @takes(lambda service: {"type": "string", "enum": [*choices(service)]})
    def check(name: str, value: object, service: Service) -> str:
        allowed = choices(service)
        if not isinstance(value, str) or value not in allowed:
            raise invalid(name, "one of " * (len(allowed) > 1) + ", ".join(allowed), value)
        return value

    return check


def in_range(bounds: tuple[float, float]) -> dict[str, object]:
    return {"minimum": bounds[0], "maximum": bounds[1]}


def invalid(name: str, rule: str, value: object, code: str = "invalid_value") -> InvalidField:
    return InvalidField(name, f"{name} must be {rule}, got {shown(value)}.", code)


def shown(value: object) -> str:
    """A client's value as its error quotes it: on one line and never long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    quoted = json.dumps(value)
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}..."


def literal(value: str) -> object:
    """A query value as the JSON number that it spells. Other text stays text, and the field's check refuses it."""
    if re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    if re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?", value):
        return float(value)
    return value
