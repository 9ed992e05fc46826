"""Google's discovery documents as the rules for requests and responses.

google-api-python-client brings them. They list the methods of a service, the parameters, and the fields of messages.
They do not say which zones, accelerators or images exist: rehearsal/catalogue.py does.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from rehearsal.refusal import Refusal

Json = dict[str, Any]
PLACEHOLDER = re.compile(r"\{(\+?)(\w+)\}")
JSON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "boolean": bool,
    "number": (int, float),
}
MAX_DEPTH = 20  # of the messages that this project sends


@dataclass(frozen=True)
class Method:
    """A method of a service: its id, such as compute.instances.insert, and what a request for it may hold."""

    id: str
    verb: str
    path: re.Pattern[str]
    parameters: Mapping[str, Json]
    request: str | None  # names of schemas
    response: str  # empty if there is none


class Service:
    """The methods and schemas of one version of a service."""

    def __init__(self, name: str, version: str) -> None:
        self.document: Json = json.loads((folder() / f"{name}.{version}.json").read_text())
        self.host = self.document["rootUrl"].removeprefix("https://").rstrip("/")
        self.schemas: Mapping[str, Json] = self.document["schemas"]
        self.methods = [self._method(description) for description in descriptions(self.document)]

    def match(self, verb: str, path: str) -> tuple[Method, dict[str, str]] | None:
        """The method that a request line names, with the parameters in its path."""
        for method in self.methods:
            if method.verb == verb and (fit := method.path.fullmatch(path)):
                return method, {name: unquote(value) for name, value in fit.groupdict().items()}
        return None

    def check_request(self, method: Method, path: Mapping[str, str], query: Mapping[str, str], body: object) -> None:
        """Raises Refusal where the document forbids the request."""
        common = self.document["parameters"]
        for name, value in {**query, **path}.items():
            if not (parameter := method.parameters.get(name) or common.get(name)):
                raise Refusal(
                    400, f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter.'
                )
            self._check_text(parameter, value, name)
        for name, parameter in method.parameters.items():
            if parameter.get("required") and name not in path and name not in query:
                raise Refusal(400, f"Required parameter is missing: {name}", "required")
        if method.request:
            if not isinstance(body, dict):
                raise Refusal(400, "Invalid JSON payload received. The request needs an object as its body.")
            self.check(method.request, body, "resource", method.id)
        elif body is not None:
            raise Refusal(400, "Invalid JSON payload received. The request must have no body.")

    def check(self, schema: str, value: Json, place: str, method: str = "") -> None:
        """Raises Refusal where a message does not fit its schema. `method` says which fields are required."""
        self._check_value({"$ref": schema}, value, place, method)

    def _method(self, description: Json) -> Method:
        parameters = description.get("parameters", {})
        parts = PLACEHOLDER.split(description["path"])
        pattern = re.escape(self.document["servicePath"] + parts[0])
        for whole, name, literal in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            value = parameters[name].get("pattern", ".+").strip("^$") if whole else "[^/:]+"
            pattern += f"(?P<{name}>{value}){re.escape(literal)}"
        return Method(
            description["id"],
            description["httpMethod"],
            re.compile("/" + pattern),
            parameters,
            description.get("request", {}).get("$ref"),
            description.get("response", {}).get("$ref", ""),
        )

    def _check_value(self, schema: Json, value: object, place: str, method: str, depth: int = 0) -> None:
        assert depth < MAX_DEPTH
        if reference := schema.get("$ref"):
            return self._check_value(self.schemas[reference], value, place, method, depth + 1)
        kind = schema.get("type", "any")
        if kind in ("string", "integer"):
            return self._check_text(schema, value, place)
        if kind != "any" and (not isinstance(value, JSON_TYPES[kind]) or (kind == "number" and value is True)):
            raise Refusal(400, f"Invalid value at '{place}' (type {kind}), {json.dumps(value)}", "badRequest")
        if isinstance(value, list):
            items = {**schema.get("items", {}), **({"pattern": schema["pattern"]} if "pattern" in schema else {})}
            for i, item in enumerate(value):
                self._check_value(items, item, f"{place}[{i}]", method, depth + 1)
        elif isinstance(value, dict) and kind == "object":
            self._check_fields(schema, value, place, method, depth)

    def _check_fields(self, schema: Json, value: Json, place: str, method: str, depth: int) -> None:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, content in value.items():
            if not (field := properties.get(name) or others):
                text = f"Invalid JSON payload received. Unknown name \"{name}\" at '{place}': Cannot find field."
                raise Refusal(400, text, "badRequest")
            self._check_value(field, content, f"{place}.{name}", method, depth + 1)
        for name, field in properties.items():
            if method and method in field.get("annotations", {}).get("required", ()) and name not in value:
                raise Refusal(400, f"Required field '{place}.{name}' not specified", "required")

    def _check_text(self, schema: Json, value: object, place: str) -> None:
        """Checks a string or an integer. A 64-bit integer is a string in JSON, and Google also takes a number."""
        if schema.get("type") == "integer" or schema.get("format") in ("int64", "uint64"):
            if isinstance(value, bool) or not re.fullmatch(r"-?\d+", str(value)):
                raise Refusal(400, f"Invalid value at '{place}' (integer), {json.dumps(value)}", "badRequest")
        elif schema.get("type") == "boolean":  # in a query
            if value not in ("true", "false"):
                raise Refusal(400, f"Invalid value at '{place}' (boolean), {json.dumps(value)}", "badRequest")
        elif not isinstance(value, str):
            raise Refusal(400, f"Invalid value at '{place}' (string), {json.dumps(value)}", "badRequest")
        elif "enum" in schema and value not in schema["enum"]:
            raise Refusal(400, f"Invalid value at '{place}' (enum), {json.dumps(value)}", "badRequest")
        elif "pattern" in schema and not re.fullmatch(schema["pattern"], value):
            text = f"Invalid value for field '{place}': '{value}'. Must be a match of regex '{schema['pattern']}'"
            raise Refusal(400, text, "invalid")


@cache
def service(name: str, version: str) -> Service:
    return Service(name, version)


def folder() -> Path:
    spec = find_spec("googleapiclient")
    assert spec and spec.origin, "needs Google's client: make gcp"
    return Path(spec.origin).parent / "discovery_cache" / "documents"


def descriptions(document: Json) -> Iterator[Json]:
    yield from document.get("methods", {}).values()
    for resource in document.get("resources", {}).values():
        yield from descriptions(resource)
