"""The outcome of single requests to a server that misbehaves on request, each of which must be sent once."""

import asyncio
import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loadtest.checks import EqualSeeds, identity
from loadtest.client import Answer, Client, count, facts, session, timings
from loadtest.plan import Planned
from loadtest.records import Record
from loadtest.scenario import Endpoint
from tests.picture_server import SIZE, Server, picture, picture_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with picture_server() as server:
        yield server


def send(
    server: Server, *requests: dict[str, Any], endpoint: Endpoint = "generations", timeout_s: float = 20, **changes: Any
) -> list[Record]:
    """Sends the requests one after another and returns their records."""

    async def work() -> list[Record]:
        began = time.perf_counter()
        async with session({}) as opened:
            with ThreadPoolExecutor(1) as checkers:
                options: dict[str, Any] = {
                    **{"session": opened, "url": server.url, "timeout_s": timeout_s, "check": True},
                    **{"clock": lambda: time.perf_counter() - began, "default_size": SIZE, "checkers": checkers},
                    **{"equal_seeds": EqualSeeds.of(requests, 1), "pictures": None, **changes},
                }
                client = Client(**options)
                return [
                    await client.send(Planned(i, 0.0, "k", endpoint, request), 0.0)
                    for i, request in enumerate(requests)
                ]

    return asyncio.run(work())


def fields_of(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "seed": 7, **fields}


def test_a_good_answer_is_timed_counted_and_kept(server: Server, tmp_path: Path) -> None:
    (record,) = send(server, fields_of("delay 0.2", n=2), pictures=tmp_path)
    assert record.outcome == "ok" and record.pictures == 2 and record.status == 200 and record.error is None
    assert record.sent is not None and record.first_byte is not None
    assert 0 <= record.sent < 0.2 <= record.first_byte <= record.done
    assert record.server == {"denoise": 0.0125}
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["000000-0.png", "000000-1.png"]
    assert (tmp_path / "000000-0.png").read_bytes() == picture(7)


def test_get_imagine_reports_its_timings_in_a_header(server: Server) -> None:
    (record,) = send(server, fields_of("a", size=SIZE), endpoint="imagine")
    assert record.outcome == "ok" and record.server == {"denoise": 0.0125} and server.seen[-1]["method"] == "GET"


def test_an_edit_sends_the_content_of_its_files(server: Server, tmp_path: Path) -> None:
    for name in ("boat.png", "mask.png"):
        (tmp_path / name).write_bytes(picture(len(name)))
    paths = {name: str(tmp_path / f"{file}.png") for name, file in (("image", "boat"), ("mask", "mask"))}
    (record,) = send(server, fields_of("a", strength=0.5, **paths), endpoint="edits")
    seen = server.seen[-1]
    assert record.outcome == "ok" and record.request["image"] == paths["image"] and seen["strength"] == 0.5
    sent = {"image": seen["images"][0], "mask": seen["mask"]}
    for name, link in sent.items():
        content = base64.b64decode(link["image_url"].partition(";base64,")[2])
        assert content == Path(paths[name]).read_bytes()


def test_the_first_preview_of_a_stream_is_timed(server: Server) -> None:
    (record,) = send(server, fields_of("a", stream=True, partial_images=1))
    assert record.outcome == "ok" and record.first_byte is not None and record.preview is not None
    assert record.first_byte < record.preview < record.done - 0.03


def test_a_stream_whose_lines_end_with_crlf_is_read(server: Server) -> None:
    (record,) = send(server, fields_of("crlf", stream=True, partial_images=1))
    assert record.outcome == "ok" and record.preview is not None and record.pictures == 1


@pytest.mark.parametrize(
    ("prompt", "outcome", "words"),
    [
        ("status 400", "refused", "400 because: in words"),
        ("status 404", "refused", "404 because: in words"),
        ("status 302", "refused", "302"),
        ("status 429", "shed", "429 because: in words"),
        ("status 503", "shed", "503 because: in words"),
        ("status 500", "server_error", "500 because: in words"),
        ("status 504", "server_error", "504 because: in words"),
        ("drop", "reset", "Disconnected"),
        ("reset", "reset", "Payload"),
        ("delay 5", "timeout", "no complete answer within 0.5 s"),
        ("blank", "bad_image", "a blank picture: all of it is (200, 200, 200)"),
        ("small", "bad_image", "a picture of 8x8 where 16x16 was asked for"),
        ("garbage", "bad_image", "19 bytes that do not decode as a picture"),
    ],
)
def test_a_failure_has_its_class_and_a_message(server: Server, prompt: str, outcome: str, words: str) -> None:
    endpoints: tuple[Endpoint, ...] = ("generations", "imagine")
    for endpoint in endpoints:
        before = len(server.seen)
        (record,) = send(server, fields_of(prompt), endpoint=endpoint, timeout_s=0.5)
        assert record.outcome == outcome and record.error and words in record.error
        assert record.pictures == 0 and len(server.seen) == before + 1, "sent once"


def test_a_broken_connection_is_recorded_and_not_retried_even_if_it_is_reused(server: Server) -> None:
    before = len(server.seen)
    records = send(server, fields_of("a"), fields_of("drop"), endpoint="imagine")
    assert [record.outcome for record in records] == ["ok", "reset"] and len(server.seen) == before + 2


def test_retry_after_is_recorded_when_the_server_sheds_load(server: Server) -> None:
    assert [record.retry_after for record in send(server, fields_of("status 503"), fields_of("a"))] == [1.0, None]


@pytest.mark.parametrize(("prompt", "outcome"), [("fail", "server_error"), ("halt", "reset")])
def test_a_stream_that_ends_badly_is_a_failure(server: Server, prompt: str, outcome: str) -> None:
    (record,) = send(server, fields_of(prompt, stream=True))
    assert record.outcome == outcome and record.preview is not None


def test_a_server_that_is_not_there_is_a_failed_connection(server: Server) -> None:
    nowhere = Server(url="http://127.0.0.1:9")
    (record,) = send(nowhere, fields_of("a"))
    assert record.outcome == "connect" and record.status is None and record.first_byte is None


def test_without_free_sockets_the_failure_is_the_clients(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*args: Any, **options: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("aiohttp.connector.TCPConnector.connect", full)
    (record,) = send(server, fields_of("a"))
    assert record.outcome == "client_overload" and "Too many open files" in str(record.error)


def test_equal_requests_must_get_equal_pictures(server: Server) -> None:
    records = send(server, fields_of("fickle"), fields_of("a"), fields_of("fickle", stream=True), fields_of("a"))
    assert [record.outcome for record in records] == ["ok", "ok", "bad_image", "ok"]
    assert "the same request and seed got another picture before" in str(records[2].error)
    assert [record.compared for record in records] == [False, False, False, True]


def test_pictures_are_kept_until_their_last_comparison(server: Server) -> None:
    requests = [fields_of("a"), fields_of("b"), fields_of("a")]
    equal_seeds = EqualSeeds.of(requests, 1)
    send(server, *requests[:2], equal_seeds=equal_seeds)
    assert len(equal_seeds.first) == 1
    send(server, *requests[2:], equal_seeds=equal_seeds)
    assert not equal_seeds.first and not equal_seeds.to_come


def test_one_grey_level_is_no_difference(server: Server) -> None:
    records = send(server, *[fields_of("near")] * 12)
    assert {record.outcome for record in records} == {"ok"} and len({record.digest for record in records}) == 2
    exact = EqualSeeds.of([fields_of("near")] * 12, 0)
    records = send(server, *[fields_of("near")] * 12, equal_seeds=exact)
    assert {record.outcome for record in records} == {"ok", "bad_image"}


def test_a_request_without_a_seed_has_no_identity() -> None:
    assert identity({"prompt": "a"}) is None
    assert identity({"prompt": "a", "seed": 1, "stream": True}) == identity({"seed": 1, "prompt": "a"})
    assert identity({"prompt": "a", "seed": 1}) != identity({"prompt": "a", "seed": 2})


def test_too_few_pictures_are_a_bad_answer(server: Server) -> None:
    (record,) = send(server, fields_of("fewer", n=3))
    assert record.outcome == "bad_image" and record.error == "2 pictures where 3 were asked for"


def test_moves_are_read_from_the_header_or_the_body() -> None:
    image = facts(Answer(0.0, headers={"Server-Timing": "queue;dur=500.0", "X-Moves": "2"}, body=b"PNG"))
    document = facts(Answer(0.0, headers={}, body=b'{"moves": 1, "restarts": 1}'))
    assert [count(image, "moves"), count(image, "restarts"), timings(image)] == [2, 0, {"queue": 0.5}]
    assert [count(document, "moves"), count(document, "restarts"), timings(document)] == [1, 1, None]
    assert facts(Answer(0.0, headers={}, body=b"PNG")) == {}
