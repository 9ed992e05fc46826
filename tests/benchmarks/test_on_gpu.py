"""benchmarks/on_gpu.py on a machine without a GPU: its parts fail and hang, and what they measured stays."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import gpu_ours, on_gpu
from benchmarks.gpu_ours import Bare, with_random_weights
from benchmarks.on_gpu import PARTS, Report, bars, run_part, verdict
from benchmarks.paced import Pace, PacedPipeline
from capacity.models import shapes_of
from cluster import ROOT
from tests.tiny import tensor_shapes, write_checkpoint

TELLS = "from benchmarks.on_gpu import tell\ntell('step_ms.2', 6.5)\n"
MEASURED = {
    "ours": {"step_ms.2": 7.0, "step_ms.32": 67.0, "lone_s": 0.2, "bare_lone_s": 0.2, "images_s": 9.0},
    "compiled": {"step_ms.32": 60.0, "graph_ms.2": 6.4},
}


def child(program: str, note: Report) -> str:
    return run_part([sys.executable, "-P", "-c", TELLS + program], 60, note)


def test_what_a_part_has_told_stays_where_it_fails() -> None:
    values: dict[str, Any] = {}
    assert child("raise SystemExit(3)", values.__setitem__).startswith("failed with status 3")
    assert values == {"step_ms.2": 6.5}


def test_what_a_part_has_told_stays_where_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit passes as soon as it has told something."""
    values: dict[str, Any] = {}
    timers: list[Timer] = []

    def timer(limit_s: float, end: Callable[[], None]) -> Timer:
        timers.append(Timer(limit_s, end))
        return timers[-1]

    def note(name: str, value: Any) -> None:
        values[name] = value
        timers[-1].function()

    monkeypatch.setattr(threading, "Timer", timer)
    assert child("import signal\nwhile True: signal.pause()", note).startswith("ended after")
    assert values == {"step_ms.2": 6.5}


def test_a_part_ends_with_the_script() -> None:
    def interrupted(name: str, value: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child("import signal\nwhile True: signal.pause()", interrupted)


def test_a_bar_whose_values_are_missing_is_not_met() -> None:
    most, least, lone, saturated = (verdict(bar, MEASURED) for bar in bars(16))
    assert (most["met"], least["met"], lone["met"], saturated["met"]) == (False, True, True, False)
    assert least["ratio"] == pytest.approx(7.0 / 6.4) and saturated["ratio"] is None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return on_gpu.main()


def test_the_table_and_the_file_have_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(command: Sequence[str], limit_s: float, note: Report) -> str:
        name = command[command.index("--part") + 1]
        for key, value in MEASURED.get(name, {}).items():
            note(key, value)
            assert json.loads((tmp_path / "bench-gpu.json").read_text())["values"][name][key] == value, "at once"
        return "done in 1 s" if name in MEASURED else "failed with status 1 after 1 s"

    monkeypatch.setattr(on_gpu, "run_part", part)
    assert run(monkeypatch, "--out", str(tmp_path)) == 1
    written = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert written["parts"].keys() == PARTS.keys() and len(written["bars"]) == 4
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2", "7.00", "6.40"] in lines and ["32", "67.00", "60.00"] in lines
    assert ["step", "of", "32", "rows", "over", "torch.compile", "1.117", "at", "most", "1", "MISSED"] in lines


def test_a_part_for_which_no_time_is_left_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--minutes", "0.01", "--out", str(tmp_path)) == 1
    parts = json.loads((tmp_path / "bench-gpu.json").read_text())["parts"]
    assert set(parts.values()) == {"left out: no time was left"}


def test_the_bare_verbs_and_the_engine_are_measured_alike() -> None:
    pipeline: Any = PacedPipeline(Pace(chips=2, step_s=1e-4, decode_steps=1.0), batch_buckets=[1, 2], size=(16, 8))
    values: dict[str, Any] = {}
    bare = Bare(pipeline)
    assert bare.step_s(4) > 0
    bare.serve(values.__setitem__, steps=3)
    gpu_ours.serve(values.__setitem__, pipeline, steps=3)
    names = {name for bar in bars(2) for name in (bar.ours[1], bar.baseline[1]) if not name.endswith(("ms.2", "ms.4"))}
    assert names <= values.keys() and values["compiles_while_serving"] == 0
    json.dumps(values)


@pytest.mark.slow
def test_random_weights_are_finite_and_have_the_shapes_of_the_checkpoint(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "tiny-sd1", tensor_shapes()["tiny-sd1"])
    checkpoint = shapes_of(str(model), jax.numpy.bfloat16)
    for network in checkpoint.networks.values():
        shapes, weights = (jax.tree.leaves(nnx.state(module)) for module in (network, with_random_weights(network)))
        assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in weights]
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in weights)


@pytest.mark.parity
def test_every_part_runs_with_a_tiny_model_on_the_cpu(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "tiny-sd1", tensor_shapes()["tiny-sd1"])
    options = ["--tiny", "--model", str(model), "--size", "32", "16", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.on_gpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    written = json.loads((tmp_path / "bench-gpu.json").read_text())
    others = {name: outcome for name, outcome in written["parts"].items() if name != "compiled"}
    assert all(outcome.startswith("done") for outcome in others.values()), done.stdout + done.stderr[-3000:]
    for part in ("ours", "diffusers", "xla_attention"):
        assert written["values"][part]["step_ms.2"] > 0
    assert written["values"]["restart"]["restart_compiles"] == 0
