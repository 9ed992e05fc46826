"""jobs/batch_worker.py over a fake device, and what jobs/batch_generate.py writes of it: what is finished, what is
not."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app.api.protocol import SIZE_FIELDS
from app.api.settings import Encoding
from app.diffusion.pipeline import Pipeline
from app.types import PipelineSpec
from jobs.batch_generate import SCHEMA, progress, write_manifest
from jobs.batch_worker import BatchWorker, folders, row_of, text_of
from jobs.prompts import InvalidRow, Row
from tests.fake_pipeline import FakePipeline, request

SPEC = PipelineSpec("fake", sizes=((64, 64),), batch_buckets=(4,), max_steps=50)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    fake.warmup = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(Pipeline, "load", lambda spec: fake)
    return fake


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folders(tmp_path)
    return tmp_path


@pytest.fixture
def worker(fake: FakePipeline, out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchWorker]:
    worker = BatchWorker(out, tmp_path_factory.mktemp("drafts"), "fake", SPEC, 0.05)
    yield worker
    worker.engine.close()


def row(number: int, **other: Any) -> Row:
    return Row(number, f"key{number}", request(f"a boat, {number}", seed=number, **other), Encoding())


def drawn(worker: BatchWorker, *rows: Row) -> dict[str, str]:
    answer = worker({"row": np.array([text_of(each) for each in rows])})
    assert len({len(values) for values in answer.values()}) == 1
    return dict(zip(answer["key"], answer["error"], strict=True))


def files(out: Path) -> set[str]:
    return {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}


def test_a_row_travels_as_text_and_comes_back_the_same() -> None:
    first = row(7, n=2, fields=(("original_size", (64, 48)), ("target_size", (8, 8))))
    assert row_of(text_of(first)) == first


def test_a_row_leaves_its_pictures_and_a_record_and_nothing_else(worker: BatchWorker, out: Path) -> None:
    rows = [row(1), row(2, n=2)]
    assert drawn(worker, *rows) == {"key1": "", "key2": ""}
    assert files(out) == {name for each in rows for name in each.made}
    record = json.loads((out / rows[1].record).read_text())
    assert set(record) == set(SCHEMA) - {"row", "error", *SIZE_FIELDS}
    assert (record["seed"], record["files"]) == (2, ["images/key2-0.png", "images/key2-1.png"])
    with Image.open(out / "images" / "key2-1.png") as picture:
        assert picture.text["seed"] == "3"  # type: ignore[attr-defined]


def test_a_row_that_is_given_out_twice_at_once_is_told_once(worker: BatchWorker, out: Path) -> None:
    assert drawn(worker, row(1), row(1), row(2)) == {"key1": "", "key2": ""}
    assert files(out) == {name for each in (row(1), row(2)) for name in each.made}


def test_what_is_finished_is_not_drawn_again_and_what_lost_a_picture_is(
    worker: BatchWorker, fake: FakePipeline, out: Path
) -> None:
    rows = [row(1), row(2), row(3)]
    drawn(worker, *rows)
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    fake.calls.clear()
    (out / rows[1].files[0]).unlink()
    assert drawn(worker, *rows) == {"key1": "", "key2": "", "key3": ""}
    assert {call.seeds for call in fake.of("insert")} == {(2,)}
    assert files(out) == set(before)
    assert all((out / name).stat().st_mtime_ns == before[name] for each in (rows[0], rows[2]) for name in each.made)


def test_a_row_that_fails_is_told_and_the_others_are_drawn(worker: BatchWorker, fake: FakePipeline, out: Path) -> None:
    fake.fail("encode")
    first = drawn(worker, row(1))
    assert "encode failed" in first["key1"] and files(out) == set()
    refused = dataclasses.replace(row(2), generation=dataclasses.replace(row(2).generation, width=24))
    answer = drawn(worker, refused, row(3))
    assert answer["key2"].startswith("size must be one of ") and answer["key3"] == ""


def test_a_disk_that_takes_nothing_ends_the_job(worker: BatchWorker, out: Path) -> None:
    worker.drafts.rmdir()
    with pytest.raises(FileNotFoundError):
        drawn(worker, row(1))


def test_the_manifest_has_each_row_of_the_file_once_and_in_order(worker: BatchWorker, out: Path) -> None:
    rows = [row(3), row(1)]
    drawn(worker, *rows)
    failed = row(4)
    records = write_manifest(
        out, [*rows, failed], [InvalidRow(2, "x", "prompt must not be empty.")], {"key4": "it broke"}
    )
    assert [record["row"] for record in records] == [1, 2, 3, 4]
    assert [record["error"] for record in records] == [None, "prompt must not be empty.", None, "it broke"]
    assert [len(record["files"]) for record in records] == [1, 0, 1, 0]
    lines = (out / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records == pq.read_table(out / "manifest.parquet").to_pylist()


def test_progress_counts_pictures_by_when_they_were_made(capsys: pytest.CaptureFixture[str]) -> None:
    results = [{"host": f"host {i % 2}", "ended": 100.0 + i / 4} for i in range(9)]
    assert list(progress(results, 9, 0.0)) == results
    assert capsys.readouterr().out.splitlines()[-1] == "9 of 9 rows, 4.00 a second on 2 hosts"
