"""Sends a request and records its outcome and times. It swallows no error and retries nothing."""

import asyncio
import base64
import errno
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.checks import BadPicture, EqualSeeds, digest, examine, files_of, json_of, size_of
from loadtest.plan import Planned
from loadtest.records import Outcome, Record
from loadtest.sse import Parser

OUT_OF_MEANS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}  # on this machine
LONGEST_ERROR = 300
LONGEST_EVENT = 64 << 20  # bytes


@dataclass
class Answer:
    """The part of the answer that has arrived."""

    sent: float | None = None
    first_byte: float | None = None
    preview: float | None = None
    status: int | None = None
    headers: Mapping[str, str] | None = None
    body: bytes = b""  # for a stream, the data of its last event


class Failure(Exception):
    def __init__(self, outcome: Outcome, error: str) -> None:
        super().__init__(outcome, error)
        self.outcome = outcome
        self.error = error


def session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    """A session with a connection for each concurrent request, and without proxies and cookies."""
    opened = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # Client sets its own timeout
        headers=headers,
        read_bufsize=1 << 20,
        auto_decompress=False,
    )
    opened._retry_connection = False  # otherwise aiohttp silently sends a GET again whose connection broke
    return opened


@dataclass(frozen=True)
class Client:
    session: aiohttp.ClientSession
    url: str
    timeout_s: float
    clock: Callable[[], float]  # seconds of the run
    check: bool
    default_size: str | None
    equal_seeds: EqualSeeds
    checkers: Executor
    pictures: Path | None  # the folder for the pictures; None: they are not kept

    async def send(self, planned: Planned, intended: float) -> Record:
        """Never raises, except on cancellation. Any failure becomes the outcome of the record."""
        answer = Answer(sent=self.clock())
        try:
            async with asyncio.timeout(self.timeout_s):
                await self.exchange(planned, answer)
            outcome, error = judged(answer)
        except Failure as failure:
            outcome, error = failure.outcome, failure.error
        except TimeoutError:
            outcome, error = "timeout", f"no complete answer within {self.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as problem:
            outcome, error = classified(problem, answer)
        done = self.clock()
        files: list[bytes] = []
        compared = False
        if outcome == "ok":
            work = asyncio.get_running_loop().run_in_executor(self.checkers, self.checked, planned, answer)
            outcome, error, files, compared = await work
        server_facts = facts(answer) if outcome == "ok" else {}
        return Record(
            id=planned.id,
            kind=planned.kind,
            endpoint=planned.endpoint,
            request=planned.request,
            intended=intended,
            sent=answer.sent,
            first_byte=answer.first_byte,
            preview=answer.preview,
            done=done,
            outcome=outcome,
            status=answer.status,
            error=error[:LONGEST_ERROR] if error else None,
            pictures=len(files) if outcome == "ok" else 0,
            bytes=len(answer.body),
            digest=digest(files) if files else None,
            retry_after=retry_after(answer) if outcome == "shed" else None,
            compared=compared,
            server=timings(server_facts),
            moves=count(server_facts, "moves"),
            restarts=count(server_facts, "restarts"),
        )

    async def exchange(self, planned: Planned, answer: Answer) -> None:
        if planned.endpoint == "imagine":
            query = {name: str(value) for name, value in planned.request.items()}
            pending = self.session.get(f"{self.url}/imagine", params=query, allow_redirects=False)
        else:
            body = dict(planned.request) if planned.endpoint == "generations" else edit_body(planned.request)
            pending = self.session.post(f"{self.url}/v1/images/{planned.endpoint}", json=body, allow_redirects=False)
        async with pending as response:
            answer.first_byte = self.clock()
            answer.status, answer.headers = response.status, response.headers
            if response.status == 200 and response.content_type == "text/event-stream":
                await self.listen(response, answer)
            else:
                answer.body = await response.read()

    async def listen(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        """Reads server-sent events up to the picture. The first preview is timed when it is complete."""
        parser = Parser(LONGEST_EVENT)
        async for chunk in response.content.iter_any():
            try:
                events = list(parser.feed(chunk))
            except ValueError as problem:
                raise Failure("bad_image", str(problem)) from None
            for name, data in events:
                if name.endswith("partial_image"):
                    answer.preview = self.clock() if answer.preview is None else answer.preview
                elif name.endswith("completed"):
                    answer.body = data
                elif name == "error":
                    raise Failure("server_error", f"an error in the stream: {data.decode('utf8', 'replace')}")
        if not answer.body:
            raise Failure("reset", "the stream ended without a picture")

    def checked(self, planned: Planned, answer: Answer) -> tuple[Outcome, str | None, list[bytes], bool]:
        """In a thread: the outcome, the error, the files, and whether they were compared with earlier ones."""
        files: list[bytes] = []
        try:
            files = [answer.body] if planned.endpoint == "imagine" else files_of(json_of(answer.body))
            if (wanted := planned.request.get("n", 1)) != len(files):
                raise BadPicture(f"{len(files)} pictures where {wanted} were asked for")
            if self.pictures:
                for i, file in enumerate(files):
                    (self.pictures / f"{planned.id:06}-{i}{suffix(file)}").write_bytes(file)
            compared = False
            if self.check:
                # That of an edit follows from its image.
                size = size_of(planned.request, None if planned.endpoint == "edits" else self.default_size)
                compared = self.equal_seeds.compare(planned.request, [examine(file, size) for file in files])
            return "ok", None, files, compared
        except BadPicture as problem:
            return "bad_image", str(problem), files, False


def edit_body(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request in JSON, with the content of its files in place of their paths."""
    links = {name: {"image_url": data_url(request[name])} for name in ("image", "mask") if name in request}
    fields = {name: value for name, value in request.items() if name not in links}
    return {**fields, "images": [links["image"]], **({"mask": links["mask"]} if "mask" in links else {})}


@cache
def data_url(path: str) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def judged(answer: Answer) -> tuple[Outcome, str | None]:
    """The outcome and error that follow from the status."""
    match answer.status:
        case 200:
            return "ok", None
        case 429 | 503:
            return "shed", error_of(answer)
        case int(status) if status >= 500:
            return "server_error", error_of(answer)
    return "refused", error_of(answer)


def retry_after(answer: Answer) -> float | None:
    try:
        return max(0.0, float((answer.headers or {})["Retry-After"]))
    except (KeyError, ValueError):  # a date, which our servers never send
        return None


def error_of(answer: Answer) -> str:
    """The server's error message, or the beginning of the body."""
    try:
        error = json.loads(answer.body)["error"]
        return f"{answer.status} {error.get('code') or ''}: {error['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{answer.status}: {answer.body[:LONGEST_ERROR].decode('utf8', 'replace')}"


def classified(problem: Exception, answer: Answer) -> tuple[Outcome, str]:
    words = f"{type(problem).__name__}: {problem}"
    number = getattr(problem, "errno", None) or getattr(getattr(problem, "os_error", None), "errno", None)
    if number in OUT_OF_MEANS:
        return "client_overload", words
    if isinstance(problem, aiohttp.ClientConnectorError):  # TCP, DNS and TLS
        return "connect", words
    if isinstance(problem, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | OSError):
        return "reset", words
    if isinstance(problem, aiohttp.ClientResponseError):  # what came is not HTTP
        return "server_error", words
    return "refused", words  # for example a header or an address that cannot be sent


def facts(answer: Answer) -> Mapping[str, Any]:
    """What the server says of an answer: headers of GET /imagine under the names of the JSON answer, or that."""
    headers = answer.headers or {}
    try:
        if timing := headers.get("Server-Timing"):
            parts = (part.strip().partition(";dur=") for part in timing.split(","))
            timings = {f"{name}_s": float(milliseconds) / 1000 for name, _, milliseconds in parts}
            return {"timings": timings, "moves": headers.get("X-Moves"), "restarts": headers.get("X-Restarts")}
        document = json.loads(answer.body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def timings(facts: Mapping[str, Any]) -> dict[str, float] | None:
    """Seconds of each part of the work, if the server tells them."""
    parts_s = facts.get("timings")
    try:
        return {name.removesuffix("_s"): float(seconds) for name, seconds in parts_s.items()} if parts_s else None
    except (ValueError, AttributeError, TypeError):
        return None


def count(facts: Mapping[str, Any], name: str) -> int:
    """A count that the server tells only if it is not 0."""
    try:
        return int(facts.get(name) or 0)
    except (ValueError, TypeError):
        return 0


def suffix(file: bytes) -> str:
    return ".jpg" if file.startswith(b"\xff\xd8") else ".webp" if file[8:12] == b"WEBP" else ".png"
