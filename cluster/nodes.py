"""The nodes as Ray's autoscaler reports them: running, pending, failed. Knows nothing of where the cluster runs.

It reads the text of `ray status` and the autoscaler's log, both through the dashboard.
"""

import json
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.dashboard import Dashboard, Details
from cluster.terminal import say

LINES = 2000  # of the log, about ten minutes
EVENTS = 20  # printed at most
POLL_S = 1.0
# A line of monitor.log has a time, a level, a source file and a text. Only SOURCES report launches and failures; the
# rest is bookkeeping, several lines a second.
LINE = re.compile(r"\S+ (?P<time>[\d:]+),\d+\s+\w+ (?P<source>\w+)\.py:\d+ -- (?P<text>.*)")
SOURCES = ("event_logger", "node_provider")
INSTANCE = re.compile(r"[0-9a-f-]{36}: (\w+),.*")


@dataclass(frozen=True)
class Nodes:
    running: Counter[str]  # by type, idle ones included
    pending: list[str]

    def rows(self) -> Iterator[str]:
        yield ", ".join(f"{count} {name}" for name, count in sorted(self.running.items())) or "none yet"
        if self.pending:
            yield f"pending: {'; '.join(self.pending)}"


def status(dashboard: Dashboard) -> Nodes:
    with dashboard.open("/api/cluster_status", format=1) as answer:
        return parsed(json.load(answer)["data"]["clusterStatus"])


def parsed(text: str) -> Nodes:
    """Parses `ray status`: "Node status" has sections, each a word with a colon and indented lines below."""
    sections: dict[str, list[str]] = {}
    section = ""
    for line in text.partition("Node status")[2].partition("\n\n")[0].splitlines():
        if line.endswith(":") and not line.startswith(" "):
            section = line[:-1]
        elif section and not line.startswith(" ("):  # (no pending nodes)
            sections.setdefault(section, []).append(line.strip())
    running: Counter[str] = Counter()
    for line in sections.get("Active", []) + sections.get("Idle", []):
        count, _, name = line.partition(" ")
        running[name] += int(count)
    pending = [INSTANCE.sub(r"\1, starting", line) for line in sections.get("Pending", [])]
    return Nodes(running, pending)


def past(dashboard: Dashboard) -> list[str]:
    return [*events(dashboard.log(log_place(dashboard), lines=LINES))]


def failure(past: list[str]) -> str:
    """The last failed launch, unless one has succeeded since.

    `ray status` gives no reason, and counts every node that ended as a failure, even one that it ended itself.
    """
    for event in reversed(past):
        if "  Launched " in event:
            break
        if "  Failed to launch " in event:
            return event
    return ""


def monitor(dashboard: Dashboard, follow: bool) -> None:
    """Prints the nodes and the autoscaler's events: once, or with `follow` whenever they change."""
    if not follow:
        for event in past(dashboard)[-EVENTS:]:
            say(event)
        say(time.strftime("%X  ") + ", ".join(status(dashboard).rows()))
        return
    news: queue.Queue[str] = queue.Queue()
    threading.Thread(target=listen, args=(dashboard, news.put), daemon=True).start()
    before = ""
    while True:
        time.sleep(POLL_S)  # first, so that past events come before the present nodes
        current = "; ".join(status(dashboard).rows())
        while not news.empty():
            say(news.get())
        if current != before:
            say(time.strftime("%X  ") + current)
        before = current


def listen(dashboard: Dashboard, receive: Callable[[str], None]) -> None:
    for event in events(dashboard.log(log_place(dashboard), lines=200, follow=True)):
        receive(event)


def events(lines: Iterator[str]) -> Iterator[str]:
    """The events in the autoscaler's log, without direct repetitions."""
    before = ""
    for line in lines:
        match = LINE.match(line)
        if match and match["source"] in SOURCES and match["text"] != before:
            before = match["text"]
            yield f"{match['time']}  {before}"


def log_place(dashboard: Dashboard) -> Details:
    with dashboard.open("/nodes", view="summary") as answer:
        raylets: list[Details] = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
    head = next((node["nodeId"] for node in raylets if node.get("isHeadNode")), "")
    return {"node_id": head, "filename": "monitor.log"}
