"""cluster/config/rules/checkpoint.py: checkpoints with one mistake, which `make deploy` refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cluster import ROOT
from cluster.config.lint import lint
from tests import one_file, tiny_flow
from tests.diffusion.test_models import OLD_VAE_NAMES
from tests.tiny import tensor_shapes, write_checkpoint, write_tokenizer

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "m", "tiny-sd1", tensor_shapes()["tiny-sd1"])


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "m"))


def findings_of(model: str, tmp_path: Path, sizes: str = "[64x64]", **args: Any) -> list[str]:
    """The findings about the shipped config with this model, without file and line."""
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    content["applications"][0]["args"] |= {"model": model, "sizes": yaml.safe_load(sizes), **args}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return [str(finding).partition(": ")[2] for finding in lint([path])]


def cut_to(size: int) -> Change:
    def change(folder: Path) -> None:
        (folder / UNET).write_bytes((folder / UNET).read_bytes()[:size])

    return change


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def configured(part: str, **options: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))

    return change


def tensors(change: Callable[[dict[str, Any]], object], name: str = UNET) -> Change:
    def rewrite(folder: Path) -> None:
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name)

    return rewrite


def f32(first: int, last: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, last]}


BROKEN: list[tuple[Change, list[str]]] = [
    (cut_to(100_000), [f"{UNET} is cut off: by its header it has SIZE bytes, and it has 100000."]),
    (cut_to(1000), [f"{UNET} is cut off: its header alone has HEADER bytes, and the file 1000."]),
    (cut_to(0), [f"{UNET} is not a safetensors file, of 0 bytes."]),
    (written(UNET, b"PK\x03\x04" + bytes(100)), [f"{UNET} is cut off: its header alone has 67324752 bytes, and the f"]),
    (written(UNET, b"\x80\x02}q\x00" * 100), [f"{UNET} is not a safetensors file, of 500 bytes."]),
    (written(UNET, b"\x04" + bytes(7) + b"null"), [f"{UNET} is not a safetensors file."]),
    (written(UNET, b"\x04" + bytes(7) + b"\xff\xff{}"), [f"{UNET} is not a safetensors file."]),
    (
        written(UNET, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        [f"{UNET} is a pointer of Git LFS and not the file itself; fetch it with: git lfs pull"],
    ),
    (
        written(UNET, header(a=f32(0, 8, 3)) + bytes(8)),
        [f"{UNET} is not a safetensors file: the bytes of tensor a do not make up its shape."],
    ),
    (
        written(UNET, header(a=f32(0, 8, 2), b=f32(4, 12, 2)) + bytes(12)),
        [f"{UNET} has a gap or an overlap before tensor b."],
    ),
    (
        written(UNET, header(a=f32(0, 8, 2)) + bytes(12)),
        [f"{UNET} has bytes that no tensor owns: by its header it has 77 bytes, and it has 81."],
    ),
    (lambda folder: (folder / UNET).unlink(), [f"{UNET} is missing."]),
    (lambda folder: (folder / "vae/config.json").unlink(), ["vae/config.json is missing."]),
    (written("unet/config.json", b"{"), ["unet/config.json cannot be read: "]),
    (written("unet/config.json", b"[]"), ["unet/config.json must hold a JSON object, got a list."]),
    (
        configured("unet", act_fn="relu", layers_per_block=0),
        [
            "unet/config.json: layers_per_block must be a positive number, got 0.",
            "unet/config.json: act_fn must be 'silu', got 'relu'.",
        ],
    ),
    (
        configured("unet", cross_attention_dim=64),
        [
            "unet/config.json: cross_attention_dim must be the text encoder's hidden_size 32, got 64.",
            "unet: tensor down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight must have shape "
            "[12, 64], got [12, 32].",
            *["unet: tensor down_blocks.0.attentions."] * 2,
            "unet: and 19 more of that kind.",
        ],
    ),
    (
        lambda folder: (folder / "scheduler/scheduler_config.json").unlink(),
        ["scheduler/scheduler_config.json is missing."],
    ),
    (
        lambda folder: (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "Heunish"}'),
        ["scheduler/scheduler_config.json: The scheduler config cannot be followed: _class_name must be one of"],
    ),
    (
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        ["tokenizer/vocab.json and tokenizer/merges.txt are missing, and there is no tokenizer.json."],
    ),
    (
        written("tokenizer/added_tokens.json", b'{"<new>": 526}'),
        ["tokenizer: '<new>' has the id 526, and the text encoder has 526 rows, 0 to 525."],
    ),
    (
        tensors(lambda content: content.pop("conv_in.bias")),
        ["unet: tensor conv_in.bias is missing."],
    ),
    (
        tensors(lambda content: content.update(extra=np.zeros(3, np.float32))),
        ["unet: tensor extra is not one that this architecture has."],
    ),
    (
        tensors(lambda content: content.update({"conv_in.bias": content["conv_in.bias"].astype(np.int8)})),
        [f"{UNET}: tensor conv_in.bias must be F32, F16 or BF16, got I8."],
    ),
]


@pytest.mark.parametrize(("change", "problems"), BROKEN, ids=[case[1][0].partition(" ")[2][:50] for case in BROKEN])
def test_a_checkpoint_that_cannot_be_loaded_is_an_error(
    checkpoint: Path, tmp_path: Path, change: Change, problems: list[str]
) -> None:
    size, head = (checkpoint / UNET).stat().st_size, (checkpoint / UNET).read_bytes()[:8]
    change(checkpoint)
    findings = findings_of(str(checkpoint), tmp_path)
    assert len(findings) == len(problems), findings
    for finding, problem in zip(findings, problems, strict=True):
        problem = problem.replace("SIZE", str(size)).replace("HEADER", str(int.from_bytes(head, "little")))
        assert f"error: applications[0].args.model {checkpoint} cannot be loaded: {problem}" in finding


def test_every_part_of_a_checkpoint_is_checked(checkpoint: Path, tmp_path: Path) -> None:
    for name in (UNET, VAE, "text_encoder/model.safetensors"):
        (checkpoint / name).write_bytes(b"")
    assert len(findings_of(str(checkpoint), tmp_path)) == 3


def test_defaults_that_the_scheduler_cannot_follow_are_an_error(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "scheduler/scheduler_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"num_train_timesteps": 10, "_class_name": "DDIMScheduler"}))
    (finding,) = findings_of(str(checkpoint), tmp_path)
    assert f"error: applications[0].args.defaults do not suit {checkpoint}: num_inference_steps must be " in finding


def test_sizes_that_the_networks_cannot_halve_are_an_error(checkpoint: Path, tmp_path: Path) -> None:
    findings = findings_of(str(checkpoint), tmp_path, "[64x64, 64x72]")
    (finding,) = [finding for finding in findings if "args.sizes" in finding]
    assert finding.endswith(f"must be multiples of 16 for {checkpoint}, got 64x72.")


def test_images_that_the_model_cannot_divide_are_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (finding,) = findings_of(str(checkpoint), tmp_path, shard_images=True)
    assert "shard_images must be auto or false" in finding and "cannot divide images of 64x64" in finding


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_sound_checkpoint_has_no_problem_by_old_names_and_new_ones(dtype: Any, tmp_path: Path) -> None:
    def old(component: str, name: str) -> str:
        if component == "text_encoder":
            return f"text_model.{name}"
        for new, before in OLD_VAE_NAMES.items() if component == "vae" else ():
            name = name.replace(new, before)
        return name

    for rename in (old, lambda component, name: name):
        for model, shapes in tensor_shapes().items():
            if model.startswith("tiny"):
                folder = tmp_path / f"{model} {rename is old}"
                write_checkpoint(folder, model, shapes, dtype=dtype, rename=rename)
                save_file(
                    load_file(folder / "text_encoder/model.safetensors")
                    | {"embeddings.position_ids": np.arange(77)[None]},
                    folder / "text_encoder/model.safetensors",
                )
                assert findings_of(str(folder), tmp_path) == []


def test_problems_of_a_checkpoint_in_the_hubs_cache_are_advice(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes may have another copy, or download it again."""
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    refs = tmp_path / "hub/models--a--b/refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert findings_of("a/b", tmp_path) == [] == findings_of("a/another", tmp_path)
    cut_to(100_000)(snapshot)
    (finding,) = findings_of("a/b", tmp_path)
    assert "advice: applications[0].args.model a/b in this machine's Hub cache cannot be loaded: unet/" in finding


def test_a_model_in_one_file_is_judged_with_its_tokenizer(tmp_path: Path) -> None:
    file = one_file.write_one_file(tmp_path / "some.safetensors", "sd1")
    write_tokenizer(tmp_path / "words", "tiny-sd1")
    words = str(tmp_path / "words")
    assert findings_of(str(file), tmp_path, tokenizer=words) == []
    assert findings_of(str(file), tmp_path, tokenizer="openai/not-on-this-machine") == []
    (finding,) = findings_of(str(file), tmp_path)
    assert "args.tokenizer must be a folder with CLIP's vocabulary, or a repo id such as openai/clip-vit" in finding

    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("out.2.bias")}, file)
    (tmp_path / "words/merges.txt").unlink()
    findings = findings_of(str(file), tmp_path, tokenizer=words)
    assert [finding.partition(" cannot be loaded: ")[2] for finding in findings] == [
        "tokenizer/merges.txt is missing, and there is no tokenizer.json.",
        "unet: tensor conv_out.bias is missing.",
    ]
    file.write_bytes(file.read_bytes()[:100_000])
    (finding,) = findings_of(str(file), tmp_path, tokenizer=words)
    assert "cannot be loaded: some.safetensors is cut off: by its header it has" in finding


def test_a_variant_is_judged_where_it_is_named(tmp_path: Path) -> None:
    shapes = tensor_shapes()["tiny-sd1"]
    folder = str(write_checkpoint(tmp_path / "m", "tiny-sd1", shapes, variant="fp16", shards=2))
    assert findings_of(folder, tmp_path, variant="fp16") == []
    assert len([line for line in findings_of(folder, tmp_path) if "lies there: set `variant: fp16`." in line]) == 3
    (tmp_path / "m/unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors").write_bytes(b"")
    findings = findings_of(folder, tmp_path, variant="fp16")
    assert findings[0].endswith(
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors is not a safetensors file, of 0 bytes."
    )


@pytest.mark.slow
def test_the_linter_still_imports_no_jax(checkpoint: Path, tmp_path: Path) -> None:
    findings_of(str(checkpoint), tmp_path)
    script = (
        "import sys; from pathlib import Path; from cluster.config.lint import lint;"
        f"lint([Path({str(tmp_path)!r}, 'serve.yaml')]);"
        "print([name for name in ('jax', 'jaxlib', 'flax', 'transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_defaults_that_a_distilled_model_refuses_are_errors(tmp_path: Path) -> None:
    folder = tiny_flow.write_checkpoint(tmp_path / "m", "tiny-klein", tiny_flow.tensor_tables()["tiny-klein"])
    defaults = {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": None}
    assert findings_of(str(folder), tmp_path, defaults=defaults) == []
    (finding,) = findings_of(str(folder), tmp_path, defaults=defaults | {"guidance_scale": 4.0})
    assert "guidance_scale must be at most 1, got 4. This model is distilled" in finding
    assert findings_of(str(folder), tmp_path, defaults=dict.fromkeys(defaults)) == []
    (finding,) = findings_of(
        str(folder), tmp_path, defaults=dict.fromkeys(defaults), limits={"guidance_scale": [2.0, 5.0]}
    )
    assert "guidance_scale must be at most 1, got 2. This model is distilled" in finding
