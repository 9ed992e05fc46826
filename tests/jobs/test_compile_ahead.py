"""Compiling for TPU hosts that are not there. tests/on_cluster covers compiling on the cluster."""

import io
import json
import os
import pickle
import pickletools
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.aot.jax_internals import ENVELOPE
from app.aot.libtpu_flags import VARIABLE, set_flags
from app.aot.store import read
from capacity import libtpu
from cluster import ROOT
from jobs import compile_ahead, entry
from tests import tiny
from tests.clusters import in_this_process

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    content["applications"][0]["args"] |= {
        **{"sizes": ["64x64"], "batch_buckets": [1], "dtype": "bfloat16", "edits": False},
        "model": str(tiny.write_checkpoint(tmp_path / "model", "tiny-sd2", tiny.tensor_shapes()["tiny-sd2"])),
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "small.yaml"


def arguments(config: Path, tpu: str, out: Path) -> list[str]:
    return ["--config", str(config), "--tpu", tpu, "--out", str(out)]


def ahead(config: Path, tpu: str, out: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "jobs.compile_ahead", *arguments(config, tpu, out)]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("tpu", "sentence"),
    [
        ("v5litepod-16", "--tpu: must be one host, v4-8, v5litepod-1,"),
        ("v5litepod-8", "--tpu: v5litepod-8 has 8 chips, and the config's replicas ask for 4."),
    ],
)
def test_a_host_that_does_not_suit_is_refused_in_one_line(
    config: Path, tmp_path: Path, tpu: str, sentence: str
) -> None:
    command = ["compile_ahead", *arguments(config, tpu, tmp_path / "out")]
    ended = in_this_process(partial(entry.run, compile_ahead.main), command)
    assert ended.returncode == 2
    assert ended.stderr.startswith(sentence) and ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def names_in(pickled: bytes) -> set[tuple[str, str]]:
    """The names that loading the pickle looks up."""
    names = set()

    class Looking(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            names.add((module, name))
            return super().find_class(module, name)

        def persistent_load(self, pid: Any) -> Any:
            return None

    try:
        Looking(io.BytesIO(pickled)).load()
    except Exception:  # where it would need the devices
        pass
    return names


@pytest.mark.skipif(bool(libtpu.missing()), reason=libtpu.missing())
def test_programs_for_a_host_that_is_not_there_are_what_its_replica_looks_for(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "programs"
    ended = ahead(config, "v5litepod-4", out)
    assert ended.returncode == 0, ended.stderr
    assert f"{out} has all 8 programs for TPU v5 lite, 8 of them compiled now" in ended.stdout
    flags: dict[str, str] = {}
    set_flags(flags)
    for file in out.glob("*.xla"):
        saved = read(file)
        facts = saved.header["key"]["fingerprint"]
        assert facts["platform"] == "tpu" and facts["device"] == "TPU v5 lite"
        assert facts["devices"] == "4 of 4 in 1 processes" and "host" not in facts
        assert facts["libtpu"] == libtpu.version() and facts[VARIABLE] == flags[VARIABLE]
        assert saved.header["devices"] == [0, 1, 2, 3]
        content = zlib.decompress(saved.payload)
        assert {("jaxlib._jax", "DeviceList"), ("jax._src.mesh", "Mesh")} <= names_in(content) <= ENVELOPE
        assert len(pickletools.optimize(content)) > 10_000  # the program itself
    about = json.loads((out / "published.json").read_text())
    assert about["fingerprint"]["device"] == "TPU v5 lite"
    again = ahead(config, "v5litepod-4", out)
    assert again.returncode == 0 and "0 of them compiled now" in again.stdout
