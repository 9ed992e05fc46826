"""Carries out a run: makes its folder, sends the load, and watches the cluster until it has settled."""

import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from cluster.cli import UsageError
from cluster.dashboard import Dashboard
from cluster.processes import API_KEY, credentials
from loadtest.checks import EqualSeeds
from loadtest.client import Client, session
from loadtest.cluster import Watcher
from loadtest.display import Display
from loadtest.plan import Planned, fingerprint, plan
from loadtest.records import Journal, read
from loadtest.run import Clock, Load, Progress, every, remaining
from loadtest.scenario import Closed, Scenario

REACH_S = 10.0
REFRESH_S = 0.25
CHECKERS = 2  # threads that check pictures


@dataclass(frozen=True)
class Target:
    url: str
    dashboard: Dashboard | None = None


def guard(url: str, allow_remote: bool) -> str:
    """The URL, if it may be put under load. Raises UsageError otherwise."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"The URL must be like http://127.0.0.1:8000, got {url}: {error}.") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
        raise UsageError(f"The URL must be like http://127.0.0.1:8000, got {url}.")
    if not allow_remote:
        try:
            resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UsageError(f"The host of {url} cannot be found: {error}.") from None
        addresses = sorted({str(entry[4][0]).partition("%")[0] for entry in resolved})
        if beyond := [address for address in addresses if not is_local(address)]:
            alias = "" if beyond[0] == host else f", which is {beyond[0]},"
            raise UsageError(
                f"{host}{alias} is another machine. A load test can bring a server down: to load one that is yours, "
                "or whose owner agrees, add --allow-remote."
            )
    return url.rstrip("/")


def is_local(address: str) -> bool:
    """Whether an address is this machine's own. Packets to such an address have it as their source, too."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback or parsed.is_unspecified:  # an unspecified address leads to this machine as well
        return True
    family = socket.AF_INET6 if parsed.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # of a datagram socket, which sends nothing
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == parsed
        except OSError:
            return False


def headers() -> dict[str, str]:
    return {"User-Agent": "imagine-tpu loadtest"} | credentials()


async def described(target: Target) -> dict[str, Any] | None:
    """The model as GET /v1/models describes it; None if the server has no such route."""
    async with session(headers()) as opened:
        try:
            timeout = aiohttp.ClientTimeout(total=REACH_S)
            async with opened.get(f"{target.url}/v1/models", timeout=timeout, allow_redirects=False) as answer:
                if answer.status in (401, 403):
                    needs = f"Put an API key into the environment: {API_KEY}."
                    raise UsageError(f"{target.url} answers {answer.status}. {needs}")
                if answer.status == 503:
                    raise UsageError(f"{target.url} is not ready: {(await answer.text())[:300]}")
                return dict((await answer.json())["data"][0]) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UsageError(
                f"Nothing answers at {target.url} ({type(error).__name__}). Start the local cluster: make up deploy"
            ) from None
        except (ValueError, KeyError, IndexError, TypeError):
            return None


def begin(
    scenario: Scenario,
    requests: Sequence[Planned],
    name: str,
    target: Target,
    folder: Path,
    model: Mapping[str, Any] | None,
) -> None:
    """Makes the folder of the run, with run.json."""
    try:
        folder.mkdir(parents=True, exist_ok=False)
    except OSError as error:
        raise UsageError(f"The folder of the run cannot be made: {error}.") from None
    head = {
        "name": name,
        "url": target.url,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "planned": None if open_ended(scenario) else len(requests),
        "plan": fingerprint(requests),
        "model": model,
        "scenario": scenario.model_dump(mode="json", exclude_none=True),
    }
    (folder / "run.json").write_text(json.dumps(head, indent=2) + "\n")


def open_ended(scenario: Scenario) -> bool:
    """Whether a time ends the run, not a number of requests."""
    return isinstance(scenario.arrivals, Closed) and scenario.arrivals.requests is None


def left_over(folder: Path, scenario: Scenario, head: Mapping[str, Any]) -> tuple[Sequence[Planned], float, int]:
    """The requests still to be sent, the second of the run at which to continue, and the number of sessions so far."""
    requests = plan(scenario)
    if fingerprint(requests) != head["plan"]:
        raise UsageError(
            f"{folder} cannot go on: its scenario makes other requests now. Has a file of prompts changed?"
        )
    if not (folder / "requests.jsonl").exists():
        return requests, 0.0, 0
    before = read(folder)
    todo, offset = remaining(requests, {record.id for record in before.records})
    if isinstance(scenario.arrivals, Closed):
        offset = max((record.done for record in before.records), default=0.0)
    return todo, offset, len(before.sessions)


async def carry_out(folder: Path, target: Target, *, keep_pictures: bool) -> str:
    """Carries out a run, or the rest of it, and returns why it ended."""
    head = json.loads((folder / "run.json").read_text())
    scenario = Scenario.model_validate(head["scenario"])
    todo, offset, sessions = left_over(folder, scenario, head)
    clock = Clock(offset=offset)
    pictures = folder / "pictures" if keep_pictures else None
    if pictures:
        pictures.mkdir(exist_ok=True)
    progress = Progress(planned=None if open_ended(scenario) else len(todo))
    stop, over = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    size = ((head.get("model") or {}).get("defaults") or {}).get("size")
    async with contextlib.AsyncExitStack() as stack:
        journal = stack.enter_context(Journal(folder / "requests.jsonl"))
        timeline = stack.enter_context(Journal(folder / "timeline.jsonl"))
        checkers = stack.enter_context(ThreadPoolExecutor(CHECKERS, thread_name_prefix="check"))
        client = Client(
            session=await stack.enter_async_context(session(headers())),
            url=target.url,
            timeout_s=scenario.timeout_s,
            clock=clock,
            check=scenario.checks.pictures,
            default_size=size,
            equal_seeds=EqualSeeds.of([planned.request for planned in todo], scenario.checks.tolerance),
            checkers=checkers,
            pictures=pictures,
        )
        asking = await stack.enter_async_context(session(headers()))
        watcher = Watcher(target.url, asking, target.dashboard, timeline)
        await watcher.sample_once()  # the state before the load
        clock.start()
        journal.write({"session": sessions, "epoch": clock.epoch, "offset": clock.offset})
        title = f"{head['name']} against {target.url}"
        display = stack.enter_context(Display(title, progress, clock, scenario.duration_s, watcher.samples))
        showing = asyncio.create_task(every(REFRESH_S, over, display.show))
        watching = asyncio.create_task(watcher.watch(scenario.watch.interval_s, over))
        try:
            load = Load(scenario, client, clock, journal, progress, stop)
            await load.run(todo)
            ended = "interrupted" if stop.is_set() else "complete"
            if ended == "complete":
                await settle(watcher, scenario.watch.settle_s, stop, display)
            journal.write({"ended": ended})
        finally:
            over.set()
            await asyncio.gather(showing, watching)
    return ended


async def settle(watcher: Watcher, longest_s: float, stop: asyncio.Event, display: Display) -> None:
    """Waits until replicas and nodes are as before the load, since scale-down is part of the test."""
    deadline = time.monotonic() + longest_s
    before = watcher.cluster()
    while time.monotonic() < deadline and not stop.is_set() and not watcher.settled(before):
        left = deadline - time.monotonic()
        display.note = f"the load is over; waiting for replicas and nodes to go, {left:.0f} s at most"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await stop.wait()
