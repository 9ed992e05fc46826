"""A client of Ray's dashboard: Serve's states, reasons of failures, logs. Knows nothing of where the cluster runs."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from cluster.cli import UserError

Details = dict[str, Any]  # Serve's ServeInstanceDetails, as JSON
TIMEOUT_S = 30.0
REASON_LINES = 12
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
PLAIN_ERRORS = (
    "ValueError",
    "FileNotFoundError",
    "ValidationError",
    "RuntimeError",
)  # their message needs no class name


class Refused(UserError):
    """The dashboard answers, but refuses our token."""


class Late(UserError):
    """The dashboard took longer than the timeout, as it may on a busy machine."""


@dataclass(frozen=True)
class Dashboard:
    address: str
    cluster: str = "local"  # as the user's CLUSTER= named it
    headers: Mapping[str, str] = field(
        default_factory=dict, repr=False
    )  # they hold the token, so they are never printed
    what: str = "dashboard"
    token_file: str = "~/.ray/auth_token"  # of the token in `headers`

    @property
    def name(self) -> str:
        if self.cluster == "local":
            return f"{self.what} at {self.address}"
        return f"{self.what} of {self.cluster}'s cluster"

    def open(
        self, path: str, timeout_s: float | None = TIMEOUT_S, method: str = "GET", **query: object
    ) -> HTTPResponse:
        url = f"{self.address}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            answer: HTTPResponse = urlopen(Request(url, headers=dict(self.headers), method=method), timeout=timeout_s)
            return answer
        except HTTPError as error:
            if error.code in (401, 403):
                raise self.refused(str(error.code)) from None
            raise UserError(f"The {self.name} answers {error.code}: {error.read().decode()[:500]}") from None
        except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
            late = isinstance(getattr(error, "reason", error), TimeoutError)
            raise (Late if late else UserError)(f"The {self.name} does not answer: {error}.") from None

    def refused(self, words: str) -> Refused:
        return Refused(
            f"The {self.name} answers {words}: it was started with another token than the one that is in "
            f"{self.token_file} here."
        )

    def details(self) -> Details:
        with self.open("/api/serve/applications/") as answer:
            try:
                details: Details = json.load(answer)
            except TimeoutError as error:
                raise Late(f"The {self.name} does not finish its answer: {error}.") from None
            return details

    def log(self, place: Details, lines: int, follow: bool = False) -> Iterator[str]:
        """The last lines of a log file, and with `follow` all that come; none if the file does not exist yet."""
        kind, timeout_s = ("stream", None) if follow else ("file", TIMEOUT_S)
        try:
            with self.open(f"/api/v0/logs/{kind}", timeout_s, lines=lines, **place) as answer:
                for line in answer:
                    text = COLOURS.sub("", line.decode(errors="replace").rstrip())
                    if text and not text.startswith((":job_id:", ":actor_name:", ":task_name:")):
                        yield text.rpartition("\r")[2]
        except UserError:
            return


def log_places(replica: Details) -> Iterator[Details]:
    """The places of a replica's log and of its stderr, which repeats most of the log."""
    if replica.get("log_file_path"):
        yield {"node_id": replica["node_id"], "filename": replica["log_file_path"].lstrip("/")}
    if replica.get("actor_id"):
        yield {"actor_id": replica["actor_id"], "suffix": "err"}


def serves(details: Details) -> bool:
    return (details.get("controller_info") or {}).get("node_id") is not None


def serve_address(details: Details) -> str:
    options = details.get("http_options") or {}
    host = options.get("host", "127.0.0.1")
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::', 'localhost') else host}:{options.get('port', 8000)}"


def reason(message: str) -> str:
    """The reason within a message that wraps it in tracebacks: the text of the last exception."""
    message = COLOURS.sub("", message).strip()
    traceback, separator, lines_after = message.rpartition("Traceback (most recent call last):")
    if separator:
        lines = lines_after.splitlines()[1:]
        frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
        lines = lines[frames[-1] :] if frames else lines  # the actor's own come after "The actor died ..."
        while lines and (not lines[0] or lines[0].startswith(" ")):  # the frames
            lines = lines[1:]
    else:
        lines = message.partition("Error:\n")[2].splitlines() or message.splitlines()
    lines = [line.rstrip() for line in lines if line.strip() and "errors.pydantic.dev" not in line]
    words = "\n".join(lines[:REASON_LINES])
    kind, _, sentence = words.partition(": ")
    return sentence if kind.rpartition(".")[2] in PLAIN_ERRORS else words
