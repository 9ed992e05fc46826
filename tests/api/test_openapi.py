"""GET /openapi.json held to the parser and to the routes."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from starlette.routing import Route

from app.api.errors import ApiError
from app.api.field_descriptions import DESCRIPTIONS
from app.api.fields import LARGEST
from app.api.ingress import ROUTES, APIIngress
from app.api.openapi import document
from app.api.page_files import PREFIX
from app.api.protocol import BODY_FIELDS, EDIT_FIELDS, EDIT_NEUTRAL, NEUTRAL, parse_body
from app.types import InvalidField
from tests.api.test_ingress import SERVICE, Replicas, local_client
from tests.fuzz_cases import ODD, WORDS

DOCUMENT = document(SERVICE, ROUTES, keys=False)
SCHEMAS = DOCUMENT["components"]["schemas"]
BODY = Draft202012Validator(SCHEMAS["ImageRequest"])
# Near the limits of one field or another.
VALUES: list[object] = [
    *(
        *ODD,
        *WORDS,
        "128x128",
        "256x128",
        "512x512",
        "tiny",
        "euler",
        "pndm",
        "png",
        "webp",
        "b64_json",
        "low",
        "vivid",
    ),
    *(4000 * "a", 4001 * "a", 0.2, 0.1, 0.3, 1, 4, 12, 20, 20.5, 100, 101, 2**32 - 1, [0, 0], [1, LARGEST], [1, 2, 3]),
]
# JSON Schema cannot say these; and it takes 3.0 for an integer.
STRICTER = ("control characters", "must not be empty", "an integer between", "array of two integers")


def parses(body: dict[str, Any]) -> str:
    """The parser's sentence, or nothing if it takes the body."""
    try:
        parse_body(json.dumps(body).encode(), SERVICE)
    except InvalidField as error:
        return error.message
    except ApiError as error:
        return error.message
    return ""


@pytest.mark.parametrize("name", [*BODY_FIELDS, *NEUTRAL, "colour"])
def test_a_field_takes_what_its_schema_says(name: str) -> None:
    for value in VALUES:
        if value is None:  # counts as left out
            continue
        body = {"prompt": "a", "stream": True, "output_format": "webp", name: value}
        if name in ("n", "stream"):
            del body["stream"]
            body["stream"] = value if name == "stream" else False
        try:
            allowed = BODY.is_valid(json.loads(json.dumps(body, allow_nan=False)))
        except ValueError:  # NaN, or an integer of thousands of digits
            continue
        problem = parses(body)
        if any(reason in problem for reason in STRICTER):
            continue
        assert allowed == (not problem), f"{name}={value!r:.60}: {problem}"


def test_every_field_has_a_description_and_its_default() -> None:
    properties = SCHEMAS["ImageRequest"]["properties"]
    assert properties.keys() == {*BODY_FIELDS, *(name for name, values in NEUTRAL.items() if values)}
    in_form, in_json = (SCHEMAS[name]["properties"].keys() for name in ("EditForm", "EditRequest"))
    edits = {*EDIT_FIELDS, *(name for name, values in EDIT_NEUTRAL.items() if values), "mask"}
    assert in_form == edits | {"image"} and in_json == edits | {"images"}
    assert DESCRIPTIONS.keys() == properties.keys() | in_form | in_json
    assert properties["size"]["default"] == "128x128" and properties["num_inference_steps"]["default"] == 12
    assert "default" not in properties["seed"] and "default" not in properties["prompt"]
    for name, schema in properties.items():
        if "default" in schema:
            assert Draft202012Validator(schema).is_valid(schema["default"]), name


def test_the_document_has_every_route_and_every_schema_is_one() -> None:
    app = APIIngress(Replicas(), SERVICE).__serve_build_asgi_app__()
    routes = {
        (method, route.path) for route in app.routes if isinstance(route, Route) for method in route.methods or ()
    }
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    ours = {(method, path.replace(":path", "")) for method, path in routes if not path.startswith(PREFIX)}
    assert described == {(method, path) for method, path in ours if method != "HEAD"}
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)
    references = set(json.dumps(DOCUMENT).split('"#/components/schemas/')[1:])
    assert {reference.partition('"')[0] for reference in references} <= SCHEMAS.keys()


def test_the_route_answers_the_document() -> None:
    with local_client(APIIngress(Replicas(), SERVICE)) as client:
        answer = client.get("/openapi.json")
    assert answer.status_code == 200 and answer.json() == json.loads(json.dumps(DOCUMENT))


def test_an_api_with_keys_says_how_they_are_sent() -> None:
    described = document(SERVICE, ROUTES, keys=True)
    assert described["security"] == [{"key": []}]
    assert described["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
