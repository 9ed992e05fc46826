"""POST /v1/images/edits: a form or JSON becomes a request with images, or a sentence on what is wrong."""

import asyncio
import base64
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent
from PIL import Image
from starlette.testclient import TestClient

from app.api import uploads
from app.api.images_in.decode import pixels_of
from app.api.images_in.headers import Header
from app.api.ingress import APIIngress
from app.api.messages import ImageRequest
from app.api.settings import Limits
from app.types import Capabilities, Edit, Generation, Pixels, Size
from tests.api.image_files import data_url, exif, file_of, gradient, mask_file, png
from tests.api.test_ingress import DESCRIPTION, SERVICE, Replicas, local_client, pictures, stream_of
from tests.api.test_sse import serving

LIMITS = SERVICE.limits.model_copy(
    update={"timeout_s": 30.0, "upload_bytes": 100_000, "input_pixels": 60_000, "input_images": 3}
)
PATIENT = replace(SERVICE, limits=LIMITS)
ROUTE = "/v1/images/edits"
SQUARE = file_of(gradient(128, 128))
BOX = (32, 16, 96, 80)
MASK = mask_file(128, 128, BOX)


def able(replicas: Replicas, **capabilities: Any) -> None:
    replicas.running = [replace(DESCRIPTION, capabilities=Capabilities(**capabilities))]


@pytest.fixture
def replicas() -> Replicas:
    replicas = Replicas()
    able(replicas, edits=True, masks=True)
    replicas.generate.outcome = lambda request: pictures(request)
    return replicas


@pytest.fixture
def client(replicas: Replicas) -> Iterator[TestClient]:
    with local_client(APIIngress(replicas, PATIENT)) as client:
        yield client


@pytest.fixture
def openai_client(replicas: Replicas) -> Iterator[OpenAI]:
    with serving(APIIngress(replicas, PATIENT)) as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def sent(replicas: Replicas) -> ImageRequest:
    (call,) = replicas.generate.calls
    request = call[0]
    assert isinstance(request, ImageRequest)
    return request


def edit(replicas: Replicas) -> tuple[Generation, Edit]:
    generation = sent(replicas).generation
    assert generation.edit is not None
    return generation, generation.edit


def form(client: TestClient, *files: tuple[str, bytes], **fields: Any) -> Any:
    parts = [(name, ("../../etc/passwd", content)) for name, content in files]
    return client.post(ROUTE, data={"prompt": "a blue boat"} | fields, files=parts)


def refusal(response: Any) -> tuple[int, str | None, str]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


def test_openais_client_edits_an_image(openai_client: OpenAI, replicas: Replicas) -> None:
    answer = openai_client.images.edit(
        image=SQUARE, prompt="a blue boat", n=2, extra_body={"seed": 7, "strength": 0.6, "num_inference_steps": 9}
    )
    generation, images = edit(replicas)
    assert answer.data is not None and [image.b64_json for image in answer.data] == [
        base64.b64encode(f"png {seed}".encode()).decode() for seed in (7, 8)
    ]
    assert (generation.prompt, generation.n, generation.num_inference_steps) == ("a blue boat", 2, 9)
    assert images.image is not None and np.array_equal(images.image, gradient(128, 128))
    assert (images.strength, images.mask, images.references) == (0.6, None, ())


def test_openais_client_edits_within_a_mask(openai_client: OpenAI, replicas: Replicas) -> None:
    openai_client.images.edit(image=("boat.png", SQUARE), mask=("mask.png", MASK), prompt="a blue boat")
    mask = edit(replicas)[1].mask
    expected = np.zeros((128, 128), bool)
    expected[16:80, 32:96] = True
    assert mask is not None and np.array_equal(mask, expected)
    assert edit(replicas)[1].strength == Capabilities().mask_strength == 1.0


def test_openais_client_sends_several_images_to_a_model_that_looks_at_them(
    openai_client: OpenAI, replicas: Replicas
) -> None:
    able(replicas, references=3, edits=True, masks=True)
    wide = file_of(gradient(200, 100), "JPEG", quality=95)
    openai_client.images.edit(image=[SQUARE, wide], prompt="both")
    _, images = edit(replicas)
    assert images.image is None and [image.shape for image in images.references] == [(128, 128, 3), (128, 256, 3)]
    replicas.generate.calls.clear()
    openai_client.images.edit(image=[SQUARE, wide], mask=MASK, prompt="both")
    _, images = edit(replicas)
    assert images.image is not None and images.mask is not None and len(images.references) == 1
    assert edit(replicas)[0].references == 2  # the one that it begins from is looked at too


def test_openais_client_gets_previews_of_an_edit(openai_client: OpenAI, replicas: Replicas) -> None:
    replicas.generate_stream.outcome = stream_of
    stream = openai_client.images.edit(image=SQUARE, prompt="a", stream=True, partial_images=2, extra_body={"seed": 7})
    first, second, last = [*stream]
    assert isinstance(first, ImageEditPartialImageEvent) and isinstance(second, ImageEditPartialImageEvent)
    assert isinstance(last, ImageEditCompletedEvent) and base64.b64decode(last.b64_json) == b"png 7"
    assert (last.size, last.to_dict()["image_size"]) == ("128x128", "128x128")


def test_openais_client_reads_a_refusal(openai_client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        openai_client.images.edit(image=SQUARE[:-20], prompt="a")
    assert (caught.value.param, caught.value.code) == ("image", "invalid_image")
    assert "image is truncated: it ends before its picture does." in str(caught.value)


def test_json_brings_images_as_data_urls(client: TestClient, replicas: Replicas) -> None:
    links = {"images": [{"image_url": data_url(SQUARE)}], "mask": {"image_url": data_url(MASK)}}
    response = client.post(ROUTE, json={"prompt": "a", "strength": 1, "n": 2} | links)
    assert response.status_code == 200
    generation, images = edit(replicas)
    assert generation.n == 2 and images.strength == 1.0 and images.mask is not None
    assert images.image is not None and np.array_equal(images.image, gradient(128, 128))


def test_the_answer_says_what_was_done_to_the_image(client: TestClient, replicas: Replicas) -> None:
    def done(file: bytes, **fields: Any) -> tuple[str, str, str]:
        replicas.generate.calls.clear()
        answer = form(client, ("image", file), **fields).json()
        return answer["size"], answer["image_size"], answer["image_fit"]

    assert done(SQUARE) == ("128x128", "128x128", "as it is")
    assert done(file_of(gradient(300, 150))) == ("256x128", "300x150", "scaled to 256x128")
    turned = file_of(gradient(100, 160), "JPEG", exif=exif(6))
    assert done(turned, size="auto") == ("256x128", "160x100", "scaled to 256x160, cropped to the middle 256x128")
    assert done(turned, size="128x128") == ("128x128", "160x100", "scaled to 205x128, cropped to the middle 128x128")


def test_the_text_of_a_form_spells_values(client: TestClient, replicas: Replicas) -> None:
    fields = {
        **{"seed": "7", "n": "2", "guidance_scale": "3.5", "stream": "false", "size": "256x128", "strength": "0.25"},
        **{"output_format": "webp", "negative_prompt": "", "timeout": "", "sampler": "euler", "user": "12"},
    }
    assert form(client, ("image[]", SQUARE), **fields).status_code == 200
    generation, images = edit(replicas)
    assert (generation.seed, generation.n, generation.guidance_scale, generation.sampler) == (7, 2, 3.5, "euler")
    assert (generation.width, images.strength, sent(replicas).encoding.output_format) == (256, 0.25, "webp")


@pytest.mark.parametrize(
    ("files", "fields", "param", "problem"),
    [
        ([], {}, "image", "image is required."),
        ([("image", b"")], {}, "image", "image is empty."),
        ([("image", b"%PDF-1.4")], {}, "image", "image must be a PNG, JPEG or WebP file."),
        ([("image", png(40, 40, data=b"x"))], {}, "image", "is truncated or corrupt"),
        ([("image", png(400, 400))], {}, "image", "image must have at most 60000 pixels, got 400x400."),
        ([("image", SQUARE), ("mask", b"GIF89a")], {}, "mask", "mask must be a PNG, JPEG or WebP file."),
        ([("image", SQUARE), ("mask", SQUARE)], {}, "mask", "mask must have an alpha channel"),
        ([("image", SQUARE), ("mask", mask_file(64, 64, (0, 0, 9, 9)))], {}, "mask", "128x128, got 64x64."),
        ([("image", SQUARE), ("mask", MASK), ("mask", MASK)], {}, "mask", "Field mask was given twice."),
        ([("image", SQUARE), ("image[]", SQUARE)], {}, "image", "image must be at most 1 image for this model, got 2."),
        ([("image", SQUARE), ("picture", SQUARE)], {}, "picture", "picture must be text in UTF-8."),
        ([("image", SQUARE)], {"strength": "0"}, "strength", "strength must be a number above 0 and at most 1, got 0."),
        ([("image", SQUARE)], {"size": "100x100"}, "size", "size must be one of 128x128, 256x128, auto"),
        ([("image", SQUARE)], {"colour": "red"}, "colour", 'Unknown field "colour"'),
        ([("image", SQUARE)], {"stream": "yes"}, "stream", "stream must be true or false"),
        ([("image", SQUARE)], {"input_fidelity": "high"}, "input_fidelity", "input_fidelity must be"),
        ([("image", SQUARE)], {"markup": "x"}, "markup", "markup is not supported here"),
    ],
)
def test_what_is_wrong_with_a_form_is_named(
    client: TestClient, files: list[tuple[str, bytes]], fields: dict[str, str], param: str, problem: str
) -> None:
    response = client.post(ROUTE, data={"prompt": "a"} | fields, files=[(name, ("a", file)) for name, file in files])
    if not files:
        response = client.post(ROUTE, data={"prompt": "a"}, files={"user": (None, "me")})
    status, field, message = refusal(response)
    assert (status, field) == (400, param) and problem in message


@pytest.mark.parametrize(
    ("body", "param", "problem"),
    [
        ({"images": "a"}, "images", "images must be an array of objects"),
        ({"images": ["data:image/png;base64,AAAA"]}, "images", "images must be an object"),
        ({"images": [{"file_id": "file-1"}]}, "images", "images must be an object"),
        ({"images": [{"image_url": "file:///etc/passwd"}]}, "images", "images must be a data: URL"),
        ({"images": [{"image_url": "data:image/png;base64,!"}]}, "images", "no valid base64"),
        ({"images": [{"image_url": "data:image/png,abc"}]}, "images", "images must be a data: URL"),
        ({"images": [{"image_url": "http://169.254.169.254/"}]}, "images", "169.254.169.254"),
        ({"images": [{"image_url": data_url(SQUARE)}], "mask": "a"}, "mask", "mask must be an object"),
        ({"images": []}, "image", "image is required"),
        ({"image": data_url(SQUARE)}, "image", "in JSON it is images"),
    ],
)
def test_what_is_wrong_with_json_is_named(client: TestClient, body: dict[str, Any], param: str, problem: str) -> None:
    status, field, message = refusal(client.post(ROUTE, json={"prompt": "a"} | body))
    assert (status, field) == (400, param) and problem in message


@pytest.mark.parametrize(
    ("capabilities", "files", "fields", "problem"),
    [
        ({}, [("image", SQUARE)], {}, "takes no images"),
        ({"edits": True}, [("image", SQUARE), ("mask", MASK)], {}, "mask is not something this model takes"),
        ({"references": 2}, [("image", SQUARE)], {"strength": "0.5"}, "strength is not something this model takes"),
        ({"references": 2}, [("image", SQUARE)] * 3, {}, "image must be at most 2 images for this model, got 3."),
        (
            {"edits": True, "masks": True, "references": 2},
            [*[("image", SQUARE)] * 3, ("mask", MASK)],
            {},
            "image must be at most 2 images for this model, got 3.",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_the_reason(
    replicas: Replicas,
    client: TestClient,
    capabilities: dict[str, Any],
    files: list[tuple[str, bytes]],
    fields: dict[str, str],
    problem: str,
) -> None:
    able(replicas, **capabilities)
    status, _, message = refusal(form(client, *files, **fields))
    assert status == 400 and problem in message and not replicas.generate.calls
    (model,) = client.get("/v1/models").json()["data"]
    assert model["capabilities"] == vars(Capabilities(**capabilities))


def test_a_body_has_limits_of_its_own(client: TestClient) -> None:
    small = SERVICE.limits.body_bytes
    assert form(client, ("image", SQUARE), user="a" * small).status_code == 200
    response = form(client, ("image", bytes(LIMITS.upload_bytes)))
    assert refusal(response) == (413, None, "The body must be at most 100000 bytes.")
    assert client.post("/v1/images/generations", json={"prompt": "a" * small}).status_code == 413
    for kind in ("text/plain", "application/json; charset=latin-1", ""):
        assert client.post(ROUTE, content=b"a", headers={"content-type": kind}).status_code == 415


@pytest.mark.parametrize(
    ("kind", "body", "problem"),
    [
        ("multipart/form-data", b"a", "must name the boundary"),
        ("multipart/form-data; boundary=a", b"", "ends before its last boundary"),
        ("multipart/form-data; boundary=a", b"--b\r\n", "malformed"),
        ("multipart/form-data; boundary=a", b'--a\r\nContent-Disposition: form-data; name="b"\r\n\r\nc', "ends before"),
        ("multipart/form-data; boundary=a", b"--a\r\nX: y\r\n\r\nc\r\n--a--\r\n", "part 1 has no name"),
        ("multipart/form-data; boundary=a", b"--a\r\n" + b"X: y\r\n" * 9 + b"\r\n", "malformed"),
        ("multipart/form-data; boundary=a", b"--a\r\nX: " + b"y" * 3000 + b"\r\n\r\n", "malformed"),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\nContent-Disposition: form-data; name="b"\r\n\r\n\r\n' * 101,
            "over 100 parts",
        ),
    ],
)
def test_a_form_that_is_none_is_refused(client: TestClient, kind: str, body: bytes, problem: str) -> None:
    response = client.post(ROUTE, content=body, headers={"content-type": kind})
    assert response.status_code == 400 and problem in response.json()["error"]["message"]


def test_images_are_decoded_in_few_threads_of_their_own(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = set[str]()

    def noted(header: Header, size: Size) -> Pixels:
        decoders.add(threading.current_thread().name)
        return pixels_of(header, size)

    monkeypatch.setattr("app.api.edits.pixels_of", noted)
    for _ in range(5):
        assert form(client, ("image", SQUARE)).status_code == 200
    assert decoders and decoders <= {f"decode_{number}" for number in range(uploads.DECODED_AT_ONCE)}


def test_bodies_wait_for_a_place_and_not_for_ever(monkeypatch: pytest.MonkeyPatch, replicas: Replicas) -> None:
    monkeypatch.setattr(uploads, "BYTES", 100_000)
    service = replace(PATIENT, limits=Limits(upload_bytes=100_000, timeout_s=0.3))

    async def full() -> None:
        await ingress.uploads.places.acquire()

    ingress = APIIngress(replicas, service)
    with local_client(ingress) as client:
        assert form(client, ("image", SQUARE)).status_code == 200
        asyncio.run(full())
        response = form(client, ("image", SQUARE))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert response.headers["retry-after"] == "2"
        ingress.uploads.places.release()
        assert form(client, ("image", SQUARE)).status_code == 200


def test_an_image_is_upright_and_flattened_where_the_model_sees_it(client: TestClient, replicas: Replicas) -> None:
    image = Image.fromarray(gradient(128, 128)).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 128, 64))
    form(client, ("image", file_of(image, exif=exif(3))))
    pixels = edit(replicas)[1].image
    assert pixels is not None and (pixels[64:] == 255).all()
    assert np.array_equal(pixels[:64], np.rot90(gradient(128, 128), 2)[:64])


def test_an_edit_waits_for_a_replica_that_says_what_it_can(client: TestClient, replicas: Replicas) -> None:
    description = replicas.running[0]
    replicas.running = []
    replicas.describe.outcome = lambda: description
    assert form(client, ("image", SQUARE)).status_code == 200 and len(replicas.describe.calls) == 1
