import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from openai import OpenAI
from openai.types.image_generate_params import ImageGenerateParamsStreaming

from app.api.errors import ApiError, api_error
from app.api.messages import ImageRequest
from app.api.protocol import BODY_FIELDS, NEUTRAL, QUERY_FIELDS, parse_body, parse_query
from app.api.settings import Encoding, Limits, Service
from app.diffusion.samplers import SAMPLERS
from app.types import SEEDS, Generation, InvalidField

SERVICE = Service(
    "tiny",
    ("128x128", "256x128"),
    Limits(
        images=3,
        num_inference_steps=(2, 50),
        guidance_scale=(1, 12.5),
        prompt_characters=20,
        query_bytes=500,
        partial_images=2,
        timeout_s=60,
    ),
)


def body(**fields: Any) -> ImageRequest:
    return parse_body(json.dumps(fields).encode(), SERVICE)


def refusal_of_body(raw: str | bytes) -> ApiError:
    return refusal(parse_body, raw)


def refusal_of_query(query: str | bytes) -> ApiError:
    return refusal(parse_query, query)


def refusal(parse: Callable[[bytes, Service], object], content: str | bytes) -> ApiError:
    with pytest.raises((ApiError, InvalidField)) as caught:
        parse(content.encode() if isinstance(content, str) else content, SERVICE)
    assert isinstance(caught.value, ApiError | InvalidField)
    return api_error(caught.value)


def test_a_bare_prompt_gets_every_default() -> None:
    request = body(prompt="a red house")
    seed = request.generation.seed
    assert request.generation == Generation("a red house", "", 128, 128, 20, 7.5, seed, None, 1)
    assert request.encoding == Encoding(output_format="png", quality=90, png_level=6)
    assert (request.timeout_s, request.stream, request.partial_images) == (60.0, False, 0)


def test_query_and_body_resolve_to_the_same_request() -> None:
    query = (
        b"prompt=a+caf%C3%A9&negative_prompt=fog&size=256x128&num_inference_steps=7&guidance_scale=2.5"
        b"&seed=0&sampler=euler&output_format=webp&output_compression=55&timeout=2.5"
    )
    fields = {
        "prompt": "a café",
        "negative_prompt": "fog",
        "size": "256x128",
        "num_inference_steps": 7,
        "guidance_scale": 2.5,
        "seed": 0,
        "sampler": "euler",
        "output_format": "webp",
        "output_compression": 55,
        "timeout": 2.5,
    }
    request = parse_query(query, SERVICE)
    assert request == body(**fields)
    assert request.generation == Generation("a café", "fog", 256, 128, 7, 2.5, 0, "euler", 1)
    assert request.encoding == Encoding(output_format="webp", quality=55)
    assert request.timeout_s == 2.5


def test_a_missing_seed_is_random() -> None:
    assert body(prompt="a", seed=0).generation.seed == 0
    drawn = {body(prompt="a", seed=None).generation.seed for _ in range(20)}
    assert len(drawn) > 15 and all(0 <= seed < SEEDS for seed in drawn)


def test_null_counts_as_left_out() -> None:
    nulls = dict.fromkeys((*BODY_FIELDS, *NEUTRAL)) | {"prompt": "a", "seed": 5}
    assert body(**nulls) == body(prompt="a", seed=5)


def test_size_fields_are_pairs_of_which_only_those_in_the_request_reach_the_model() -> None:
    generation = body(prompt="a", crops_coords_top_left=[0, 64], original_size=[768, 512]).generation
    assert generation.fields == (("original_size", (768, 512)), ("crops_coords_top_left", (0, 64)))
    assert body(prompt="a").generation.fields == ()


def test_values_at_both_ends_of_every_range_are_allowed() -> None:
    for fields in (
        {"num_inference_steps": 2, "guidance_scale": 1, "seed": 0, "n": 1, "output_compression": 0, "timeout": 1e-3},
        {
            **{"num_inference_steps": 50, "guidance_scale": 12.5, "seed": SEEDS - 1, "n": 3},
            **{"output_compression": 100, "timeout": 60},
        },
    ):
        request = body(prompt="x" * 20, output_format="jpeg", **fields)
        assert request.generation.num_inference_steps == fields["num_inference_steps"]
        assert isinstance(request.generation.guidance_scale, float)
        assert request.timeout_s == fields["timeout"] and isinstance(request.timeout_s, float)


def test_a_stream_has_as_many_previews_as_were_asked_for() -> None:
    assert body(prompt="a", stream=True, partial_images=2).partial_images == 2
    request = body(prompt="a", stream=True, n=1)
    assert request.stream and request.partial_images == 0


def test_openai_fields_without_an_effect_are_accepted() -> None:
    fields = {"model": "tiny", "user": "u-1", "response_format": "b64_json", "size": "auto", "quality": "auto"}
    fields |= {"background": "opaque", "moderation": "auto"}
    request = body(prompt="a", seed=1, stream=False, partial_images=0, **fields)
    assert replace(request, response_format=None) == body(prompt="a", seed=1)


# Every parameter that images.generate of OpenAI's client documents: the values that have no effect, which are accepted,
# and the values that are refused, because the service cannot do it.
OPENAI: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "background": (("auto", "opaque"), ("transparent",)),
    "complexity": (("low",), ("medium", "high")),
    "frame_count": ((), (2, 16)),
    "frame_duration_ms": ((), (200,)),
    "model": (("tiny",), ("gpt-image-2.5-sunburst",)),
    "moderation": (("auto", "low"), ("high",)),
    "n": ((1,), (10,)),
    "output_compression": ((100,), (0, 99)),
    "output_format": (("png",), ("gif", "svg")),
    "partial_images": ((0,), (1,)),
    "quality": (("auto", "standard"), ("low", "medium", "high", "xhigh", "max", "hd")),
    "response_format": (("b64_json",), ("url",)),
    "safety_identifier": (("5f1e", ""), (7,)),
    "size": (("auto", "128x128"), ("1024x1024",)),
    "stream": ((False,), ()),
    "style": (("vivid", "natural"), ("oil",)),
    "svg": ((), ({"model": "gpt-5"},)),
    "user": (("u-1", ""), (7,)),
}


def sent_by_openais_client(**fields: Any) -> bytes:
    """The body of POST /v1/images/generations."""
    bodies: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(request.content)
        return httpx2.Response(200, json={"created": 1, "data": []})

    with OpenAI(
        base_url="http://127.0.0.1:1/v1",
        api_key="any",
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer)),
    ) as client:
        client.images.generate(**fields)
    return bodies[0]


def test_every_parameter_of_openais_client_has_a_case() -> None:
    named = ImageGenerateParamsStreaming.__required_keys__ | ImageGenerateParamsStreaming.__optional_keys__
    assert named == {"prompt", *OPENAI}


@pytest.mark.parametrize("name", OPENAI)
def test_neutral_values_of_openais_client_are_accepted_and_others_refused(name: str) -> None:
    plain, (taken, refused) = body(prompt="a", seed=1), OPENAI[name]
    for value in (None, *taken):
        request = parse_body(sent_by_openais_client(prompt="a", extra_body={"seed": 1}, **{name: value}), SERVICE)
        assert request.generation == plain.generation and not request.stream
        assert request.encoding.model_copy(update={"quality": 90}) == plain.encoding
    for value in refused:
        error = refusal_of_body(sent_by_openais_client(prompt="a", **{name: value}))
        assert error.status in (400, 404) and error.param == name and error.message.startswith(name)


def test_a_quality_is_the_number_of_steps_that_the_config_declares_and_gives_way_to_a_number() -> None:
    service = replace(SERVICE, qualities={"low": 4, "hd": 50})

    def steps(**fields: Any) -> int:
        body = json.dumps({"prompt": "a"} | fields).encode()
        return parse_body(body, service).generation.num_inference_steps

    assert [steps(quality=quality) for quality in ("low", "hd", "auto", "standard")] == [4, 50, 20, 20]
    assert steps(quality="hd", num_inference_steps=7) == 7
    error = refusal(lambda content, service_: parse_body(content, service), b'{"prompt": "a", "quality": "high"}')
    assert error.message == 'quality must be "auto" or "standard" or "low" or "hd", got "high".'


def test_the_longest_prompt_fits_in_every_encoding() -> None:
    service = replace(SERVICE, limits=Limits())
    longest = "\U0001f305" * service.limits.prompt_characters
    fields = {"prompt": longest, "negative_prompt": longest}
    assert len(longest) == 4000
    escaped = json.dumps(fields, ensure_ascii=True).encode()
    assert len(escaped) <= service.limits.body_bytes
    assert parse_body(escaped, service).generation.negative_prompt == longest
    assert parse_query(urlencode({"prompt": longest}).encode(), service).generation.prompt == longest
    with pytest.raises(InvalidField, match="prompt must be at most 4000 characters, got 4001"):
        parse_body(json.dumps({"prompt": longest + "a"}).encode(), service)


def test_a_prompt_may_hold_any_text_and_line_breaks() -> None:
    prompt = "dämmerung\n日没 🌅"
    assert body(prompt=prompt).generation.prompt == prompt
    assert body(prompt="123").generation.prompt == "123"
    assert parse_query(b"prompt=123", SERVICE).generation.prompt == "123"


SEED_RANGE = f"an integer between 0 and {SEEDS - 1}"
TIMEOUT_RANGE = "a number of seconds above 0 and at most 60"
BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "prompt must not be empty."),
    ({"prompt": " \n"}, "prompt", "prompt must not be empty."),
    ({"prompt": None}, "prompt", "prompt is required."),
    ({"prompt": 7}, "prompt", "prompt must be a string, got 7."),
    ({"prompt": ["a"]}, "prompt", "prompt must be a string, got an array."),
    ({"prompt": "x" * 21}, "prompt", "prompt must be at most 20 characters, got 21."),
    ({"prompt": "a\x00b"}, "prompt", "prompt must be text without control characters."),
    ({"prompt": "a\x1b[31m"}, "prompt", "prompt must be text without control characters."),
    ({"prompt": "\ud800"}, "prompt", "prompt must be text without control characters."),
    ({"negative_prompt": "x" * 21}, "negative_prompt", "negative_prompt must be at most 20 characters, got 21."),
    ({"negative_prompt": False}, "negative_prompt", "negative_prompt must be a string, got false."),
    ({"steps": 5}, "steps", f'Unknown field "steps"; the fields are {", ".join(BODY_FIELDS)}.'),
    ({"Prompt": "a"}, "Prompt", f'Unknown field "Prompt"; the fields are {", ".join(BODY_FIELDS)}.'),
    ({"model": "dall-e-2"}, "model", 'model must be tiny, got "dall-e-2".'),
    ({"size": "512x512"}, "size", 'size must be one of 128x128, 256x128, auto, got "512x512".'),
    ({"size": "128X128"}, "size", 'size must be one of 128x128, 256x128, auto, got "128X128".'),
    ({"size": 128}, "size", "size must be one of 128x128, 256x128, auto, got 128."),
    ({"size": {}}, "size", "size must be one of 128x128, 256x128, auto, got an object."),
    ({"sampler": "ddpm_solver"}, "sampler", f'sampler must be one of {", ".join(SAMPLERS)}, got "ddpm_solver".'),
    ({"sampler": ""}, "sampler", f'sampler must be one of {", ".join(SAMPLERS)}, got "".'),
    (
        {"num_inference_steps": 1},
        "num_inference_steps",
        "num_inference_steps must be an integer between 2 and 50, got 1.",
    ),
    (
        {"num_inference_steps": 51},
        "num_inference_steps",
        "num_inference_steps must be an integer between 2 and 50, got 51.",
    ),
    (
        {"num_inference_steps": 20.0},
        "num_inference_steps",
        "num_inference_steps must be an integer between 2 and 50, got 20.0.",
    ),
    (
        {"num_inference_steps": "20"},
        "num_inference_steps",
        'num_inference_steps must be an integer between 2 and 50, got "20".',
    ),
    *(
        (
            {"original_size": value},
            "original_size",
            f"original_size must be an array of two integers between 1 and 16384, got {shown}.",
        )
        for value, shown in (("64x64", '"64x64"'), ([64], "an array"), ([64, True], "an array"), ([0, 64], "an array"))
    ),
    ({"guidance_scale": 0.99}, "guidance_scale", "guidance_scale must be a number between 1 and 12.5, got 0.99."),
    ({"guidance_scale": 12.51}, "guidance_scale", "guidance_scale must be a number between 1 and 12.5, got 12.51."),
    ({"guidance_scale": True}, "guidance_scale", "guidance_scale must be a number between 1 and 12.5, got true."),
    ({"guidance_scale": "7"}, "guidance_scale", 'guidance_scale must be a number between 1 and 12.5, got "7".'),
    ({"seed": -1}, "seed", f"seed must be {SEED_RANGE}, got -1."),
    ({"seed": SEEDS}, "seed", f"seed must be {SEED_RANGE}, got {SEEDS}."),
    ({"seed": 1.5}, "seed", f"seed must be {SEED_RANGE}, got 1.5."),
    ({"seed": False}, "seed", f"seed must be {SEED_RANGE}, got false."),
    ({"n": 0}, "n", "n must be an integer between 1 and 3, got 0."),
    ({"n": 4}, "n", "n must be an integer between 1 and 3, got 4."),
    ({"n": True}, "n", "n must be an integer between 1 and 3, got true."),
    ({"response_format": "url"}, "response_format", 'response_format must be b64_json, got "url".'),
    ({"output_format": "gif"}, "output_format", 'output_format must be one of png, webp, jpeg, got "gif".'),
    ({"output_format": "jpg"}, "output_format", 'output_format must be one of png, webp, jpeg, got "jpg".'),
    (
        {"output_compression": 50},
        "output_compression",
        "output_compression below 100 needs output_format webp or jpeg: png loses nothing.",
    ),
    (
        {"output_format": "webp", "output_compression": 101},
        "output_compression",
        "output_compression must be an integer between 0 and 100, got 101.",
    ),
    ({"user": 3}, "user", "user must be a string, got 3."),
    ({"style": "oil"}, "style", 'style must be "vivid" or "natural", got "oil".'),
    ({"svg": {"model": "a"}}, "svg", "svg is not supported here; leave it out."),
    ({"safety_identifier": 3}, "safety_identifier", "safety_identifier must be a string, got 3."),
    ({"background": "transparent"}, "background", 'background must be "auto" or "opaque", got "transparent".'),
    ({"moderation": "high"}, "moderation", 'moderation must be "auto" or "low", got "high".'),
    ({"quality": "hd"}, "quality", 'quality must be "auto" or "standard", got "hd".'),
    ({"stream": 0}, "stream", "stream must be true or false, got 0."),
    ({"stream": "true"}, "stream", 'stream must be true or false, got "true".'),
    ({"stream": True, "n": 2}, "n", "n must be 1 where stream is true, got 2."),
    ({"partial_images": 1}, "partial_images", "partial_images needs stream to be true."),
    (
        {"stream": True, "partial_images": 3},
        "partial_images",
        "partial_images must be an integer between 0 and 2, got 3.",
    ),
    ({"partial_images": False}, "partial_images", "partial_images must be an integer between 0 and 2, got false."),
    ({"timeout": 0}, "timeout", f"timeout must be {TIMEOUT_RANGE}, got 0."),
    ({"timeout": -1.5}, "timeout", f"timeout must be {TIMEOUT_RANGE}, got -1.5."),
    ({"timeout": 60.5}, "timeout", f"timeout must be {TIMEOUT_RANGE}, got 60.5."),
    ({"timeout": True}, "timeout", f"timeout must be {TIMEOUT_RANGE}, got true."),
    ({"timeout": "5"}, "timeout", f'timeout must be {TIMEOUT_RANGE}, got "5".'),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_FIELDS, ids=[str(case[0])[:60] for case in BAD_FIELDS])
def test_a_bad_field_is_refused_by_name_and_range(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal_of_body(json.dumps({"prompt": "a", **fields}))
    assert (error.param, error.message) == (param, message)
    assert error.status == (404 if param == "model" else 400)


BAD_QUERIES: list[tuple[str | bytes, str | None, str]] = [
    ("", "prompt", "prompt is required."),
    ("prompt=", "prompt", "prompt must not be empty."),
    ("prompt", "prompt", "prompt must not be empty."),
    ("prompt=a&prompt=b", "prompt", 'Field "prompt" was given twice.'),
    ("prompt=a&seed=1&seed=2", "seed", 'Field "seed" was given twice.'),
    ("prompt=a&n=2", "n", f'Unknown field "n"; the fields are {", ".join(QUERY_FIELDS)}.'),
    ("prompt=a&quality=auto", "quality", f'Unknown field "quality"; the fields are {", ".join(QUERY_FIELDS)}.'),
    ("prompt=a&seed=", "seed", f'seed must be {SEED_RANGE}, got "".'),
    ("prompt=a&seed=abc", "seed", f'seed must be {SEED_RANGE}, got "abc".'),
    ("prompt=a&seed=1_000", "seed", f'seed must be {SEED_RANGE}, got "1_000".'),
    ("prompt=a&seed=%EF%BC%91", "seed", f'seed must be {SEED_RANGE}, got "\\uff11".'),
    ("prompt=a&seed=-1", "seed", f"seed must be {SEED_RANGE}, got -1."),
    ("prompt=a&seed=7.0", "seed", f"seed must be {SEED_RANGE}, got 7.0."),
    ("prompt=a&seed=" + "9" * 80, "seed", f'seed must be {SEED_RANGE}, got "{"9" * 56}....'),
    ("prompt=a&guidance_scale=nan", "guidance_scale", 'guidance_scale must be a number between 1 and 12.5, got "nan".'),
    ("prompt=a&guidance_scale=inf", "guidance_scale", 'guidance_scale must be a number between 1 and 12.5, got "inf".'),
    (
        "prompt=a&guidance_scale=1e999",
        "guidance_scale",
        "guidance_scale must be a number between 1 and 12.5, got Infinity.",
    ),
    ("prompt=a&timeout=0", "timeout", f"timeout must be {TIMEOUT_RANGE}, got 0."),
    ("prompt=a&timeout=soon", "timeout", f'timeout must be {TIMEOUT_RANGE}, got "soon".'),
    ("prompt=a&stream=true", "stream", f'Unknown field "stream"; the fields are {", ".join(QUERY_FIELDS)}.'),
    ("prompt=%ff", None, "The query string must be percent-encoded UTF-8."),
    (b"prompt=\xff", None, "The query string must be percent-encoded UTF-8."),
    (
        "prompt=" + "x" * 500,
        None,
        "The query string must be at most 500 bytes, got 507; POST /v1/images/generations takes more.",
    ),
    ("prompt=a" + "&b" * 120, None, "The query string has over 100 fields."),
]


@pytest.mark.parametrize(("query", "param", "message"), BAD_QUERIES, ids=[str(case[0])[:60] for case in BAD_QUERIES])
def test_a_bad_query_is_refused(query: str | bytes, param: str | None, message: str) -> None:
    error = refusal_of_query(query)
    assert (error.param, error.message) == (param, message)
    assert error.status == (414 if "at most 500 bytes" in message else 400)


BAD_BODIES: list[tuple[str | bytes, str]] = [
    ("", "The body is not JSON: Expecting value at line 1, column 1."),
    ("prompt=a", "The body is not JSON: Expecting value at line 1, column 1."),
    ('{"prompt": "a",}', "The body is not JSON: "),
    ('{"prompt": "a"} {}', "The body is not JSON: Extra data"),
    ('{"prompt": "a", "prompt": "b"}', 'Field "prompt" was given twice.'),
    ('{"prompt": "a", "guidance_scale": NaN}', "The body is not JSON: NaN is not a JSON number."),
    ('{"prompt": "a", "guidance_scale": -Infinity}', "The body is not JSON: -Infinity is not a JSON number."),
    ('{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale must be a number between 1 and 12.5, got Infinity."),
    (f'{{"prompt": "a", "guidance_scale": 1{"0" * 400}}}', "guidance_scale must be a number between 1 and 12.5"),
    (f'{{"prompt": "a", "seed": {"9" * 5000}}}', "The body is not JSON of a sensible shape."),
    ("[" * 30000, "The body is not JSON of a sensible shape."),
    ('{"a":' * 10000, "The body is not JSON of a sensible shape."),
    ("[]", "The body must be a JSON object, got an array."),
    ('"a"', 'The body must be a JSON object, got "a".'),
    ("null", "The body must be a JSON object, got null."),
    (b'{"prompt": "\xff"}', "The body must be JSON in UTF-8."),
    ('{"prompt": "a"}'.encode("utf-16"), "The body must be JSON in UTF-8."),
]


@pytest.mark.parametrize(("raw", "message"), BAD_BODIES, ids=[str(case[0])[:40] for case in BAD_BODIES])
def test_a_bad_body_is_refused(raw: str | bytes, message: str) -> None:
    error = refusal_of_body(raw)
    assert error.status == 400
    assert message in error.message
    assert len(error.message) < 300


def test_a_deep_array_that_the_parser_accepts_is_refused() -> None:
    error = refusal_of_body('{"prompt": ' + "[" * 500 + "]" * 500 + "}")
    assert error.message == "prompt must be a string, got an array."


def test_an_error_has_openais_shape_and_survives_pickling() -> None:
    error = refusal_of_body('{"prompt": "a", "n": 99}')
    again = pickle.loads(pickle.dumps(error))
    assert again.status == 400
    assert again.body() == {
        "error": {
            "message": "n must be an integer between 1 and 3, got 99.",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    }
    assert ApiError(503, "Later.", None, "queue_full", 2.5).body()["error"]["type"] == "server_error"


def test_an_invalid_field_names_the_field_its_code_and_its_status_and_survives_pickling() -> None:
    for fields, field, code, status in (
        ({"prompt": "a", "seed": -1}, "seed", "invalid_value", 400),
        ({"prompt": "a", "model": "other"}, "model", "model_not_found", 404),
        ({"prompt": "a", "colour": 1}, "colour", "unknown_parameter", 400),
        ({"seed": 1}, "prompt", "missing_required_parameter", 400),
    ):
        with pytest.raises(InvalidField) as caught:
            body(**fields)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.field, again.code, str(again)) == (field, code, str(caught.value))
        assert (api_error(again).param, api_error(again).status) == (field, status)


def test_the_message_to_a_replica_is_small() -> None:
    request = body(prompt="x" * 20, seed=1)
    assert pickle.loads(pickle.dumps(request)) == request
    assert len(pickle.dumps(request)) < 1000
