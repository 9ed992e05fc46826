"""Runs from the command line against a server on loopback, some in processes of their own."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cluster import ROOT
from cluster.cli import UsageError, run_command
from loadtest.__main__ import main
from loadtest.records import read
from loadtest.scaling import PHASES
from loadtest.summary import summarize
from tests.clusters import in_this_process
from tests.picture_server import Server, picture_server

pytestmark = pytest.mark.slow

LIMIT_S = 120


@pytest.fixture
def server() -> Iterator[Server]:
    with picture_server() as server:
        yield server


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "loadtest", *arguments, "--out", str(folder), "--run-dir", str(folder / "none")]


def loadtest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return in_this_process(partial(run_command, main), command(folder, *arguments)[2:])


def loadtest_apart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which shares no interpreter lock with the server."""
    return subprocess.run(command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)


def prompts(folder: Path, *lines: str) -> str:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines))
    return str(path)


def only_run(folder: Path) -> Path:
    (run,) = [path.parent for path in folder.glob("*/run.json")]
    return run


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((only_run(folder) / "summary.json").read_text())
    return summary


def ran(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a run without failed requests. On a busy machine it may be invalid, with status 3."""
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, "a single line"
    return done.stderr.strip()


# The validity of a run


def test_a_stall_of_five_seconds_shows_in_the_percentiles(server: Server, tmp_path: Path) -> None:
    """Coordinated omission: of 8 s with 20 requests a second the server stalls for 5 s.

    Half of the requests wait, 2.5 s on average. A closed-loop client would count a single slow request.
    """
    server.stall = (20, 5.0)
    flags = ("--process", "constant", "--rate", "20", "--duration", "8", "--repeat", "0")
    ran(loadtest(tmp_path, "--url", server.url, *flags))
    summary = summary_of(tmp_path)
    assert summary["latency"]["p50"] > 0.8 and summary["latency"]["p95"] > 4.0 and summary["latency"]["max"] > 4.6
    slow = [record for record in read(only_run(tmp_path)).records if record.latency > 0.5]
    assert len(slow) >= 74, "about 90 come in the 4.5 s that the stall has left at half a second or more"


def test_a_run_that_sends_late_is_invalid(server: Server, tmp_path: Path) -> None:
    slow = prompts(tmp_path, "delay 0.5")
    ran(loadtest(tmp_path, "--url", server.url, "--rate", "20", "--duration", "2", "--prompts", slow))
    folder = only_run(tmp_path)
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    for lag, reasons in ((0.004, 0), (0.05, 1)):
        for line in lines:
            if "sent" in line:
                line["sent"] = line["intended"] + lag
        (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert len(summarize(read(folder))["invalid"]) == reasons
    (reason,) = summarize(read(folder))["invalid"]
    assert re.match(r"requests were sent late: p95 of the send lag is 50 ms, and [\d.]+ ms is allowed", reason)
    again = in_this_process(partial(run_command, main), ["loadtest", "report", str(folder)])
    assert f"INVALID     {reason}" in again.stdout and reason in (folder / "report.html").read_text()


def test_failures_are_counted_by_class_and_the_exit_status_is_1(server: Server, tmp_path: Path) -> None:
    kinds = prompts(tmp_path, "a", "status 503", "status 500", "blank", "reset")
    done = loadtest(
        tmp_path, "--url", server.url, "--requests", "40", "--concurrency", "40", "--prompts", kinds, "--repeat", "0"
    )
    assert done.returncode == 1
    outcomes = summary_of(tmp_path)["outcomes"]
    assert set(outcomes) == {"ok", "shed", "server_error", "bad_image", "reset"} and sum(outcomes.values()) == 40
    assert f"40 of 40, {40 - outcomes['ok']} failed" in done.stdout
    assert f"{outcomes['shed']} shed: 503 because: in words" in done.stdout


def test_requests_beyond_max_in_flight_fail_as_the_clients_overload(server: Server, tmp_path: Path) -> None:
    slow = prompts(tmp_path, "delay 3")
    done = loadtest(
        tmp_path,
        *("--url", server.url, "--rate", "20", "--duration", "1", "--process", "constant", "--repeat", "0"),
        *("--prompts", slow, "--max-in-flight", "5"),
    )
    summary = summary_of(tmp_path)
    assert done.returncode == 1 and summary["outcomes"] == {"ok": 5, "client_overload": 15}
    assert "INVALID" in done.stdout and "15 requests were never sent" in done.stdout and len(server.seen) == 5


def test_the_warm_up_is_sent_but_not_counted(server: Server, tmp_path: Path) -> None:
    flags = ("--rate", "10", "--duration", "3", "--process", "constant", "--warmup", "1")
    ran(loadtest(tmp_path, "--url", server.url, *flags))
    summary = summary_of(tmp_path)
    assert (summary["requests"], summary["counted"], summary["latency"]["count"]) == (30, 20, 20)
    assert summary["offered_per_s"] == pytest.approx(10)


# The predecessor's command line


def test_the_predecessors_flags_still_work(server: Server, tmp_path: Path) -> None:
    output = ran(
        loadtest(tmp_path, "--url", server.url, "--num_requests", "12", "--batch_size", "3", "--save_pictures")
    )
    run = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert run["scenario"]["arrivals"] == {"process": "closed", "concurrency": 3, "requests": 12}
    assert len(server.seen) == 12
    sheet = only_run(tmp_path) / "diffusion_results.png"
    assert str(sheet) in output and sheet.read_bytes().startswith(b"\x89PNG")
    assert not (only_run(tmp_path) / "pictures").exists(), "single pictures only on request"


def test_the_default_is_8_requests_by_8_clients(server: Server, tmp_path: Path) -> None:
    ran(loadtest(tmp_path, "--url", server.url, "--save-each"))
    run = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert run["scenario"]["arrivals"] == {"process": "closed", "concurrency": 8, "requests": 8}
    assert len([*(only_run(tmp_path) / "pictures").iterdir()]) == 8


def test_an_ip_alone_means_port_8000(tmp_path: Path) -> None:
    assert "127.0.0.2:8000" in refused(loadtest(tmp_path, "--ip", "127.0.0.2"))


# Killed, resumed, replayed


def test_a_killed_run_can_be_resumed(server: Server, tmp_path: Path) -> None:
    flags = ("--url", server.url, "--rate", "20", "--duration", "4", "--process", "constant", "--repeat", "0")
    process = subprocess.Popen(command(tmp_path, *flags), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT_S
    while len(server.seen) < 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = only_run(tmp_path)
    journal = folder / "requests.jsonl"
    first, *others = journal.read_text().splitlines()
    session = json.loads(first)
    session["epoch"] -= 3600  # so long ago was it killed
    journal.write_text("\n".join([json.dumps(session), *others, '{"id": 79, "kin']))  # a torn line
    killed = read(folder)
    before = {record.id for record in killed.records}
    assert killed.ended is None and 20 <= len(before) < 80
    ran(loadtest(tmp_path, "run", "--resume", str(folder)))
    run = read(folder)
    assert sorted(record.id for record in run.records) == [*range(80)] and run.ended == "complete"
    assert len(run.sessions) == 2 and run.sessions[1].offset == pytest.approx(min({*range(80)} - before) / 20)
    assert max(record.latency for record in run.records) < 60, "the pause is no latency"
    assert summary_of(tmp_path)["sessions"] == 2
    assert len(server.seen) <= 80 + 5, "only what was under way is sent again"
    assert "nothing is left to send" in refused(loadtest_apart(tmp_path, "run", "--resume", str(folder)))


def test_a_run_with_changed_prompts_cannot_be_resumed(server: Server, tmp_path: Path) -> None:
    flags = ("--url", server.url, "--requests", "4", "--prompts", prompts(tmp_path, "a fox"))
    ran(loadtest(tmp_path, *flags))
    folder = only_run(tmp_path)
    lines = (folder / "requests.jsonl").read_text().splitlines()
    (folder / "requests.jsonl").write_text("\n".join(lines[:3]) + "\n")
    prompts(tmp_path, "a hen")
    output = refused(loadtest(tmp_path, "run", "--resume", str(folder)))
    assert "its scenario makes other requests now" in output


def test_an_interrupted_run_writes_its_report_and_can_be_resumed(server: Server, tmp_path: Path) -> None:
    flags = ("--url", server.url, "--rate", "10", "--duration", "30", "--repeat", "0")
    process = subprocess.Popen(command(tmp_path, *flags), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT_S
    while len(server.seen) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 130 and "report.html" in output
    assert summary_of(tmp_path)["ended"] == "interrupted" and summary_of(tmp_path)["failed"] == 0


def test_the_record_of_a_run_is_a_trace_that_can_be_replayed(server: Server, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ran(loadtest(first, "--url", server.url, "--rate", "10", "--duration", "2"))
    seen = [{**request} for request in server.seen]
    trace = str(only_run(first) / "requests.jsonl")
    ran(loadtest(second, "--url", server.url, "--replay", trace, "--speed", "2"))
    again = server.seen[len(seen) :]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, seen))
    times = [sorted(record.intended for record in read(only_run(folder)).records) for folder in (first, second)]
    assert times[1] == pytest.approx([(at - times[0][0]) / 2 for at in times[0]])


# Reports


class Addresses(HTMLParser):
    """Collects everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [
            f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "data", "action")
        ]


def test_the_report_is_a_file_that_fetches_nothing_and_escapes_its_text(server: Server, tmp_path: Path) -> None:
    evil = prompts(tmp_path, "status 500</script><script>alert(1)</script>", "a <b>bold</b> fox")
    loadtest(tmp_path, "--url", server.url, "--requests", "30", "--prompts", evil, "--field", "user=<i>me</i>")
    folder = only_run(tmp_path)
    page = (folder / "report.html").read_text()
    parser = Addresses()
    parser.feed(page)
    assert parser.references == [] and "@import" not in page and "url(http" not in page
    assert "<script>alert" not in page and "<i>me" not in page
    for words in ("Over time", "Latency by percentile", "from the intended time", "The scenario, as it was run"):
        assert words in page
    rows = [*csv.DictReader((folder / "requests.csv").read_text().splitlines())]
    assert len(rows) == 30 and float(rows[0]["latency"]) == pytest.approx(
        float(rows[0]["done"]) - float(rows[0]["intended"])
    )


def test_two_runs_are_compared_with_ratios(server: Server, tmp_path: Path) -> None:
    for name, delay in (("quick", "delay 0.1"), ("slow", "delay 0.3")):
        flags = ("--requests", "16", "--prompts", prompts(tmp_path, delay))
        ran(loadtest(tmp_path / name, "--url", server.url, *flags))
    folders = [str(only_run(tmp_path / name)) for name in ("quick", "slow")]
    done = in_this_process(partial(run_command, main), ["loadtest", "compare", *folders], {"COLUMNS": "150"})
    (row,) = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("latency p50")]
    assert done.returncode == 0 and float(row[-1]) == pytest.approx(3, rel=0.4), done.stdout


def test_a_sweep_finds_the_knee_of_a_server(server: Server, tmp_path: Path) -> None:
    """The server answers one request at a time in 40 ms, so 25 a second."""
    turns = prompts(tmp_path, "turn 0.04")
    done = loadtest_apart(
        tmp_path,
        *("sweep", "--url", server.url, "--prompts", turns, "--repeat", "0", "--process", "constant"),
        *("--from", "8", "--duration", "3", "--objective", "0.4"),
    )
    # A busy machine stalls both: then a lower knee is right, or none.
    least = 0 if "but the generator itself was late" in done.stdout else 16
    sweep = json.loads(next(tmp_path.glob("sweep-*/sweep.json")).read_text())
    knee, page = sweep["knee"] or 0, next(tmp_path.glob("sweep-*/sweep.html")).read_text()
    assert least <= knee <= 30, done.stdout
    assert done.returncode == (0 if knee else 1) and ("The knee is at" in page) == (knee > 0), done.stdout + done.stderr
    assert "does not hold: only" in done.stdout
    assert (f"Knee        {knee:.3g} requests a second" in done.stdout) == (knee > 0)


# Mistakes


def test_another_machine_is_refused_without_the_flag(tmp_path: Path) -> None:
    for address in ("--url=http://192.0.2.1:8000", "--ip=192.0.2.1"):
        sentence = refused(loadtest(tmp_path, address))
        assert sentence.startswith("192.0.2.1 is another machine. A load test can bring a server down: ")
        assert sentence.endswith(" add --allow-remote.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("nowhere",),
            "There is no scenario nowhere; there are burst, edits, scale-up, smoke, soak, steady, or name a",
        ),
        (
            ("smoke", "--rate", "-1"),
            "smoke.yaml: arrivals.poisson.stages.0.rate: Input should be greater than or equal",
        ),
        (("--requests", "x"), "--requests/--num_requests: must be a whole number, got 'x'."),
        (("--rate", "nan"), "must be a number, got 'nan'"),
        (("--rate", "1", "--concurrency", "2"), "exclude one another"),
        (("--field", "n"), "must be NAME=VALUE"),
        (("--speed", "2"), "--speed needs --replay."),
        (("--replay", "gone.jsonl"), "gone.jsonl cannot be read"),
        (("--endpoint", "imagine", "--stream"), "need endpoint generations"),
        (("--url", "ftp://127.0.0.1"), "The URL must be like http://127.0.0.1:8000, got ftp://127.0.0.1."),
        (("--url", "http://127.0.0.1:9"), "Nothing answers at http://127.0.0.1:9"),
        (("run", "--resume", "gone"), "gone is not the folder of a load test"),
        (("--concurrency", "0"), "arrivals.closed.concurrency: Input should be greater than or equal to 1, got 0."),
        (("--requests", "0"), "arrivals.closed.requests: Input should be greater than or equal to 1, got 0."),
        (("--concurrency", "0", "--rate", "1"), "exclude one another"),
        (("--duration", "0"), "arrivals.closed.duration_s: Input should be greater than 0, got 0.0."),
        (("--url", ""), "--url: must not be empty."),
        (("--ip", ""), "--ip: must not be empty."),
        (("--scenario", ""), "--scenario: must not be empty."),
        (("--save_pictures=maybe",), "must be true or false, got 'maybe'"),
        (("--resume", "x", "--repeat", "0"), "--resume continues a run unchanged: --repeat cannot be given."),
        (("sweep", "--concurrency", "0"), "A sweep chooses its own rates: --concurrency cannot be given."),
        (("sweep", "--factor", "1"), "A sweep needs --from above 0, --factor above 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(loadtest(tmp_path, *arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ["{}", '{"session": 1}', "[1]", "7"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, entry: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "requests.jsonl").write_text(entry + "\n")
    with pytest.raises(UsageError, match="is not the folder of a load test: .* is no record\\.$"):
        read(tmp_path)


def test_a_folder_that_cannot_be_made_is_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "The folder of the run cannot be made" in refused(loadtest(tmp_path / "file", "--url", server.url))


def test_every_phase_of_a_scale_up_is_explained_in_the_report() -> None:
    assert list(PHASES) == ["decision", "node", "process", "weights", "compile", "ready", "first image"]
