"""Parses the body of POST /v1/images/edits into an ImageRequest with images. Knows nothing of HTTP libraries or Ray.

`parse_edit` decodes images, so the caller runs it in a thread.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from app.api.fields import invalid, model
from app.api.images_in.decode import mask_of, pixels_of
from app.api.images_in.form import Part, parse_form
from app.api.images_in.headers import BadImage, Header, read_header
from app.api.images_in.sizes import fit, nearest_size
from app.api.messages import ImageRequest
from app.api.prompt_files import cell_value
from app.api.protocol import EDIT_FIELDS, parse_json, resolve, unique
from app.api.settings import Service
from app.types import Edit, InvalidField, Pixels, Size, parse_size

FLAGS = ("async", "progress", "stream")
FORM_IMAGE = re.compile(r"image(\[\d{0,2}\])?")  # `image[]` and `image[0]` name one of several
DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w=.+-]+)*;base64,", re.ASCII)


class Source(NamedTuple):
    """An image of a request: its bytes, or the URL where they are."""

    field: str
    content: bytes | str


@dataclass(frozen=True)
class EditBody:
    values: Mapping[str, object]  # of the other fields
    images: tuple[Source, ...]
    mask: Source | None = None

    def begins(self, service: Service) -> bool:
        """Whether the first image is the one to begin from. Where a model takes reference images, all are such, unless
        a mask or a strength asks for a beginning."""
        able = service.capabilities
        return able.edits and not (able.references and self.mask is None and self.values.get("strength") is None)


def read_edit(body: bytes, content_type: str) -> EditBody:
    """Of a form or of JSON. Raises ApiError or InvalidField."""
    media_type = content_type.partition(";")[0].strip().lower()
    return of_form(parse_form(body, content_type)) if media_type == "multipart/form-data" else of_json(parse_json(body))


def of_form(parts: Sequence[Part]) -> EditBody:
    images = tuple(Source("image", part.content) for part in parts if FORM_IMAGE.fullmatch(part.name))
    masks = [Source("mask", part.content) for part in parts if part.name == "mask"]
    if len(masks) > 1:
        raise InvalidField("mask", "Field mask was given twice.", "duplicate_parameter")
    texts = [part for part in parts if not FORM_IMAGE.fullmatch(part.name) and part.name != "mask"]
    values = unique([(part.name, form_value(part)) for part in texts])
    return EditBody(values, images, masks[0] if masks else None)


def form_value(part: Part) -> object:
    """A form has text only, so text that spells the value of a field is that value. Empty, the field is left out."""
    try:
        text = part.content.decode()
    except UnicodeDecodeError:
        raise InvalidField(part.name, f"{part.name} must be text in UTF-8.", "invalid_encoding") from None
    if part.name in FLAGS:
        return {"true": True, "false": False, "": None}.get(text.lower(), text)
    return None if not text and part.name != "prompt" else cell_value(part.name, text)


def of_json(values: Mapping[str, object]) -> EditBody:
    entries = [] if values.get("images") is None else values["images"]
    if "image" in values:
        raise InvalidField("image", "image is a field of a form; in JSON it is images, an array.", "unknown_parameter")
    if not isinstance(entries, list):
        raise invalid("images", 'an array of objects such as {"image_url": "data:image/png;base64,..."}', entries)
    images = tuple(Source("images", content_of("images", entry)) for entry in entries)
    mask = None if values.get("mask") is None else Source("mask", content_of("mask", values["mask"]))
    rest = {name: value for name, value in values.items() if name not in ("images", "mask")}
    return EditBody(rest, images, mask)


def content_of(field: str, entry: object) -> bytes | str:
    """The bytes of a data: URL, or an http: URL."""
    if not isinstance(entry, dict) or set(entry) != {"image_url"} or not isinstance(entry["image_url"], str):
        raise invalid(field, 'an object {"image_url": "data:image/png;base64,..."}', entry)
    url = entry["image_url"]
    if url.startswith(("http://", "https://")):
        return url
    start = DATA_URL.match(url)
    if start is None:
        raise invalid(field, "a data: URL in base64, or a URL of http or https", url)
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidField(field, f"{field} has a data: URL that is no valid base64.") from None


def parse_edit(body: EditBody, service: Service) -> ImageRequest:
    """Checks the fields, chooses the size and decodes the images. URLs must have been fetched. Raises InvalidField."""
    model("model", body.values.get("model", service.model), service)  # before the others: they may be for another one
    check_able(body, service)
    headers = [header_of(source, service) for source in body.images]
    mask = None if body.mask is None else header_of(body.mask, service)
    if mask and mask.size != headers[0].size:
        sizes = "{}x{}, got {}x{}".format(*headers[0].size, *mask.size)
        raise InvalidField("mask", f"mask must have the size of the image, {sizes}.", "invalid_image_size")
    values = dict(body.values)
    if values.get("size") in (None, "auto"):
        values["size"] = nearest_size(headers[0].size, service.sizes)
    request = resolve(values, service, EDIT_FIELDS)
    size = request.generation.width, request.generation.height
    edit = edit_of(body, headers, mask, size, service)
    facts = {"image_size": "{}x{}".format(*headers[0].size), "image_fit": fit(headers[0].size, size)}
    references = len(service.capabilities.looked_at(edit))
    return replace(request, generation=replace(request.generation, edit=edit, references=references), facts=facts)


def edit_of(body: EditBody, headers: Sequence[Header], mask: Header | None, size: Size, service: Service) -> Edit:
    """`resolve` has checked the strength."""
    able, begins, strength = service.capabilities, body.begins(service), body.values.get("strength")
    if strength is None and begins:
        strength = able.strength if mask is None else able.mask_strength
    assert strength is None or isinstance(strength, int | float)
    sources = [*zip(body.images, headers, strict=True)]
    first, references = (sources[:1], sources[1:]) if begins else ([], sources)
    images = [decoded(source, header, size) for source, header in first]
    try:
        redrawn = None if mask is None else mask_of(mask, size)
    except BadImage as error:
        raise InvalidField("mask", f"mask {error}.", "invalid_image") from None
    looked_at = [
        decoded(source, header, parse_size(nearest_size(header.size, service.sizes))) for source, header in references
    ]
    return Edit(images[0] if images else None, redrawn, None if strength is None else float(strength), (*looked_at,))


def decoded(source: Source, header: Header, size: Size) -> Pixels:
    try:
        return pixels_of(header, size)
    except BadImage as error:
        raise InvalidField(source.field, f"{source.field} {error}.", "invalid_image") from None


def check_able(body: EditBody, service: Service) -> None:
    """Refuses what this model cannot do, before any image is looked at."""
    able = service.capabilities
    if not able.edits and not able.references:
        message = "This server takes no images: it generates from prompts alone, as GET /v1/models says."
        raise InvalidField("image", message, "unsupported_parameter")
    if not body.images:
        raise InvalidField("image", "image is required.", "missing_required_parameter")
    if body.mask and not able.masks:
        raise InvalidField("mask", "mask is not something this model takes; leave it out.", "unsupported_parameter")
    if body.values.get("strength") is not None and not able.edits:
        message = "strength is not something this model takes: it looks at images and begins from none; leave it out."
        raise InvalidField("strength", message, "unsupported_parameter")
    field, most = body.images[0].field, min(service.limits.input_images, max(able.references, int(able.edits)))
    if len(body.images) > most:
        rule = f"{field} must be at most {most} image{'s' * (most > 1)} for this model"
        raise InvalidField(field, f"{rule}, got {len(body.images)}.")


def header_of(source: Source, service: Service) -> Header:
    assert isinstance(source.content, bytes), "URLs have been fetched"
    try:
        header = read_header(source.content)
    except BadImage as error:
        raise InvalidField(source.field, f"{source.field} {error}.", "invalid_image") from None
    width, height = header.size
    if width * height > (most := service.limits.input_pixels):
        message = f"{source.field} must have at most {most} pixels, got {width}x{height}."
        raise InvalidField(source.field, message, "invalid_image_size")
    return header
