"""Reads the rows of a prompts file as requests to the model of a config.

A row's key is a hash of all that its pictures depend on: the resolved request and the model. A row without a seed gets
one that depends on the row alone, so the same file always gives the same pictures. A row may begin from an image.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from app.api import prompt_files
from app.api.prompt_files import Fields
from app.api.protocol import QUERY_FIELDS, SIZE_FIELDS, resolve
from app.api.settings import Encoding
from app.types import SEEDS, Generation, InvalidField
from cluster.cli import UsageError
from jobs.replica_config import ReplicaConfig
from jobs.row_images import RowImages

ROW_FIELDS = (*(name for name in QUERY_FIELDS if name != "timeout"), *SIZE_FIELDS, "model", "n")


@dataclasses.dataclass(frozen=True)
class Row:
    number: int  # in the file, from 1
    key: str
    generation: Generation  # without the image that it begins from
    encoding: Encoding
    images: RowImages | None = None

    @classmethod
    def of(
        cls,
        config: ReplicaConfig,
        number: int,
        generation: Generation,
        encoding: Encoding,
        occurrence: int,
        images: RowImages | None = None,
    ) -> "Row":
        """The key covers values that defaults filled in, so a changed default makes another picture."""
        facts = [config.identity, dataclasses.asdict(generation), encoding.model_dump(), occurrence]
        facts += [images.digest] if images else []
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return cls(number, key, generation, encoding, images)

    @property
    def record(self) -> str:
        return f"rows/{self.key}.json"

    @property
    def made(self) -> list[str]:
        """All files of a finished row. The record is written last."""
        return [*self.files, self.record]

    @property
    def files(self) -> list[str]:
        """Its pictures, relative to the output folder. No part of these names comes from the user."""
        return [f"images/{self.key}-{i}.{self.encoding.output_format}" for i in range(self.generation.n)]


@dataclasses.dataclass(frozen=True)
class InvalidRow:
    number: int
    prompt: str
    error: str


def read(file: Path, config: ReplicaConfig) -> Iterator[Row | InvalidRow]:
    """Yields each row, or what is wrong with it. Raises UsageError if the file as a whole cannot be read."""
    texts: Counter[str] = Counter()
    requests: Counter[str] = Counter()
    for number, entry in enumerate(entries(file), start=1):
        if isinstance(entry, str):
            yield InvalidRow(number, "", entry)
            continue
        fields = {name: value for name, value in entry.items() if value is not None}
        prompt = str(fields.get("prompt", ""))
        try:
            images, fields = RowImages.of(fields, file.parent, config.service)
            # The seed of a row without one depends on its text, not on defaults. A second copy gets another seed.
            text = json.dumps([fields, images.digest] if images else fields, sort_keys=True)
            texts[text] += 1
            digest = hashlib.sha256(f"{text} {texts[text]}".encode())
            request = resolve(
                {"seed": int.from_bytes(digest.digest()[:4]) % SEEDS, **fields}, config.service, ROW_FIELDS
            )
        except (InvalidField, TypeError) as error:
            yield InvalidRow(
                number, prompt, error.message if isinstance(error, InvalidField) else f"not a row of fields: {error}"
            )
            continue
        # Two rows of different text can resolve to the same request. Each has files of its own.
        resolved = repr((request.generation, request.encoding, images and images.digest))
        requests[resolved] += 1
        yield Row.of(config, number, request.generation, request.encoding, requests[resolved], images)


def entries(file: Path) -> Iterator[Fields | str]:
    try:
        yield from (entry.fields for entry in prompt_files.read(file))
    except prompt_files.BadFile as error:
        raise UsageError(f"--prompts: {error}") from None
