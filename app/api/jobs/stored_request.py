"""A request as it stands in the database: JSON, and the images in it as files of their own. Never a pickle."""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from app.api.messages import ImageRequest
from app.api.settings import Encoding
from app.types import Edit, Generation

UPLOAD = "upload"  # the key of an object that stands for an array: its number among the uploads


def dump(request: ImageRequest) -> tuple[str, list[bytes]]:
    """The JSON, and the arrays that it refers to as files in numpy's format."""
    uploads: list[bytes] = []

    def plain(value: object) -> object:
        if isinstance(value, BaseModel):
            return value.model_dump()
        if isinstance(value, np.ndarray):
            file = io.BytesIO()
            np.save(file, value, allow_pickle=False)
            uploads.append(file.getvalue())
            return {UPLOAD: len(uploads) - 1}
        assert dataclasses.is_dataclass(value) and not isinstance(value, type), type(value)
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

    return json.dumps(request, default=plain), uploads


def load(text: str, uploads: Sequence[bytes]) -> ImageRequest:
    """Leaves out what this program does not know any more; what is new to it has its default."""

    def resolve(value: dict[str, Any]) -> Any:
        if value.keys() != {UPLOAD}:
            return value
        return np.load(io.BytesIO(uploads[value[UPLOAD]]), allow_pickle=False)

    values = json.loads(text, object_hook=resolve)
    generation = values["generation"]
    generation["fields"] = tuple((name, tuple(pair)) for name, pair in generation["fields"])
    if edit := generation.get("edit"):
        edit["references"] = tuple(edit["references"])
        generation["edit"] = Edit(**known(Edit, edit))
    values["generation"] = Generation(**known(Generation, generation))
    values["encoding"] = Encoding(**{name: values["encoding"][name] for name in Encoding.model_fields})
    return ImageRequest(**known(ImageRequest, values))


def known(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}
