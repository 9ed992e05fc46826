"""The flow model's training with tiny networks, from scenes to a folder that draws, and the parts of it."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from app.diffusion.models.chat_tokenizer import ChatTokenizer
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.types import PipelineSpec
from cluster.cli import UsageError
from demo import scenes, train_flow
from demo.quality import generate
from demo.training.flow import noise_levels
from demo.training.flow_networks import TEXT_LENGTH
from demo.training.layout import layout
from demo.training.loop import train
from demo.training.tokenizer import write_chat_tokenizer

pytestmark = pytest.mark.slow


def test_a_layout_says_what_covers_the_middle_of_each_cell() -> None:
    things = (scenes.Thing("house", "red", 0.25, 0.25, 0.5), scenes.Thing("sun", "blue", 0.75, 0.75, 0.4))
    labels = layout(scenes.Scene("night", things), 2)
    kinds, colours = ([*names] for names in (scenes.KINDS, scenes.COLOURS))
    house, sun, red, blue = (
        names.index(name) + 1 for names, name in ((kinds, "house"), (kinds, "sun"), (colours, "red"), (colours, "blue"))
    )
    assert labels.tolist() == [[*scenes.BACKGROUNDS].index("night"), house, 0, 0, sun, red, 0, 0, blue]


def test_words_of_captions_are_single_tokens_and_all_captions_fit(tmp_path: Path) -> None:
    size = write_chat_tokenizer(tmp_path)
    tokenizer = ChatTokenizer(tmp_path, TEXT_LENGTH, thinking=False)
    assert not list(tokenizer.problems(size))
    words = scenes.vocabulary()
    tokens = tokenizer([*words, *(f"a {word}" for word in words), ""])
    lengths = (tokens.input_ids >= 0).sum(axis=1)
    assert {*lengths[: len(words)]} == {2} and {*lengths[len(words) : -1]} == {3} and lengths[-1] == 1
    rng = np.random.default_rng(0)
    captions = [scenes.caption(scenes.sample_scene(rng), rng) for _ in range(500)]
    assert not any(tokens.truncated) and not any(tokenizer(captions).truncated)
    assert tokenizer(["a façade, 7 suns"]).input_ids.min() >= -size, "other words are bytes"


def test_noise_levels_cover_all_and_lean_towards_noise() -> None:
    levels = np.asarray(noise_levels(jax.random.key(0), 1000, shift=3.0))
    assert 0 < levels.min() < 0.01 and 0.99 < levels.max() < 1
    assert abs(np.median(levels) - 0.75) < 0.03, "as half of the time moves to three quarters"


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["train_flow", *arguments])
    monkeypatch.setattr(train_flow, "keep_compiled_programs", lambda work: None)  # it would outlast the test
    return train_flow.main()


def test_a_tiny_training_is_resumed_and_leaves_a_folder_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "model", tmp_path / "work"
    options = ("--architecture", "tiny", "--pool", "64", "--batch", "4", "--steps", "6", "--checkpoint-steps", "2")
    places = ("--out", str(out), "--work", str(work))

    def cut_short(stage: str, work: Path, recipe: Any, state: Any, step: Any, batches: Any, steps: int) -> Any:
        return train(stage, work, recipe, state, step, batches, steps - 2)

    with monkeypatch.context() as patched:
        patched.setattr("demo.training.flow.train", cut_short)
        run(*options, *places, monkeypatch=monkeypatch)
    sentence = run(*options, *places, monkeypatch=monkeypatch)
    assert "transformer and text encoder: goes on after step 4 of 6" in capsys.readouterr().out
    assert sentence == f"The flow model stands in {out}, its checkpoints in {work}."

    vae = load_checkpoint(out).networks["vae"]
    rng = np.random.default_rng(1)
    pixels = np.stack([scenes.draw(scenes.sample_scene(rng)) for _ in range(16)]).astype(np.float32) / 127.5 - 1
    latents, _ = vae.posterior(jnp.asarray(pixels))
    assert latents.shape == (16, 8, 8, 32) and abs(latents.mean()) < 0.15 and abs(latents.std() - 1) < 0.15
    assert np.abs(np.asarray(vae.decode(latents)) - pixels).mean() < 0.05

    pipeline = Pipeline.load(PipelineSpec(str(out), sizes=((128, 128),), batch_buckets=(1,), max_steps=2))
    pipeline.warmup()
    (picture,) = generate(Engine(pipeline, max_waiting=1), None, 2, ["a red house at dusk"], 3.0, 0)
    assert picture.shape == (128, 128, 3) and picture.std() > 0

    # Another training, of no steps, from its weights: they are the same, and the card tells of both.
    further, work = tmp_path / "further", tmp_path / "further-work"
    start = ("--start-from", str(out), "--out", str(further), "--work", str(work))
    work.mkdir()
    (work / "flow.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 60}\n')
    run("--architecture", "tiny", "--pool", "64", "--steps", "0", *start, monkeypatch=monkeypatch)
    before, after = (load_checkpoint(folder) for folder in (out, further))
    for name in before.networks:
        old, new = (jax.tree.leaves(nnx.state(checkpoint.networks[name])) for checkpoint in (before, after))
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(old, new, strict=True)), name
    assert (out / "tokenizer" / "vocab.json").read_bytes() == (further / "tokenizer" / "vocab.json").read_bytes()
    card = (further / "README.md").read_text()
    assert "| 6 steps of 4 latents out of a pool of 64, " in card
    assert "; then, from those weights: 1 steps of 32 latents" in card and "dropped, 1 minutes |" in card
    assert (further / "loss.png").exists()
    with pytest.raises(UsageError, match="--start-from: .* has another --architecture than bundled"):
        run("--start-from", str(out), "--work", str(tmp_path / "other"), monkeypatch=monkeypatch)


def test_a_vae_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--start-from: must be a folder that this command wrote, got .*/demo-model"):
        run("--start-from", "assets/demo-model", "--work", str(tmp_path / "work"), monkeypatch=monkeypatch)
    with pytest.raises(UsageError, match=f"--vae: .*{tmp_path}"):
        run("--vae", str(tmp_path), "--work", str(tmp_path / "work"), monkeypatch=monkeypatch)
