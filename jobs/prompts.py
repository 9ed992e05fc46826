"""A file of prompts, row by row, as requests to the model of a config.

What makes a row's pictures also makes its key: the resolved request and what the model's folder holds. A row without a
seed gets one that follows from the row itself, so that the same file gives the same pictures, whichever rows stand
around it.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from app.api import prompt_files
from app.api.prompt_files import Fields
from app.api.protocol import QUERY_FIELDS, resolve
from app.api.settings import Encoding
from app.types import SEEDS, Generation, InvalidField
from cluster.cli import UsageError
from jobs.settings import Settings

FIELDS = (*(name for name in QUERY_FIELDS if name != "timeout"), "model", "n")


@dataclasses.dataclass(frozen=True)
class Row:
    number: int  # in the file, from 1
    key: str
    generation: Generation
    encoding: Encoding

    @classmethod
    def of(cls, settings: Settings, number: int, generation: Generation, encoding: Encoding, occurrence: int) -> "Row":
        """What a default fills in counts as if the row said it, so a changed default makes another picture."""
        facts = [settings.identity, dataclasses.asdict(generation), encoding.model_dump(), occurrence]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return cls(number, key, generation, encoding)

    @property
    def record(self) -> str:
        return f"rows/{self.key}.json"

    @property
    def made(self) -> list[str]:
        """All that is there when it is finished; the record comes last."""
        return [*self.files, self.record]

    @property
    def files(self) -> list[str]:
        """Of its pictures, below the output folder. Nothing in them is the user's to choose."""
        return [f"images/{self.key}-{i}.{self.encoding.output_format}" for i in range(self.generation.n)]


@dataclasses.dataclass(frozen=True)
class Bad:
    number: int
    prompt: str
    error: str


def read(file: Path, settings: Settings) -> Iterator[Row | Bad]:
    """Raises UsageError where the file as a whole is none of these; what is wrong with one row is said of that row."""
    spelled: Counter[str] = Counter()
    meant: Counter[tuple[Generation, Encoding]] = Counter()
    for number, given in enumerate(entries(file), start=1):
        if isinstance(given, str):
            yield Bad(number, "", given)
            continue
        given = {name: value for name, value in given.items() if value is not None}
        prompt = str(given.get("prompt", ""))
        try:
            # A row without a seed gets one by how it is spelled, whatever the defaults are; its second copy another.
            text = json.dumps(given, sort_keys=True)
            spelled[text] += 1
            digest = hashlib.sha256(f"{text} {spelled[text]}".encode())
            request = resolve({"seed": int.from_bytes(digest.digest()[:4]) % SEEDS, **given}, settings.service, FIELDS)
        except (InvalidField, TypeError) as error:
            yield Bad(
                number, prompt, error.message if isinstance(error, InvalidField) else f"not a row of fields: {error}"
            )
            continue
        # Rows may be spelled differently and ask for the same pictures: each is a row, with files of its own.
        meaning = request.generation, request.encoding
        meant[meaning] += 1
        yield Row.of(settings, number, *meaning, meant[meaning])


def entries(file: Path) -> Iterator[Fields | str]:
    try:
        yield from (entry.fields for entry in prompt_files.read(file))
    except prompt_files.BadFile as error:
        raise UsageError(f"--prompts: {error}") from None
