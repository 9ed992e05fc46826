"""cluster/config/lint.py: the shipped files have no findings, and the command's output and exit status."""

import importlib
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules

import pytest

from cluster import ROOT
from cluster.cli import run_command
from cluster.config import lint as linter
from cluster.config import rules
from cluster.config.lint import lint, main
from tests.cluster.slips import ACTOR, CLUSTER, MODEL, SCALING, SERVE, edited, findings_of, put, rename

FOR_GPUS = sorted((ROOT / "configs").glob("*-gpu.yaml"))  # no cluster file has any
SHIPPED = [
    ROOT / "serve_config.yaml",
    ROOT / "cluster.yaml",
    *sorted({*(ROOT / "configs").glob("*.yaml")} - {*FOR_GPUS}),
]


@pytest.fixture(autouse=True)
def short_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Messages name files as the command line does."""
    monkeypatch.chdir(tmp_path)


def test_the_shipped_files_have_no_findings() -> None:
    assert [str(finding) for files in (SHIPPED, FOR_GPUS) for finding in lint(files)] == []


def test_every_rule_is_in_a_list() -> None:
    """A function check_... of a module of rules that stands in no list of lint.py would never run."""
    lists = [value for name, value in vars(linter).items() if name.endswith("_RULES")]
    listed = {rule for each in lists for rule in each}
    modules = [importlib.import_module(f"{rules.__name__}.{module.name}") for module in iter_modules(rules.__path__)]
    written = {function for module in modules for name, function in vars(module).items() if name.startswith("check_")}
    assert written == listed


def test_the_files_that_tests_put_slips_into_have_no_findings(tmp_path: Path) -> None:
    assert findings_of(tmp_path, SERVE, CLUSTER) == []


NEITHER = "it has neither applications, as a Serve config, nor available_node_types, as a cluster file."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [\n", "2: error: it is not YAML: expected the node content, but found '<stream end>'."),
        ("applicatons: []\n", f"1: error: {NEITHER} Did you mean applications?"),
        ("", f"1: error: {NEITHER}"),
        ("- applications\n", f"1: error: {NEITHER}"),
        ("applications: 3\n", "1: error: applications is not valid: Input should be a valid list, got 3."),
        ("available_node_types: 3\n", "1: error: available_node_types is not valid: 3 is not of type 'object'."),
    ],
)
def test_a_file_that_cannot_be_checked_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "slip.yaml").write_text(text)
    assert f"slip.yaml:{message}" in [str(finding) for finding in lint([Path("slip.yaml")])]


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "slip.yaml").write_bytes(b"\xff\xfe\x00")
    (finding,) = lint([tmp_path / "slip.yaml"])
    assert "it is not text in UTF-8" in finding.text


def test_findings_are_sorted_by_line(tmp_path: Path) -> None:
    slips = [rename(("http_options", "port"), "prt"), put((*MODEL, "max_ongoing_requests"), 9)]
    slips += [rename((*ACTOR, "num_cpus"), "cpus"), put((*SCALING, "max_replicas"), 7)]
    findings = findings_of(tmp_path, edited(SERVE, *slips), CLUSTER)
    lines = [int(finding.split(":")[1]) for finding in findings]
    assert len(findings) == 4 and lines == sorted(lines)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cluster.config.lint", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return int(caught.value.code or 0)


def test_advice_leaves_the_exit_status_at_0_and_errors_make_it_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = tmp_path / "serve.yaml"
    serve.write_text(put(("proxy_location",), "EveryNode")(SERVE))
    assert run(monkeypatch, "serve.yaml") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Checked serve.yaml: no errors, 1 advice."
    serve.write_text(rename(("http_options", "port"), "prt")(SERVE))
    assert run(monkeypatch, "serve.yaml") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Checked serve.yaml: 1 error, no advice."


def test_a_wrong_call_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--fix"], ["nowhere.yaml"]):
        assert run(monkeypatch, *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err == "nowhere.yaml cannot be read: No such file or directory.\n"


@pytest.mark.slow
def test_the_command_checks_the_shipped_files() -> None:
    command = [sys.executable, "-m", "cluster.config.lint", "serve_config.yaml", "cluster.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Checked serve_config.yaml, cluster.yaml: no errors, no advice.\n")
