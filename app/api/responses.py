"""The bodies and headers of successful answers. Errors are in error_responses.py, streams in sse.py."""

import base64
import json
import time
from collections.abc import Sequence

from starlette.responses import Response

from app.api.messages import Description, ImageRequest, Images, fact_text
from app.api.settings import Service


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """In ASCII, which can quote any Unicode that a client has sent."""
    return Response(json.dumps(body), status, headers, "application/json")


def image_response(images: Images, request: ImageRequest) -> Response:
    """The file itself, with the facts and timings as headers."""
    headers = {f"X-{name.replace('_', '-').title()}": fact_text(fact) for name, fact in images.facts.items()}
    timings = [f"{name.removesuffix('_s')};dur={1000 * seconds:.1f}" for name, seconds in images.timings.items()]
    headers |= {"Server-Timing": ", ".join(timings), "Cache-Control": "no-store"}
    return Response(images.encoded[0], media_type=f"image/{request.encoding.output_format}", headers=headers)


def images_response(images: Images, request: ImageRequest, model: str, urls: Sequence[str] = ()) -> Response:
    """OpenAI's object, and the facts and timings in it. With `urls` of the images, these stand in place of them."""
    contents = [{"url": url} for url in urls] or [
        {"b64_json": base64.b64encode(file).decode()} for file in images.encoded
    ]
    data = [{**content, "seed": seed} for content, seed in zip(contents, images.seeds, strict=True)]
    body = {
        "created": int(time.time()),
        "data": data,
        "model": images.model or model,
        "output_format": request.encoding.output_format,
        **request.facts,
        **images.facts,
        "timings": images.timings,
    }
    return json_response(body)


def model_object(service: Service, description: Description, created: int) -> dict[str, object]:
    """OpenAI's object, and what a request to this model may contain."""
    defaults = service.defaults.model_dump() | service.encoding.model_dump()
    return {
        "id": service.model,
        "object": "model",
        "created": created,
        "owned_by": "imagine-tpu",
        "aliases": service.aliases,
        "sizes": service.sizes,
        "samplers": description.samplers,
        "capabilities": vars(description.capabilities),
        "fields": description.fields,
        "qualities": service.qualities,
        "notes": [*description.notes, *service.notes],
        "limits": service.limits.model_dump(),
        "defaults": defaults
        | {"sampler": service.defaults.sampler or description.default_sampler, "size": service.sizes[0]},
    }
