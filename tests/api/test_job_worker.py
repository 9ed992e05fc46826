"""Workers of jobs on a virtual clock, with a real database and real files."""

import asyncio
import gc
import json
import logging
import random
import sqlite3
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.api.database import Database, connect
from app.api.errors import ApiError
from app.api.files import table as file_table
from app.api.files.files import Files
from app.api.files.storage import Folder
from app.api.jobs import table
from app.api.jobs.accept import accept
from app.api.jobs.leases import claim
from app.api.jobs.service import JobService
from app.api.jobs.share import Share
from app.api.jobs.stored_request import dump, load
from app.api.jobs.sweeper import sweep
from app.api.jobs.table import Job, cancel_job, find_job
from app.api.jobs.worker import LEASE_S, Serving, Worker
from app.api.messages import Accepted, ImageRequest, Images, Preview, Progress
from app.api.settings import Encoding, Jobs
from app.types import Edit, Generation
from tests.api.test_ingress import pictures


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Drawing:
    """A request at a replica: ends as the test says."""

    def __init__(self, request: ImageRequest) -> None:
        self.request = request
        self.end: asyncio.Future[Images | ApiError] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    async def next_item(self) -> Accepted | Progress | Preview | Images:
        item = await self.end
        if isinstance(item, ApiError):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True

    def finish(self, item: Images | ApiError | None = None) -> None:
        self.end.set_result(item or pictures(self.request))


class Place:
    """A database, files, and workers that share them, as several processes would."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.clock = Clock()
        self.settings = Jobs(database=str(folder / "jobs.sqlite3"), files=str(folder / "files"), **settings)
        self.share = Share(self.settings.share)
        self.drawings: list[Drawing] = []
        self.serving = Serving({"tiny"}, 1)
        self.database, self.files = self.opened()

    def opened(self) -> tuple[Database, Files]:
        database = Database(self.folder / "jobs.sqlite3", (*table.SCHEMA, *file_table.SCHEMA))
        files = Files(
            database,
            Folder(self.folder / "files"),
            max_bytes=self.settings.max_bytes,
            base_url=None,
            clock=self.clock,
        )
        return database, files

    def worker(self) -> Worker:
        async def serving() -> Serving:
            return self.serving

        def send(request: ImageRequest) -> Drawing:
            self.drawings.append(Drawing(request))
            return self.drawings[-1]

        database, files = self.opened()
        return Worker(database, files, self.settings, self.share, send=send, serving=serving, clock=self.clock)

    async def add(self, seed: int = 7, owner: str = "", n: int = 1, **changes: Any) -> Job:
        request = ImageRequest(Generation("a", "", 128, 128, 12, 3.5, seed, None, n), Encoding(), 60.0, **changes)
        return await accept(
            self.database, self.files, self.settings, request, model="tiny", owner=owner, key=None, now=self.clock()
        )

    async def job(self, job: Job) -> Job:
        current = await self.database.read(find_job, job.id, job.owner)
        assert current
        return current

    async def pictures(self, job: Job) -> list[bytes]:
        result = json.loads((await self.job(job)).result or "null")
        return [(self.folder / "files" / picture["file"]).read_bytes() for picture in result["data"]]


def run(folder: Path, scenario: Callable[[Place], Awaitable[None]], **settings: Any) -> None:
    async def inside() -> None:
        place = Place(folder, **settings)
        await scenario(place)
        place.database.close()

    asyncio.run(inside())


async def turns(worker: Worker, until: Callable[[], bool] = lambda: True) -> None:
    """Takes turns until its runs have come to where they wait for a replica, or have ended."""
    await worker.turn()
    for _ in range(2000):
        await asyncio.sleep(0.001)
        if until():
            return
    raise AssertionError("the worker did not get there")


async def settle(worker: Worker) -> None:
    await asyncio.gather(*(run.task for run in [*worker.runs.values()]), return_exceptions=True)
    await asyncio.sleep(0)


def test_a_killed_workers_job_is_drawn_by_the_next_and_what_the_first_brings_is_thrown_away(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        job, first, second = await place.add(), place.worker(), place.worker()
        await turns(first, lambda: len(place.drawings) == 1)
        await second.turn()
        place.clock.now += LEASE_S / 2
        await second.turn()
        assert len(place.drawings) == 1, "while the lease holds"
        place.clock.now += LEASE_S
        await turns(second, lambda: len(place.drawings) == 2)
        place.drawings[1].finish()
        await settle(second)
        done = await place.job(job)
        assert (done.status, done.attempts, await place.pictures(job)) == ("completed", 2, [b"png 7"])
        place.drawings[0].finish()  # it was only slow
        await settle(first)
        assert await place.job(job) == done, "as it was"
        place.clock.now += 1.0
        await sweep(place.database, place.files, place.settings.keep_s, place.clock)
        assert len([*(tmp_path / "files").iterdir()]) == 1, "and its pictures are gone"

    run(tmp_path, scenario)


def test_a_worker_that_was_too_slow_stops_what_another_has_taken(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        await place.add()
        first, second = place.worker(), place.worker()
        await turns(first, lambda: len(place.drawings) == 1)
        place.clock.now += LEASE_S + 1
        await turns(second, lambda: len(place.drawings) == 2)
        await turns(first, lambda: place.drawings[0].cancelled)
        assert not place.drawings[1].cancelled

    run(tmp_path, scenario)


def test_a_worker_that_is_ended_just_as_it_wakes_up_ends(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        worker = place.worker()
        working = asyncio.create_task(worker.work())
        await asyncio.sleep(0.01)  # it waits
        worker.awake.set()
        await asyncio.sleep(0)
        working.cancel()
        ended, _ = await asyncio.wait([working], timeout=5)
        assert ended and working.cancelled()

    run(tmp_path, scenario)


def test_a_job_that_is_cancelled_elsewhere_stops(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        job, worker = await place.add(), place.worker()
        await turns(worker, lambda: len(place.drawings) == 1)
        assert await place.database.write(cancel_job, job.id, "", place.clock(), place.clock() + 60)
        await turns(worker, lambda: place.drawings[0].cancelled)
        assert (await place.job(job)).status == "cancelled"

    run(tmp_path, scenario)


@pytest.mark.parametrize("code", ["queue_full", "deadline_unmeetable", "model_not_ready", "deployment_failed"])
def test_a_refusal_for_now_puts_a_job_off_and_uses_up_no_attempt(tmp_path: Path, code: str) -> None:
    async def scenario(place: Place) -> None:
        job, worker = await place.add(), place.worker()
        for number in range(15):
            await turns(worker, lambda number=number: len(place.drawings) == number + 1)  # type: ignore[misc]
            place.drawings[-1].finish(ApiError(503, "Not now.", None, code, 5.0))
            await settle(worker)
            await worker.turn()
            assert len(place.drawings) == number + 1, "not before its Retry-After"
            place.clock.now += 5.0
        await turns(worker, lambda: len(place.drawings) == 16)
        place.drawings[-1].finish()
        await settle(worker)
        assert ((await place.job(job)).status, (await place.job(job)).attempts) == ("completed", 1)

    run(tmp_path, scenario)


@pytest.mark.parametrize(("status", "code"), [(503, "replica_lost"), (500, "internal_error"), (504, "timeout")])
def test_a_job_that_ends_its_replicas_fails_in_the_end(tmp_path: Path, status: int, code: str) -> None:
    async def scenario(place: Place) -> None:
        job, worker = await place.add(), place.worker()
        for number in range(3):
            await turns(worker, lambda number=number: len(place.drawings) == number + 1)  # type: ignore[misc]
            place.drawings[-1].finish(ApiError(status, "Lost.", None, code))
            await settle(worker)
            place.clock.now += 60.0
        failed = await place.job(job)
        assert (failed.status, failed.attempts) == ("failed", 3)
        assert json.loads(failed.error or "")["code"] == code

    run(tmp_path, scenario, attempts=3)


def test_a_job_whose_workers_die_without_a_word_fails_in_the_end(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        job = await place.add()
        for number in range(2):
            await turns(place.worker(), lambda number=number: len(place.drawings) == number + 1)  # type: ignore[misc]
            place.clock.now += LEASE_S + 1
        last = place.worker()
        await last.turn()
        await settle(last)
        assert json.loads((await place.job(job)).error or "")["code"] == "attempts_exhausted"

    run(tmp_path, scenario, attempts=2)


def test_pictures_of_another_model_are_thrown_away_and_a_job_waits_for_its_own(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        job, worker = await place.add(), place.worker()
        place.serving = Serving({"another"}, 1)
        await worker.turn()
        assert not place.drawings
        place.serving = Serving({"another", "tiny"}, 2)
        await turns(worker, lambda: len(place.drawings) == 1)
        place.drawings[0].finish(replace(pictures(place.drawings[0].request), model="another"))
        await settle(worker)
        assert (await place.job(job)).status == "queued"

    run(tmp_path, scenario)


def test_keys_take_turns_and_a_thousand_jobs_of_one_delay_anothers_by_one(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        for _ in range(6):
            await place.add(owner="alice")
        order = []
        for number in range(8):
            if number == 2:
                for _ in range(2):
                    await place.add(owner="bob")
            now = place.clock()
            job = await place.database.write(claim, "worker", ("tiny",), now, now + 60)
            assert job
            order.append(job.owner)
        assert order == ["alice", "alice", "bob", "alice", "bob", "alice", "alice", "alice"]

    run(tmp_path, scenario)


def test_no_more_images_are_drawn_at_a_time_than_replicas_have_places(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        for _ in range(4):
            await place.add(n=2)
        worker = place.worker()
        await turns(worker, lambda: len(place.drawings) == 2)
        place.serving = Serving({"tiny"}, 2)
        await turns(worker, lambda: len(place.drawings) == 4)

    run(tmp_path, scenario, at_once=4)


def test_while_somebody_waits_jobs_get_their_share_of_the_devices_time(tmp_path: Path) -> None:
    """Each job takes 0.75 s, as the fake replica says."""

    async def scenario(place: Place) -> None:
        for _ in range(100):
            await place.add()
        worker = place.worker()
        place.share.came()
        for _ in range(120):
            place.share.spent(1.0, 0.75, job=False)
            await worker.turn()
            while worker.runs:
                for drawing in place.drawings:
                    if not drawing.end.done():
                        drawing.finish()
                await asyncio.sleep(0.001)
        part = len(place.drawings) / (len(place.drawings) + 120)
        assert 0.15 < part <= 0.22, part

    run(tmp_path, scenario, share=0.2)


def test_a_share_of_nothing_keeps_jobs_back_until_nobody_waits() -> None:
    share = Share(0.0)
    assert share.allows(3)
    share.came()
    share.spent(1.0, 100.0, job=False)
    assert not share.allows(0)
    share.went()
    assert share.allows(0)


def test_an_image_of_a_request_stands_on_the_disk_and_comes_back_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    edit = Edit(image, rng.random((64, 64)) > 0.5, 0.5, (image[::-1].copy(),))
    fields = (("target_size", (64, 64)),)
    generation = Generation("\u00e9\n", "", 64, 64, 4, 1.0, 7, "euler", 2, fields, edit)
    request = ImageRequest(generation, Encoding(output_format="webp"), 3.0, response_format="url", asynchronous=True)
    text, uploads = dump(request)
    back = load(json.dumps(json.loads(text) | {"unknown": 1}), uploads)
    assert replace(back, generation=replace(back.generation, edit=None)) == replace(
        request, generation=replace(generation, edit=None)
    )
    assert back.generation.edit and back.generation.edit.image is not None and back.generation.edit.mask is not None
    assert (back.generation.edit.image == image).all() and (back.generation.edit.mask == edit.mask).all()
    assert (back.generation.edit.references[0] == image[::-1]).all()

    async def scenario(place: Place) -> None:
        job = await accept(
            place.database, place.files, place.settings, request, model="tiny", owner="", key=None, now=place.clock()
        )
        assert len([*(tmp_path / "files").iterdir()]) == 3, "before the answer"
        worker = place.worker()
        await turns(worker, lambda: len(place.drawings) == 1)
        sent = place.drawings[0].request.generation.edit
        assert sent and sent.image is not None and (sent.image == image).all()
        place.drawings[0].finish()
        await settle(worker)
        place.clock.now += 1.0
        await sweep(place.database, place.files, place.settings.keep_s, place.clock)
        assert sorted(path.suffix for path in (tmp_path / "files").iterdir()) == [".webp", ".webp"]
        assert await place.pictures(job) == [b"webp 7", b"webp 8"]

    run(tmp_path, scenario)


def test_what_is_overdue_fails_and_what_has_expired_is_gone(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        job = await place.add()
        place.clock.now += 61.0
        await sweep(place.database, place.files, 60.0, place.clock)
        assert json.loads((await place.job(job)).error or "")["code"] == "job_expired"
        worker = place.worker()
        await worker.turn()
        assert not place.drawings
        place.clock.now += 61.0
        await sweep(place.database, place.files, 60.0, place.clock)
        assert await place.database.read(find_job, job.id, "") is None

    run(tmp_path, scenario, keep_s=60)


def test_jobs_wait_while_no_more_pictures_can_be_kept(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        await place.add()
        worker = place.worker()
        worker.files.max_bytes = 0
        await worker.turn()
        assert not place.drawings
        worker.files.max_bytes = 1
        await turns(worker, lambda: len(place.drawings) == 1)

    run(tmp_path, scenario)


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def memory() -> int:
    """Bytes of Python's objects since tracemalloc has started. What SQLite holds has a bound of its own."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.fixture
def traced_memory() -> Iterator[None]:
    logging.disable()  # pytest keeps all records
    tracemalloc.start()
    yield
    tracemalloc.stop()
    logging.disable(logging.NOTSET)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits do not wait for the disk: what is here must not outlive a power failure."""

    def connected(path: Path, schema: Sequence[str]) -> sqlite3.Connection:
        connection = connect(path, schema)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    monkeypatch.setattr("app.api.database.connect", connected)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Day:
    """All that the ingress does with jobs, in steps of ten minutes on a virtual clock."""

    def __init__(self, folder: Path) -> None:
        secret = folder / "secret"
        secret.write_text(f"whsec_{'a' * 40}")
        secret.chmod(0o600)
        self.clock, self.rng = Clock(), random.Random(0)
        settings = Jobs(
            database=str(folder / "jobs.sqlite3"),
            files=str(folder / "files"),
            keep_s=3600,
            url_keep_s=3600,
            at_once=8,
            webhook_hosts=("hooks.example.com",),
            webhook_secret_file=str(secret),
        )
        self.service = JobService(settings, send=self.drawn, serving=self.serving, clock=self.clock)
        assert self.service.webhooks
        self.service.webhooks.post = self.delivered
        self.image = np.zeros((128, 128, 3), np.uint8)

    async def serving(self) -> Serving:
        return Serving({"tiny"}, 1)

    async def delivered(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        return 500 if self.rng.random() < 0.1 else 204

    def drawn(self, request: ImageRequest) -> Drawing:
        """At once; a twentieth is lost with its replica."""
        drawing = Drawing(request)
        drawing.finish(ApiError(503, "Lost.", None, "replica_lost") if self.rng.random() < 0.05 else None)
        return drawing

    def request(self, seed: int, **changes: Any) -> ImageRequest:
        edit = Edit(self.image, None, 0.5) if self.rng.random() < 0.2 else None
        generation = Generation("a", "", 128, 128, 12, 3.5, seed, None, 1, edit=edit)
        return ImageRequest(generation, Encoding(), 60.0, **changes)

    async def ten_minutes(self) -> None:
        """Three jobs and a picture behind a URL. Some jobs are cancelled before they are drawn, or deleted after."""
        service, owners = self.service, [self.rng.choice("abc") for _ in range(3)]
        hook = "https://hooks.example.com/a"
        jobs = [
            await service.accept(self.request(seed, webhook_url=hook), "tiny", owner, key=None)
            for seed, owner in enumerate(owners)
        ]
        connected = self.request(9)
        await service.save(connected, pictures(connected), "a")
        if self.rng.random() < 0.2:
            await service.cancel(jobs[0].id, owners[0])
        await service.worker.turn()
        while service.worker.runs:
            await settle(service.worker)
        if self.rng.random() < 0.2:
            await service.forget(jobs[1].id, owners[1])
        assert service.webhooks
        while await service.webhooks.deliver_next():
            pass
        self.clock.now += 600.0
        await sweep(service.database, service.files, service.settings.keep_s, self.clock)


@pytest.mark.slow
@pytest.mark.usefixtures("unsynced", "traced_memory")
def test_a_day_of_jobs_holds_no_more_of_disk_and_memory_than_its_first_hours(tmp_path: Path) -> None:
    """Jobs and pictures are kept for an hour, so that of one hour at most seven steps are there."""
    on_disk: list[int] = []
    in_memory: dict[int, int] = {}

    async def day() -> None:
        day = Day(tmp_path)
        for step in range(1, 24 * 6 + 1):
            await day.ten_minutes()
            on_disk.append(disk(tmp_path))
            if step in (6 * 6, 24 * 6):
                in_memory[step // 6] = memory()
        assert len(asyncio.all_tasks()) == 1
        with sqlite3.connect(tmp_path / "jobs.sqlite3") as other:
            assert other.execute("SELECT count(*) FROM jobs").fetchone()[0] <= 7 * 3
            assert other.execute("SELECT count(*) FROM files").fetchone()[0] <= 7 * 5
        assert len([*(tmp_path / "files").iterdir()]) <= 7 * 5
        day.service.database.close()

    asyncio.run(day())
    # A single moment may find a file that is about to go.
    assert np.median(on_disk[-50:]) <= 1.25 * np.median(on_disk[6:24]), "no growth after the first hours"
    assert max(on_disk[-50:]) <= 2 * max(on_disk[6:24])
    assert in_memory[24] - in_memory[6] < 96 << 10, "324 rows of jobs would be 400 kB"
