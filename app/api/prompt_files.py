"""Reads a file of prompts row by row: text, CSV, JSON lines or Parquet. A row is a mapping of field names to values.

The jobs and the load test use it. It does not check the values, and knows nothing of JAX or Ray. Files are in UTF-8,
with or without a byte order mark. Lines end with LF, CRLF or CR; a line separator such as U+2028 is text.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from app.api.fields import literal
from app.api.protocol import NUMERIC_FIELDS, SIZE_FIELDS

Fields = Mapping[str, Any]


class BadFile(ValueError):
    """The whole file cannot be read. The message names the file."""


class Entry(NamedTuple):
    line: int  # in Parquet, the row
    fields: Fields | str  # or the problem with the row


def read(file: Path, kind: str | None = None) -> Iterator[Entry]:
    """`kind` is a suffix such as `.csv`; by default the file's own. Raises BadFile."""
    readers = {".txt": text_rows, ".csv": csv_rows, ".jsonl": json_rows, ".parquet": parquet_rows}
    kind = kind or file.suffix.lower()
    if kind not in readers:
        raise BadFile(f"{file} must end in one of {', '.join(readers)}.")
    try:
        yield from readers[kind](file)
    except OSError as error:
        raise BadFile(f"{file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise BadFile(f"{file} must be in UTF-8.") from None


def text_rows(file: Path) -> Iterator[Entry]:
    for line, text in lines(file):
        yield Entry(line, {"prompt": text})


def json_rows(file: Path) -> Iterator[Entry]:
    for line, text in lines(file):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Entry(line, f"it is not JSON: {error}.")
        else:
            yield Entry(line, value if isinstance(value, dict) else "it must be a JSON object.")


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    with file.open(encoding="utf-8-sig") as opened:
        for line, text in enumerate(opened, start=1):
            if text.strip():
                yield line, text.rstrip("\n")


def csv_rows(file: Path) -> Iterator[Entry]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened)
        try:
            columns = reader.fieldnames or ()
            if "prompt" not in columns:
                raise BadFile(f"the first line of {file} must name the columns, prompt among them.")
            for row in reader:
                if None in row or None in row.values():
                    yield Entry(reader.line_num, f"it must have {len(columns)} columns, as the first line says.")
                    continue
                cells = [(name, text) for name, text in row.items() if text]  # an empty cell is a missing field
                yield Entry(reader.line_num, {name: cell_value(name, text) for name, text in cells})
        except csv.Error as error:
            raise BadFile(f"{file} is no CSV in line {reader.line_num}: {error}.") from None


def cell_value(name: str, text: str) -> object:
    """A number, or two with a comma between them as the answers of the API have them, where the field takes such."""
    if name in SIZE_FIELDS:
        return [literal(part.strip()) for part in text.split(",")]
    return literal(text) if name in NUMERIC_FIELDS else text


def parquet_rows(file: Path) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            if "prompt" not in opened.schema_arrow.names:
                raise BadFile(f"{file} must have a column prompt.")
            rows = (row for batch in opened.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                fields = {name: whole(value) if name in NUMERIC_FIELDS else value for name, value in row.items()}
                yield Entry(number, {name: value for name, value in fields.items() if value is not None})
    except pyarrow.ArrowException as error:
        raise BadFile(f"{file} is no Parquet: {str(error).rstrip('.')}.") from None


def whole(value: object) -> object:
    """Undoes what pandas does to a column of integers with gaps: it saves floats, and NaN for a gap."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value
