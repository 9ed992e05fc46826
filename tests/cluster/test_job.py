"""cluster/job.py without a cluster; tests/on_cluster/test_jobs.py submits."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package

from cluster import ROOT
from cluster.cli import UserError
from cluster.job import TRAVELS, amounts, modules, packed, words


def test_the_code_travels_to_a_head_elsewhere_and_nothing_else_does(tmp_path: Path) -> None:
    runtime_env = packed()
    create_package(runtime_env["working_dir"], tmp_path / "code.zip", True, excludes=runtime_env["excludes"])
    with ZipFile(tmp_path / "code.zip") as package:
        files = package.namelist()
    assert {file.partition("/")[0] for file in files} == set(TRAVELS)
    assert "jobs/entry.py" in files and "configs/sd14.yaml" in files and not [f for f in files if f.endswith(".pyc")]


def test_each_job_has_a_help_that_says_what_it_does() -> None:
    assert {"batch_generate", "compile_ahead", "evaluate", "fetch_weights", "train_demo"} <= set(modules())
    assert not {"batch_worker", "entry", "hub", "prompts", "scenes", "settings", "unfinished"} & set(modules())
    for module in modules().values():
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert text.startswith('"""') and f"python -m {module}" in text.partition('"""\n')[0]


@pytest.mark.parametrize("text", ["4", "[]", '{"TPU": 0}', '{"TPU": true}', '{"TPU": "4"}', "{TPU: 4}"])
def test_resources_are_json_of_amounts(text: str) -> None:
    with pytest.raises(UserError, match="RESOURCES must be JSON such as"):
        amounts(text)
    assert amounts("") == {} and amounts('{"TPU": 4}') == {"TPU": 4.0}


def test_arguments_are_read_as_a_shell_reads_them() -> None:
    assert words("--out 'a b' --count 3") == ["--out", "a b", "--count", "3"]
