"""GET /openapi.json: the API in OpenAPI 3.1, generated from the tables by which requests are parsed.

Knows nothing of HTTP libraries or Ray.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from app.api.field_descriptions import DESCRIPTIONS
from app.api.fields import Schema
from app.api.jobs.states import MOST_LISTED, STATUSES
from app.api.protocol import (
    BODY_FIELDS,
    EDIT_FIELDS,
    EDIT_NEUTRAL,
    FIELDS,
    FORMATS,
    NEUTRAL,
    QUERY_FIELDS,
    neutral_values,
)
from app.api.settings import Service

JSON, EVENTS, FORM = "application/json", "text/event-stream", "multipart/form-data"
STRING, NUMBER, INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
ERROR = {"$ref": "#/components/schemas/Error"}

SCHEMAS: Mapping[str, Schema] = {
    "Images": {
        "type": "object",
        "description": "the pictures, what made them, and seconds",
        "properties": {
            "created": INTEGER,
            "data": {
                "type": "array",
                "items": {"type": "object", "properties": {"b64_json": STRING, "url": STRING, "seed": INTEGER}},
            },
            "timings": {"type": "object", "additionalProperties": NUMBER},
        },
        "required": ["created", "data", "timings"],
    },
    "Model": {
        "type": "object",
        "properties": {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING},
        "required": ["id", "object", "created", "owned_by"],
    },
    "Job": {
        "type": "object",
        "properties": {
            "id": STRING,
            "object": {"const": "job"},
            "status": {"enum": [*STATUSES]},
            "position": {"type": ["integer", "null"], "description": "of a queued job: how many go before it"},
            "estimated_s": {"type": ["number", "null"], "description": "until it has ended"},
            "progress": {"type": "integer", "minimum": 0, "maximum": 100},
            "result": {"anyOf": [{"$ref": "#/components/schemas/Images"}, {"type": "null"}]},
        },
        "required": ["id", "object", "status", "position", "estimated_s", "progress", "result"],
    },
    "Error": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": STRING,
                    "type": {"enum": ["invalid_request_error", "server_error"]},
                    "param": {"type": ["string", "null"], "description": "the field that is wrong"},
                    "code": STRING,
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
}
# What a route answers with 200, by its name in `routes`. Any other answers an object of JSON.
ANSWERS: Mapping[str, Mapping[str, Schema]] = {
    "GET /imagine": {f"image/{form}": {} for form in FORMATS},
    "POST /v1/images/generations": {JSON: {"$ref": "#/components/schemas/Images"}, EVENTS: STRING},
    "POST /v1/images/edits": {JSON: {"$ref": "#/components/schemas/Images"}, EVENTS: STRING},
    "GET /v1/jobs/{id}": {JSON: {"$ref": "#/components/schemas/Job"}},
    "GET /v1/files/{id}": {f"image/{form}": {} for form in FORMATS},
    "GET /v1/models/{id}": {JSON: {"$ref": "#/components/schemas/Model"}},
}
JOB = {
    "description": "a job, where `async` is true",
    "content": {JSON: {"schema": {"$ref": "#/components/schemas/Job"}}},
}
LIST_PARAMETERS: Mapping[str, Mapping[str, Schema]] = {
    "GET /v1/jobs": {"limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED}, "after": STRING},
}


def document(service: Service, routes: Mapping[str, str], keys: bool) -> dict[str, Any]:
    """The document for one model. `routes` are sentences by 'METHOD /path'; `keys`: whether a request needs one."""
    paths: dict[str, dict[str, Any]] = {}
    for route, summary in routes.items():
        method, _, path = route.partition("?")[0].partition(" ")
        paths.setdefault(path, {})[method.lower()] = operation(f"{method} {path}", summary, service)
    security: dict[str, Any] = {"security": [{"key": []}]} if keys else {}
    schemes = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": service.model, "version": "1", "description": "Text to image. `null` counts as left out."},
        "paths": paths,
        "components": {"schemas": {**SCHEMAS, "ImageRequest": body_schema(service)} | edit_schemas(service), **schemes},
        **security,
    }


def operation(route: str, summary: str, service: Service) -> dict[str, Any]:
    answers = ANSWERS.get(route, {JSON: {"type": "object"}})
    responses = {
        "200": {"description": "OK", "content": {kind: {"schema": schema} for kind, schema in answers.items()}},
        "default": {"description": "refused or failed", "content": {JSON: {"schema": ERROR}}},
    }
    if route.startswith("POST /v1/images/"):
        responses["202"] = JOB
    described: dict[str, Any] = {"summary": summary, "responses": responses}
    if route == "GET /imagine":
        described["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": FIELDS[name].default is None,
                "schema": field_schema(name, service),
            }
            for name in QUERY_FIELDS
        ]
    elif route in LIST_PARAMETERS:
        parameters = LIST_PARAMETERS[route].items()
        described["parameters"] = [{"name": name, "in": "query", "schema": schema} for name, schema in parameters]
    elif "{id}" in route:
        described["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": STRING}]
    elif route == "POST /v1/images/generations":
        schema = {"$ref": "#/components/schemas/ImageRequest"}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    elif route == "POST /v1/images/edits":
        schemas = {FORM: "EditForm", JSON: "EditRequest"}
        content = {kind: {"schema": {"$ref": f"#/components/schemas/{name}"}} for kind, name in schemas.items()}
        described["requestBody"] = {"required": True, "content": content}
    return described


def body_schema(service: Service) -> dict[str, Any]:
    """What POST /v1/images/generations takes. Fields that are always refused are not in it."""
    return object_schema((*BODY_FIELDS, *(name for name, values in NEUTRAL.items() if values)), service, {})


def edit_schemas(service: Service) -> dict[str, Any]:
    """What POST /v1/images/edits takes, as a form and as JSON."""
    names = (*EDIT_FIELDS, *(name for name, values in EDIT_NEUTRAL.items() if values))
    link: dict[str, Any] = {"type": "object", "properties": {"image_url": STRING}, "required": ["image_url"]}
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    most = service.limits.input_images
    described = {name: {"description": DESCRIPTIONS[name]} for name in ("image", "images", "mask")}
    form = {"image": {"type": "array", "items": file, "maxItems": most, **described["image"]}}
    listed = {"images": {"type": "array", "items": link, "maxItems": most, **described["images"]}}
    return {
        "EditForm": object_schema(names, service, form | {"mask": file | described["mask"]}),
        "EditRequest": object_schema(names, service, listed | {"mask": link | described["mask"]}),
    }


def object_schema(names: Sequence[str], service: Service, images: Mapping[str, Schema]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**images, **{name: field_schema(name, service) for name in names}},
        "required": [name for name in (*images, *names) if name in FIELDS and FIELDS[name].default is None]
        + [name for name in images if name != "mask"],
        "additionalProperties": False,
    }


def field_schema(name: str, service: Service) -> dict[str, Any]:
    described = {"description": DESCRIPTIONS[name]}
    if name in EDIT_NEUTRAL:
        return {"enum": [*neutral_values(name, service)], **described}
    field = FIELDS[name]
    default = None if field.default is None or name == "seed" else field.default(service)  # a seed is drawn
    if isinstance(default, tuple):  # a size
        default = "x".join(map(str, default))
    return {**field.check.schema(service), **described, **({} if default is None else {"default": default})}
