"""app/api/prompt_files.py through both of its users: the jobs and the load test read the same prompts from a file."""

import json
from pathlib import Path

import pytest

from cluster.cli import UsageError
from jobs.prompts import Row, read
from jobs.replica_config import ReplicaConfig
from loadtest.plan import read_prompts, replayed
from loadtest.scenario import Replay

SETTINGS = ReplicaConfig.of({"model": "assets/demo-model", "sizes": ["128x128"]}, "here")
MARK = "\ufeff"  # Windows writes it first
ODD = "a\u2028red\u2029fox"  # str.splitlines takes either separator for the end of a line


def prompts(file: Path) -> list[str]:
    """The prompts, which both read the same."""
    for_load = [str(fields["prompt"]) for fields in read_prompts(file)]
    for_jobs = [row.generation.prompt for row in read(file, SETTINGS) if isinstance(row, Row)]
    assert for_load == for_jobs
    return for_load


def written(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.write_bytes(content.encode())
    return file


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", MARK])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("p.txt", ["a boat", "", "a tree"]),
        ("P.JSONL", ['{"prompt": "a boat"}', "", '{"prompt": "a tree"}']),
        ("p.csv", ["prompt,seed", "a boat,1", "a tree,"]),
    ],
)
def test_files_of_every_editor_are_read_the_same(
    tmp_path: Path, name: str, rows: list[str], mark: str, end: str
) -> None:
    assert prompts(written(tmp_path, name, mark + end.join([*rows, ""]))) == ["a boat", "a tree"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", f"{ODD}\na tree\n"),
        ("p.jsonl", json.dumps({"prompt": ODD}, ensure_ascii=False) + '\n{"prompt": "a tree"}\n'),
        ("p.csv", f'prompt\n"{ODD}"\na tree\n'),
    ],
)
def test_a_separator_within_a_line_does_not_end_it(tmp_path: Path, name: str, content: str) -> None:
    assert prompts(written(tmp_path, name, content)) == [ODD, "a tree"]


def test_the_load_test_reads_tables_and_their_numbers_as_numbers(tmp_path: Path) -> None:
    file = written(tmp_path, "p.csv", "prompt,seed,guidance_scale,size\na boat,7,2.5,64x64\na tree,,,\n")
    assert read_prompts(file) == [
        {"prompt": "a boat", "seed": 7, "guidance_scale": 2.5, "size": "64x64"},
        {"prompt": "a tree"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.md", b"a boat\n", r"p\.md must end in one of \.txt, \.csv, \.jsonl, \.parquet\."),
        ("p.txt", "ein Schloß".encode("latin-1"), r"p\.txt must be in UTF-8\."),
        ("p.txt", "a boat".encode("utf-16"), r"p\.txt must be in UTF-8\."),
        ("p.csv", b"prompt,seed\na,1,2\n", r"p\.csv:2: it must have 2 columns, as the first line says\."),
        ("p.csv", b"prompt;seed\n", r"the first line of .*p\.csv must name the columns, prompt among them\."),
    ],
)
def test_the_error_for_a_file_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_prompts(tmp_path / name)


def test_a_trace_may_have_a_byte_order_mark_and_line_separators(tmp_path: Path) -> None:
    entry = {"at": 0, "request": {"prompt": "a\u2028boat"}}
    trace = written(tmp_path, "trace", MARK + json.dumps(entry, ensure_ascii=False) + "\r\n")
    (planned,) = replayed(Replay(process="replay", trace=trace), 10)
    assert planned.request == {"prompt": "a\u2028boat"}
