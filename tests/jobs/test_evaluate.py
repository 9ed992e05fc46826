"""jobs/evaluate.py without a cluster: variants, distances, and the report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.types import Generation
from cluster import ROOT
from cluster.cli import UsageError
from demo import scenes
from jobs.evaluate import Distances, Drawn, claims, comparison, figures, page, variant_of
from jobs.replica_config import ReplicaConfig

BASE = ReplicaConfig.read(ROOT / "serve_config.yaml")


def pictures(seed: int = 0) -> np.ndarray:  # [2, H, W, 3]
    noise = np.random.default_rng(seed).integers(0, 256, (2, 4, 4, 3))
    return np.kron(noise, np.ones((1, 8, 8, 1))).astype(np.uint8)  # blocks, so that there is structure


def test_a_variant_changes_only_what_it_names() -> None:
    variant = variant_of("--candidate", "sampler=pndm num_inference_steps=50 size=128x128 dtype=bfloat16", BASE)
    assert variant.changes == {"sampler": "pndm", "num_inference_steps": 50, "width": 128, "height": 128}
    assert variant.config.args.dtype == "bfloat16"
    own = variant_of("--candidate", "", BASE)
    assert own.changes == {} and own.config.args.dtype == "float32"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps=20", "must be name=value of sampler, .*, got steps"),
        ("sampler", "must be name=value"),
        ("sampler='pndm", "No closing quotation, got sampler='pndm"),
        ("num_inference_steps=500", r"num_inference_steps must be an integer between 1 and 100, got 500\."),
        ("dtype=float64", "dtype: Input should be 'float32' or 'bfloat16'"),
        ("model=nowhere", "model must be a folder"),
        ("size=7x7", "size must be one of"),
    ],
)
def test_an_invalid_variant_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"--candidate: {words}|--candidate {words}") as refused:
        variant_of("--candidate", text, BASE)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_same_pictures_have_no_distance() -> None:
    distances = Distances.between(pictures(), pictures())
    assert np.isinf(distances.psnr).all() and np.allclose(distances.ssim, 1) and (distances.within_one == 1).all()


@pytest.mark.slow
def test_distances_are_those_of_their_definitions() -> None:
    reference = pictures()
    candidate = np.clip(reference.astype(int) + np.where(reference > 127, -8, 8), 0, 255).astype(np.uint8)
    distances = Distances.between(reference, candidate)
    assert np.allclose(distances.psnr, 20 * np.log10(255 / 8), atol=1e-3)
    assert (distances.within_one == 0).all()
    far = Distances.between(reference, pictures(1))
    assert (far.ssim < 0.5).all() and (distances.ssim > 0.9).all() and (far.psnr < distances.psnr).all()


def test_the_page_needs_no_other_file_and_shows_the_worst_first(tmp_path: Path) -> None:
    reference, candidate = pictures(), pictures()
    candidate[1] = pictures(1)[1]
    drawn = []
    for side, two in (("reference", reference), ("candidate", candidate)):
        files = [tmp_path / f"{side}-{i}.png" for i in range(2)]
        for pixels, file in zip(two, files, strict=True):
            Image.fromarray(pixels).save(file)
        drawn.append(Drawn(files, 1.0, 2.0))
    distances = Distances.between(reference, candidate)
    generations = [Generation(f"<b>{i}</b>", "", 32, 32, 1, 1.0, i, None, 1) for i in range(2)]
    both = [variant_of("--reference", "", BASE), variant_of("--candidate", "sampler=ddim", BASE)]
    text = page(both, generations, drawn, distances, figures(drawn, distances))
    assert re.findall(r"&lt;b&gt;(\d)", text) == ["1", "0"] and "<b>" not in text
    assert set(re.findall(r'src="([a-z:/]+);', text)) == {"data:image/webp"} and "http" not in text
    assert "sampler=ddim" in text and "SSIM, least" in text


def test_the_caption_table_counts_what_each_variant_shows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    wanted = [scenes.sample_scene(rng, objects=1) for _ in range(3)]
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for scene, file in zip([*wanted, scenes.Scene("black", ())], files, strict=True):
        Image.fromarray(scenes.draw(scene)).save(file)
    good, bad = Drawn(files[:3], 1.0, 1.0), Drawn([*files[:2], files[3]], 1.0, 1.0)
    counts = {name: values for name, *values in claims([good, bad], wanted)}
    assert counts["1 object, everything said"] == ["3/3", "2/3"] and not any(name.startswith("2") for name in counts)


def test_rows_belong_to_the_pictures_that_they_name_and_not_to_the_variant() -> None:
    generations = [Generation("a boat", "", 128, 128, 20, 4.0, seed, None, 1) for seed in (1, 2, 1)]
    own, same, other = (
        variant_of("--candidate", text, BASE).rows(generations)
        for text in ("", "num_inference_steps=20", "sampler=ddim")
    )
    assert own == same and len({row.key for row in [*own, *other]}) == 6
    assert all(row.files[0].endswith(".png") for row in own)
    assert comparison([own, same]) == comparison([same, own]) != comparison([own, other])


def test_speed_is_of_the_host_that_drew_most_and_counts_no_pause(tmp_path: Path) -> None:
    generations = [Generation("a boat", "", 128, 128, 20, 4.0, seed, None, 1) for seed in range(4)]
    rows = variant_of("--candidate", "", BASE).rows(generations)
    (tmp_path / "rows").mkdir()
    for number, (row, host) in enumerate(zip(rows, "abbb", strict=True)):
        record = {"host": host, "ended": 1000.0 * (host == "a") + number, "device_s": 0.5, "queue_s": number - 1.0}
        record |= {"denoise_s": 0.5, "decode_s": 0.25, "encode_s": 0.25}
        (tmp_path / row.record).write_text(json.dumps(record))
    drawn = Drawn.read(tmp_path, rows)
    assert drawn.pictures_per_s == pytest.approx(3 / 3) and drawn.device_s == 2.0
    assert drawn.files == [tmp_path / row.files[0] for row in rows]
