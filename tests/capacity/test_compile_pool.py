"""Costs from workers and from files. The workers are scripts with fixed answers."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from app.types import PipelineSpec
from capacity import compile_pool, libtpu
from capacity.chips import host_of
from capacity.compile_pool import POSTPONED, CompileOutcome, CompileTask, compile_all
from capacity.model_names import MODEL_NAMES
from capacity.program_cost import ProgramCost

SPEC = PipelineSpec("demo", ((128, 128),), (1,), 20, dtype="bfloat16")
HOST = host_of("v5litepod-4")
COST = ProgramCost(
    chip="v5e",
    shards=1,
    compile_s=1.0,
    arguments=1,
    outputs=2,
    temporaries=3,
    code=4,
    tflop=5.0,
    bytes=6.0,
    cycles=7,
    padded_cycles=8,
    seconds=9.0,
    parts={"resnet": 7},
    notes=("a note",),
)
ANSWERS = f"""\
import json, os, sys, time
for line in sys.stdin:
    program = json.loads(line)["program"]
    if program == "crash":
        sys.exit(7)
    if program == "slow":
        time.sleep(600)
    while program.startswith("held") and not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    answers = {{"large": {{"too_large": "Used 20G"}}, "odd": {{"refused": "no"}}, "ours": {{"failed": "Traceback"}}}}
    print(json.dumps(answers.get(program, {{"cost": {asdict(COST)!r}}})), flush=True)
"""

Started = list[subprocess.Popen[str]]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    processes: Started = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ANSWERS, str(tmp_path / "go on")]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    monkeypatch.setattr(compile_pool, "start", start)
    monkeypatch.setattr(compile_pool, "WORKERS", 1)
    return processes


def tasks(*programs: str) -> list[CompileTask]:
    return [CompileTask(SPEC, HOST, program, f"key-{program}") for program in programs]


def quiet(task: CompileTask, outcome: CompileOutcome | None) -> None:
    pass


def test_costs_are_kept_and_a_second_run_starts_nothing(tmp_path: Path, started: Started) -> None:
    first = compile_all(tasks("step", "large"), tmp_path, quiet)
    assert [outcome.cost for outcome in first.values()] == [COST, None]
    assert [outcome.too_large for outcome in first.values()] == ["", "Used 20G"]
    assert len(started) == 1
    second = compile_all(tasks("step", "large"), tmp_path, quiet)
    assert [outcome.cost for outcome in second.values()] == [COST, None]
    assert all(outcome.cached for outcome in second.values())
    assert len(started) == 1


def test_a_crash_is_tried_again_then_reported_and_the_others_are_compiled(tmp_path: Path, started: Started) -> None:
    crashed, step = compile_all(tasks("crash", "step"), tmp_path, quiet).values()
    assert crashed.refused == "libtpu ended the process that compiled it, with status 7."
    assert step.cost == COST
    assert len(started) == 3
    assert all(process.poll() is not None for process in started)


def test_what_is_refused_is_tried_again_the_next_time(tmp_path: Path, started: Started) -> None:
    for _ in range(2):
        (outcome,) = compile_all(tasks("odd"), tmp_path, quiet).values()
        assert (outcome.refused, outcome.cached) == ("no", False)


def test_a_bug_of_ours_is_raised_with_the_workers_traceback(tmp_path: Path, started: Started) -> None:
    with pytest.raises(RuntimeError, match="Traceback"):
        compile_all(tasks("ours"), tmp_path, quiet)
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize("content", ["", "{", '{"cost": {"chip": "v5e"}}', "[]"])
def test_a_program_whose_file_is_damaged_is_compiled_again(tmp_path: Path, started: Started, content: str) -> None:
    (tmp_path / "key-step.json").write_text(content)
    (outcome,) = compile_all(tasks("step"), tmp_path, quiet).values()
    assert (outcome.cost, outcome.cached) == (COST, False)


def test_each_program_is_reported_when_it_starts_and_when_it_ends(tmp_path: Path, started: Started) -> None:
    reports: list[tuple[str, bool]] = []

    def report(task: CompileTask, outcome: CompileOutcome | None) -> None:
        reports.append((task.program, outcome is None))

    compile_all(tasks("a", "b"), tmp_path, report)
    assert reports == [("a", True), ("a", False), ("b", True), ("b", False)]


def test_where_memory_is_short_what_began_last_waits_until_the_other_has_ended(
    tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[tuple[str, str]] = []

    def report(task: CompileTask, outcome: CompileOutcome | None) -> None:
        word = "began" if outcome is None else "postponed" if outcome is POSTPONED else "ended"
        reports.append((task.program, word))
        if word == "postponed":
            (tmp_path / "go on").touch()

    class Memory:
        available = 0  # whoever else needs it: one program is compiled all the same

    monkeypatch.setattr(compile_pool, "WORKERS", 2)
    monkeypatch.setattr("psutil.virtual_memory", Memory)
    outcomes = compile_all(tasks("held 1", "held 2", "step"), tmp_path, report)
    assert [outcome.cost for outcome in outcomes.values()] == [COST] * 3
    (postponed,) = (program for program, word in reports if word == "postponed")
    assert [word for program, word in reports if program == postponed] == ["began", "postponed", "began", "ended"]
    ended = [program for program, word in reports if word == "ended"]
    assert sorted(ended) == ["held 1", "held 2", "step"] and ended[-1] == postponed
    assert all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_an_interruption_ends_the_workers_at_once(tmp_path: Path, started: Started) -> None:
    def interrupt() -> None:
        if started:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_all(tasks("slow"), tmp_path, quiet, interrupt)
    started[0].wait(timeout=60)
    assert len(started) == 1


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, started: Started) -> None:
    def interrupt() -> None:
        if list(tmp_path.iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_all(tasks("quick", "slow"), tmp_path, quiet, interrupt)
    (outcome,) = compile_all(tasks("quick"), tmp_path, quiet).values()
    assert outcome.cached and len(started) == 1


def test_a_worker_whose_parent_is_gone_ends_in_the_middle_of_its_work() -> None:
    command = "import os, queue, sys, time, threading; from capacity.compile_worker import listen; "
    command += "threading.Thread(target=listen, args=(queue.SimpleQueue(),)).start(); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=120) == 0


@pytest.mark.slow
@pytest.mark.skipif(bool(libtpu.missing()), reason=libtpu.missing())
def test_libtpu_models_the_programs_that_the_engine_runs(tmp_path: Path) -> None:
    """The real compiler, in real workers: the two smallest programs."""
    outcomes = compile_all(
        [CompileTask(SPEC, HOST, name, name) for name in ("encode", "insert 128x128")], tmp_path, quiet
    )
    encode, insert = (outcome.cost for outcome in outcomes.values())
    assert encode and insert, outcomes
    assert encode.seconds > insert.seconds > 0
    assert {"self-attention", "feed-forward"} <= set(encode.parts)
    assert encode.cycles == sum(encode.parts.values()) >= encode.padded_cycles > 0
    text = (Path(MODEL_NAMES["demo"]) / "text_encoder" / "model.safetensors").stat().st_size
    assert encode.arguments >= 0.4 * text  # bfloat16 weights, with what the layout pads
