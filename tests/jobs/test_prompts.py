"""jobs/prompts.py: what each kind of file says, what is wrong with a row, and which rows are the same."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import ROOT
from cluster.cli import UsageError
from jobs.batch_worker import row_of, text_of
from jobs.prompts import InvalidRow, Row, read
from jobs.replica_config import ReplicaConfig
from tests.api.image_files import file_of, gradient, mask_file

CONFIG = ReplicaConfig.of({"model": "assets/demo-model", "sizes": ["128x128", "64x64"]}, "here")


def rows(file: Path, config: ReplicaConfig = CONFIG) -> list[Row]:
    results = list(read(file, config))
    assert all(isinstance(row, Row) for row in results), results
    return [row for row in results if isinstance(row, Row)]


def errors_in(file: Path) -> dict[int, str]:
    return {row.number: row.error for row in read(file, CONFIG) if isinstance(row, InvalidRow)}


def written(tmp_path: Path, name: str, content: str) -> Path:
    file = tmp_path / name
    file.write_text(content)
    return file


def test_the_same_rows_are_the_same_in_every_kind_of_file(tmp_path: Path) -> None:
    records = [
        {"prompt": "a boat", "seed": 7, "guidance_scale": 3.5, "size": "64x64", "n": 2},
        {"prompt": "a tree, red"},
    ]
    names = ["prompt", "seed", "guidance_scale", "size", "n"]
    jsonl = written(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in records))
    csv = written(tmp_path, "a.csv", ",".join(names) + '\na boat,7,3.5,64x64,2\n"a tree, red",,,,\n')
    parquet = tmp_path / "a.parquet"
    floats = {"seed": pa.float64(), "n": pa.float64()}  # as pandas saves integers some of which are missing
    columns = {
        name: pa.array([row.get(name) for row in records], type=floats.get(name))  # type: ignore[attr-defined]
        for name in names
    }
    pq.write_table(pa.table(columns), parquet)
    assert rows(jsonl) == rows(csv) == rows(parquet)
    first, second = rows(jsonl)
    assert (first.generation.seed, first.generation.n, first.generation.width) == (7, 2, 64)
    assert first.files == [f"images/{first.key}-0.png", f"images/{first.key}-1.png"]
    assert first.made == [*first.files, f"rows/{first.key}.json"]
    assert second.generation.prompt == "a tree, red"


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    read_rows = rows(written(tmp_path, "a.txt", "a boat\n\na tree\n"))
    assert [row.generation.prompt for row in read_rows] == ["a boat", "a tree"]


def test_keys_and_drawn_seeds_do_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    few = rows(written(tmp_path, "few.txt", "a boat\na tree\n"))
    more = rows(written(tmp_path, "more.txt", "a cloud\na tree\na fish\na boat\n"))
    assert {(row.key, row.generation.seed) for row in few} < {(row.key, row.generation.seed) for row in more}


def test_a_row_that_stands_twice_is_two_rows_with_pictures_of_their_own(tmp_path: Path) -> None:
    first, second = rows(written(tmp_path, "a.txt", "a boat\na boat\n"))
    assert first.key != second.key and first.generation.seed != second.generation.seed


def test_rows_that_are_spelled_differently_and_mean_the_same_are_two_rows(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"seed": 1},
        {"seed": 1, "n": 1},
        {"seed": 1, "size": "128x128"},
        {"seed": 1},
        {"seed": 1, "n": 2},
    ]
    file = written(tmp_path, "a.jsonl", "".join(json.dumps({"prompt": "a", **row}) + "\n" for row in records))
    read_rows = rows(file)
    assert len({row.key for row in read_rows}) == len(read_rows)
    assert len({row.generation for row in read_rows}) == 2
    alone = rows(written(tmp_path, "b.jsonl", '{"prompt": "a", "seed": 1, "n": 1}\n'))
    assert alone[0].key == read_rows[0].key  # however it is spelled, a row that stands alone is the first of its kind


@pytest.mark.parametrize(
    "changed", [{"defaults": {"num_inference_steps": 30}}, {"dtype": "bfloat16"}, {"encoding": {"png_level": 1}}]
)
def test_a_changed_setting_makes_other_rows(tmp_path: Path, changed: dict[str, object]) -> None:
    file = written(tmp_path, "a.txt", "a boat\n")
    other = ReplicaConfig.of({"model": "assets/demo-model", "sizes": ["128x128"], **changed}, "here")
    same = ReplicaConfig.of({"model": "assets/demo-model", "sizes": ["128x128"], "max_waiting": 1}, "here")
    assert rows(file)[0].key == rows(file, same)[0].key != rows(file, other)[0].key


def test_defaults_that_the_config_leaves_open_are_the_checkpoints(tmp_path: Path) -> None:
    file = written(tmp_path, "a.txt", "a boat\n")
    options = {"sizes": ["128x128"], "defaults": {"num_inference_steps": None, "guidance_scale": None}}
    (row,) = rows(file, ReplicaConfig.of({"model": "assets/demo-model", **options}, "here"))
    assert (row.generation.num_inference_steps, row.generation.guidance_scale) == (20, 7.5)
    with pytest.raises(UsageError, match="args.defaults must be numbers and not null for this job: some/model is not"):
        list(read(file, ReplicaConfig.of({"model": "some/model", **options}, "here")))


def test_a_row_may_have_the_fields_of_its_model_in_every_kind_of_file(tmp_path: Path) -> None:
    record = {"prompt": "a boat", "seed": 7, "original_size": [64, 48], "crops_coords_top_left": [0, 2]}
    jsonl = written(tmp_path, "a.jsonl", json.dumps(record))
    csv = written(tmp_path, "a.csv", f'{",".join(record)}\na boat,7,"64,48","0, 2"\n')
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([record]), parquet)
    for file in (jsonl, csv, parquet):
        (row,) = rows(file)
        assert row.generation.fields == (("original_size", (64, 48)), ("crops_coords_top_left", (0, 2)))
    wrong = written(tmp_path, "b.csv", 'prompt,target_size\na boat,64\na boat,"64,wide"\n')
    assert set(errors_in(wrong).values()) == {
        "target_size must be an array of two integers between 1 and 16384, got an array."
    }


def test_other_weights_make_other_rows_with_the_same_seeds_and_another_place_does_not(tmp_path: Path) -> None:
    file = written(tmp_path, "a.txt", "a boat\n")

    def row() -> Row:
        return rows(file, ReplicaConfig.of({"model": str(tmp_path / "copy"), "sizes": ["128x128"]}, "here"))[0]

    shutil.copytree(ROOT / "assets/demo-model", tmp_path / "copy")
    assert row().key == rows(file)[0].key
    weights = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert row().key != rows(file)[0].key and row().generation.seed == rows(file)[0].generation.seed


def test_each_bad_row_is_told_and_the_others_are_kept(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a boat"}',
        '{"prompt": ""}',
        '{"prompt": "a boat", "guidance_scale": 99}',
        '{"prompt": "a boat", "seed": "7"}',
        '{"prompt": "a boat", "sampler": "dpm"}',
        '{"prompt": "a boat", "../file": "x"}',
        '{"seed": 7}',
        "[1]",
        "{",
    ]
    file = written(tmp_path, "a.jsonl", "\n".join(lines))
    errors = errors_in(file)
    assert sorted(errors) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert errors[3] == "guidance_scale must be a number between 1 and 20, got 99."
    assert errors[7] == "prompt is required." and errors[8] == "it must be a JSON object."
    assert [row.number for row in read(file, CONFIG) if isinstance(row, Row)] == [1]
    ragged = written(tmp_path, "a.csv", "prompt,seed\na boat,1\na tree\na fish,1,2\n")
    assert sorted(errors_in(ragged)) == [2, 3]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "x", "must end in one of .txt, .csv, .jsonl, .parquet"),
        ("a.csv", "caption,seed\nx,1\n", "must name the columns, prompt among them"),
        ("a.parquet", "x", "is no Parquet"),
        ("none/a.txt", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_none_is_refused_as_a_whole(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    file = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises(UsageError, match=words):
        list(read(file, CONFIG))


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("ein Schloß".encode("latin-1"))
    with pytest.raises(UsageError, match="must be in UTF-8"):
        list(read(file, CONFIG))


EDITING = ReplicaConfig.of({"model": "assets/demo-model", "sizes": ["128x128", "64x64"], "edits": True}, "here")


def test_a_row_begins_from_the_image_whose_path_or_bytes_it_has(tmp_path: Path) -> None:
    image, mask = file_of(gradient(60, 60)), mask_file(60, 60, (0, 0, 30, 60))
    (tmp_path / "in.png").write_bytes(image)
    (tmp_path / "mask.png").write_bytes(mask)
    line = {"prompt": "a boat", "image": "in.png", "mask": "mask.png", "strength": 0.5}
    (jsonl,) = rows(written(tmp_path, "a.jsonl", json.dumps(line)), EDITING)
    (csv,) = rows(written(tmp_path, "a.csv", "prompt,image,mask,strength\na boat,in.png,mask.png,0.5\n"), EDITING)
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([line | {"image": image, "mask": mask}]), parquet)
    (content,) = rows(parquet, EDITING)
    assert jsonl == csv and jsonl.key == content.key and jsonl.generation == content.generation
    assert (jsonl.generation.width, jsonl.generation.height) == (64, 64), "the nearest size"
    for row in (jsonl, content):
        images = row_of(text_of(row)).images
        assert images is not None and images == row.images
        edit = images.edit((64, 64))
        assert edit.image is not None and edit.image.shape == (64, 64, 3) and edit.strength == 0.5
        assert edit.mask is not None and edit.mask[:, :32].all() and not edit.mask[:, 32:].any()
    (tmp_path / "in.png").write_bytes(file_of(gradient(60, 60)[::-1]))
    (changed,) = rows(written(tmp_path, "a.jsonl", json.dumps(line)), EDITING)
    assert changed.key != jsonl.key and changed.generation.seed != jsonl.generation.seed


def test_what_is_wrong_with_the_images_of_a_row_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(file_of(gradient(60, 60)))
    (tmp_path / "mask.png").write_bytes(mask_file(30, 60, (0, 0, 9, 9)))
    (tmp_path / "text.png").write_text("a boat")
    lines: list[dict[str, object]] = [
        {"image": "absent.png"},
        {"image": "text.png"},
        {"image": 7},
        {"mask": "mask.png"},
        {"image": "in.png", "mask": "mask.png"},
        {"image": "in.png", "strength": 2},
    ]
    file = written(tmp_path, "a.jsonl", "".join(json.dumps({"prompt": "a"} | line) + "\n" for line in lines))
    problems = [row.error for row in read(file, EDITING) if isinstance(row, InvalidRow)]
    assert [problem.replace(f"{tmp_path}/", "") for problem in problems] == [
        "image absent.png cannot be read: No such file or directory.",
        "image must be a PNG, JPEG or WebP file.",
        "image must be the path of a file, or its bytes, got int.",
        "mask needs an image in the same row.",
        "mask must have the size of the image, 60x60.",
        "strength must be a number above 0 and at most 1, got 2.",
    ]
    assert errors_in(file)[5] == "image needs edits: true in the config."
