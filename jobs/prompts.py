"""A file of prompts, row by row, as requests: text, CSV, JSON lines or Parquet, with any of the API's fields.

What makes a row's pictures also makes its key: the resolved request and what the model's folder holds. A row without a
seed gets one that follows from the row itself, so that the same file gives the same pictures, whichever rows stand
around it.
"""

import csv
import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.protocol import NUMERIC_FIELDS, QUERY_FIELDS, SEEDS, ApiError, Encoding, Generation, literal, resolve
from jobs.entry import Invalid
from jobs.settings import Settings

FORMATS = (".txt", ".csv", ".jsonl", ".parquet")
FIELDS = (*(name for name in QUERY_FIELDS if name != "timeout"), "model", "n")
NUMBERS = (*NUMERIC_FIELDS, "n")


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
    """Raises Invalid where the file as a whole is none of these; what is wrong with one row is said of that row."""
    spelled: Counter[str] = Counter()
    meant: Counter[tuple[Generation, Encoding]] = Counter()
    for number, given in enumerate(rows(file), start=1):
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
        except (ApiError, TypeError) as error:
            yield Bad(number, prompt, error.message if isinstance(error, ApiError) else f"not a row of fields: {error}")
            continue
        # Rows may be spelled differently and ask for the same pictures: each is a row, with files of its own.
        meaning = request.generation, request.encoding
        meant[meaning] += 1
        yield Row.of(settings, number, *meaning, meant[meaning])


def rows(file: Path) -> Iterator[Mapping[str, Any] | str]:
    """Fields by name; or what is wrong with the row."""
    readers = {".txt": lines_of, ".csv": csv_of, ".jsonl": jsonl_of, ".parquet": parquet_of}
    if file.suffix not in readers:
        raise Invalid(f"--prompts must end in one of {', '.join(FORMATS)}, got {file}.")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise Invalid(f"--prompts: {file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise Invalid(f"--prompts: {file} must be in UTF-8.") from None


def lines_of(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig") as opened:
        for line in opened:
            if line.strip():
                yield {"prompt": line.rstrip("\n")}


def csv_of(file: Path) -> Iterator[Mapping[str, Any] | str]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened)
        if "prompt" not in (reader.fieldnames or ()):
            raise Invalid(f"--prompts: the first line of {file} must name the columns, prompt among them.")
        try:
            for row in reader:
                if None in row or None in row.values():
                    yield f"it must have {len(reader.fieldnames or ())} columns, as the first line says."
                    continue
                given = {name: text for name, text in row.items() if text}  # an empty cell is left out
                yield {name: literal(text) if name in NUMBERS else text for name, text in given.items()}
        except csv.Error as error:
            raise Invalid(f"--prompts: {file} is no CSV in line {reader.line_num}: {error}.") from None


def jsonl_of(file: Path) -> Iterator[Mapping[str, Any] | str]:
    with file.open(encoding="utf-8-sig") as opened:
        for line in opened:
            if not line.strip():
                continue
            try:
                given = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"it is not JSON: {error}."
                continue
            yield given if isinstance(given, dict) else "it must be a JSON object."


def parquet_of(file: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            if "prompt" not in opened.schema_arrow.names:
                raise Invalid(f"--prompts: {file} must have a column prompt.")
            for batch in opened.iter_batches():
                for row in batch.to_pylist():
                    yield {name: whole(value) if name in NUMBERS else value for name, value in row.items()}
    except pyarrow.ArrowException as error:
        raise Invalid(f"--prompts: {file} is no Parquet: {error}.") from None


def whole(value: object) -> object:
    """A column of integers some of which are missing is often saved as one of floats, with NaN for those."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value
