"""app/diffusion/models/loading.py on checkpoints that are nearly right: each loads as in diffusers, or is refused by
name."""

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from app.diffusion.models.checkpoint_files import read_folder
from app.diffusion.models.hub_files import checkpoint_names, tokenizer_names
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.models.scheduler_config import corrected
from app.diffusion.models.tensors import finite, to_tensors
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.samplers import Schedule, default_sampler, make_table
from cluster import ROOT, processes
from tests import one_file, tiny
from tests.hub_server import Hub, serving

REPO = "somebody/tiny"
BETAS = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "model", "tiny-sd1", tiny.tensor_shapes()["tiny-sd1"])


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_checkpoint(folder)
    return str(caught.value)


def edit(file: Path, **changes: Any) -> None:
    """None takes the key out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# The tokenizer


def test_a_tokenizer_without_files_is_refused_and_they_are_named(model: Path) -> None:
    for file in (model / "tokenizer").iterdir():
        file.unlink()
    assert "- tokenizer/vocab.json and tokenizer/merges.txt are missing" in refused(model)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_refused(model: Path, name: str) -> None:
    (model / "tokenizer" / name).unlink()
    assert f"- tokenizer/{name} is missing" in refused(model)


def added_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<cat>": 600}))


def vocab(folder: Path) -> None:
    edit(folder / "vocab.json", **{"<cat>": 600})


def decoder(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"600": {"content": "<cat>", "special": False}})


def tokenizer_json(folder: Path) -> None:
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 600, "content": "<cat>"})
    (folder / "tokenizer.json").write_text(json.dumps(whole))


@pytest.mark.slow
@pytest.mark.parametrize("where", [added_tokens, vocab, decoder, tokenizer_json])
def test_a_token_that_the_text_encoder_has_no_row_for_is_refused(model: Path, where: Callable[[Path], None]) -> None:
    where(model / "tokenizer")
    assert "- tokenizer: '<cat>' has the id 600, and the text encoder has 526 rows, 0 to 525." in refused(model)


@pytest.mark.slow
def test_a_token_that_transformers_itself_would_add_is_refused(model: Path) -> None:
    edit(model / "tokenizer/special_tokens_map.json", additional_special_tokens=["<dog>"])
    assert "'<dog>' has the id 526, and the text encoder has 526 rows" in refused(model)
    edit(model / "tokenizer/special_tokens_map.json", additional_special_tokens=None, pad_token="<pad>")
    assert "tokenizer/special_tokens_map.json: pad_token '<pad>' is no token of the vocabulary." in refused(model)


def test_a_list_of_merges_that_is_cut_short_is_refused(model: Path) -> None:
    merges = model / "tokenizer/merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:8]))
    assert "merges.txt has no line that makes 5 of the 12 words in vocab.json, such as 'at</w>'" in refused(model)


def test_two_files_that_give_a_token_two_ids_are_refused(model: Path) -> None:
    tokenizer_json(model / "tokenizer")
    whole = json.loads((model / "tokenizer/tokenizer.json").read_text())
    whole["added_tokens"].pop()
    whole["model"]["vocab"]["house</w>"] = 5
    (model / "tokenizer/tokenizer.json").write_text(json.dumps(whole))
    assert "tokenizer/tokenizer.json: 'house</w>' has the id 5, and 519 elsewhere." in refused(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_max_length": 24}, "model_max_length must be the text encoder's max_position_embeddings 77, got 24."),
        ({"model_max_length": 512}, "got 512."),
        ({"padding_side": "left"}, "padding_side must be right, got 'left'."),
        ({"truncation_side": "left"}, "truncation_side must be right, got 'left'."),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_text_encoder_is_refused(
    model: Path, changes: dict[str, Any], words: str
) -> None:
    edit(model / "tokenizer/tokenizer_config.json", **changes)
    assert f"- tokenizer/tokenizer_config.json: {'' if words[0] == 'g' else words}" in refused(model)
    assert words in refused(model)


@pytest.mark.slow
def test_a_tokenizer_without_a_length_of_its_own_has_the_text_encoders(model: Path) -> None:
    edit(model / "tokenizer/tokenizer_config.json", model_max_length=None)
    assert load_checkpoint(model).path == model
    edit(model / "tokenizer/tokenizer_config.json", model_max_length=int(1e30))
    assert load_checkpoint(model).path == model


def test_a_vocabulary_of_another_size_than_the_text_encoder_is_refused(model: Path) -> None:
    file = model / "tokenizer/vocab.json"
    file.write_text(json.dumps({word: id for word, id in json.loads(file.read_text()).items() if not 5 < id < 300}))
    assert "- tokenizer: no token has the id of 294 of the text encoder's 526 rows" in refused(model)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named_and_the_remedy_too(model: Path, name: str) -> None:
    (model / "tokenizer" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert (
        f"- tokenizer/{name} is a pointer of Git LFS and not the file itself; fetch it with: git lfs pull"
        in refused(model)
    )


def test_other_start_and_end_tokens_than_clips_are_refused(model: Path) -> None:
    edit(model / "tokenizer/tokenizer_config.json", bos_token="!")
    message = "tokenizer/tokenizer_config.json: bos_token must be '<|startoftext|>', as CLIP was trained, got '!'."
    assert message in refused(model)


def test_an_option_of_the_text_encoder_that_would_change_the_picture_is_refused(model: Path) -> None:
    edit(model / "text_encoder/config.json", use_attention_mask=True)
    assert "text_encoder/config.json: use_attention_mask must be False, got True." in refused(model)


# The scheduler


def pndm_of(model: Path, **changes: Any) -> list[float]:
    """The timesteps of five steps."""
    edit(model / "scheduler/scheduler_config.json", **changes)
    return make_table("pndm", 5, load_checkpoint(model).schedule).timesteps.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("offset", [None, 0, 2])
def test_timesteps_begin_at_one_whatever_the_file_says(
    model: Path, offset: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        assert pndm_of(model, steps_offset=offset) == [801, 601, 601, 401, 201, 1]
    message = {None: "0, its default", 0: "0", 2: "2"}[offset]
    assert f"steps_offset is 1 instead of {message}, as diffusers' pipeline has it." in caplog.text


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"],
)
def test_that_holds_for_every_class_of_scheduler(name: str) -> None:
    options = {"_class_name": name, **BETAS, "timestep_spacing": "leading"}
    schedule = Schedule.from_config(corrected(options)[0])
    assert schedule.steps_offset == 1
    assert [make_table(sampler, 5, schedule).timesteps[-1] for sampler in ("ddim", "euler")] == [1, 1]


@pytest.mark.slow
def test_a_file_that_is_right_is_not_remarked_on(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        assert pndm_of(model) == [801, 601, 601, 401, 201, 1]
    assert "instead of" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample is false instead of true"),
        ({"skip_prk_steps": False}, "skip_prk_steps is true instead of false"),
        ({"skip_prk_steps": None}, "skip_prk_steps is true instead of false, its default"),
    ],
)
def test_what_the_pipeline_corrects_loads_and_is_logged(
    model: Path, changes: dict[str, Any], remark: str, caplog: pytest.LogCaptureFixture
) -> None:
    named = {"class_name": changes.get("_class_name", "PNDMScheduler")}
    as_published = dataclasses.replace(load_checkpoint(model).schedule, **named)
    edit(model / "scheduler/scheduler_config.json", **changes)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        assert load_checkpoint(model).schedule == as_published
    assert remark in caplog.text


@pytest.mark.slow
def test_a_class_that_is_not_sampled_with_loads_and_the_nearest_sampler_is_logged(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(model / "scheduler/scheduler_config.json", _class_name="KDPM2DiscreteScheduler", use_karras_sigmas=True)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        schedule = load_checkpoint(model).schedule
    assert isinstance(schedule, Schedule) and schedule.steps_offset == 1
    assert default_sampler(schedule) == "heun_karras"
    assert (
        "The checkpoint names KDPM2DiscreteScheduler; the default sampler is the nearest, heun_karras." in caplog.text
    )


@pytest.mark.parametrize("changes", [{"steps_offset": -1}, {"steps_offset": 0.5}, {"set_alpha_to_one": "yes"}])
def test_what_no_schedule_can_have_is_refused_with_all_other_problems(model: Path, changes: dict[str, Any]) -> None:
    edit(model / "scheduler/scheduler_config.json", **changes)
    (model / "tokenizer/vocab.json").unlink()
    message = refused(model)
    assert (
        f"- scheduler/scheduler_config.json: The scheduler config cannot be followed: {[*changes][0]} must" in message
    )
    assert "- tokenizer/vocab.json is missing" in message


# The weights


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_is_refused_and_every_tensor_with_one_is_named(model: Path, value: float) -> None:
    for part, name in (("unet", "conv_out.bias"), ("unet", "conv_in.weight"), ("vae", "decoder.conv_in.bias")):
        file = model / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[name].reshape(-1)[-1] = value
        save_file(tensors, file)
    message = refused(model)
    (line,) = [line for line in message.splitlines() if line.startswith("- ")]
    assert line.startswith("- NaN or infinity stands among the weights, in ")
    assert all(name in line for name in ("unet conv_out.bias", "unet conv_in.weight", "vae decoder.conv_in.bias"))


@pytest.mark.slow
def test_of_many_such_tensors_a_few_are_named(model: Path) -> None:
    file = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * np.float32(np.nan) for name, tensor in tensors.items()}, file)
    message = refused(model)
    assert f" and {len(tensors) - 5} more." in message and message.count("vae ") == 5


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_number_of_every_size_is_finite_or_is_not(dtype: Any) -> None:
    values = np.array([0, -0.0, 1, ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 1e-7], dtype)
    assert finite(values) and finite(np.zeros(0, dtype))
    long = np.tile(values, 30_000)
    assert finite(long)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, len(long) // 2, -1):
            changed = long.copy()
            changed[place] = value
            assert not finite(changed.reshape(2, -1))


def test_a_weight_of_whole_numbers_is_refused(model: Path) -> None:
    file = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"decoder.conv_in.bias": np.zeros(16, np.int64)}, file)
    assert "tensor decoder.conv_in.bias must be F32, F16 or BF16, got I64." in refused(model)


# The files of weights

UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"


def arrays_of(folder: Path, variant: str | None = None) -> dict[str, np.ndarray]:
    """Every weight that loading would read, by component and name."""
    problems: list[str] = []
    files = read_folder(folder, variant, problems)
    assert files and not problems, problems
    return {f"{part} {name}": tensor.read() for part, named in files.tensors.items() for name, tensor in named.items()}


def problems_of(folder: Path, variant: str | None = None) -> list[str]:
    problems: list[str] = []
    read_folder(folder, variant, problems)
    return problems


def written(folder: Path, **options: Any) -> Path:
    return tiny.write_checkpoint(folder, "tiny-sd1", tiny.tensor_shapes()["tiny-sd1"], **options)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"shards": 3}, {"variant": "fp16", "shards": 2}])
def test_a_variant_and_shards_hold_the_weights_of_one_file(options: Any, model: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "other", **options)
    expected, arrays = arrays_of(model), arrays_of(folder, options.get("variant"))
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_shards_of_a_variant_load_as_one_file_does(model: Path, tmp_path: Path) -> None:
    expected = load_checkpoint(model)
    checkpoint = load_checkpoint(written(tmp_path / "other", variant="fp16", shards=2), variant="fp16")
    for part, network in expected.networks.items():
        arrays, others = (to_tensors(of, np.float32) for of in (network, checkpoint.networks[part]))
        assert arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in arrays)


def test_of_two_variants_the_named_one_is_read_and_where_it_is_missing_the_plain_file(model: Path) -> None:
    tensors = load_file(model / f"{UNET}.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, model / f"{UNET}.fp16.safetensors")
    plain, variant = arrays_of(model), arrays_of(model, "fp16")
    assert all(np.array_equal(variant[name], -plain[name] if "unet" in name else plain[name]) for name in plain)


def test_a_variant_that_lies_there_is_named_where_it_was_not_asked_for(tmp_path: Path) -> None:
    message = refused(written(tmp_path / "m", variant="fp16"))
    assert f"- {UNET}.safetensors is missing, and its variant fp16 lies there: set `variant: fp16`." in message
    message = refused(written(tmp_path / "n", variant="bf16", shards=2))
    assert "- text_encoder/model.safetensors is missing, and its variant bf16 lies there: set `variant: bf1" in message


def test_a_variant_that_no_component_has_is_refused(model: Path) -> None:
    (problem,) = problems_of(model, "fp16")
    assert problem.startswith("variant fp16 has no file there: weights are in text_encoder/model.safetensors, unet/")


def test_what_is_wrong_with_shards_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", shards=2)
    first, second = (folder / f"{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2))
    second.rename(tmp_path / "second")
    assert f"{UNET}-00002-of-00002.safetensors is missing." in problems_of(folder)
    (tmp_path / "second").rename(second)
    index = folder / f"{UNET}.safetensors.index.json"
    content = json.loads(index.read_text())
    wrong_maps: list[Any] = [{}, {"a": "../b.safetensors"}, {"a": 1}, []]
    for wrong in wrong_maps:
        index.write_text(json.dumps(content | {"weight_map": wrong}))
        message = f"{UNET}.safetensors.index.json: weight_map must name a .safetensors file of the same folder for each"
        assert any(problem.startswith(message) for problem in problems_of(folder))
    index.unlink()
    assert problems_of(folder) == [
        f"{UNET}.safetensors is missing, and shards lie there without their index, "
        "diffusion_pytorch_model.safetensors.index.json."
    ]
    index.write_text(json.dumps(content))
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    assert f"{UNET}-00002-of-00002.safetensors: tensor {name} stands in {first.name} too." in problems_of(folder)


def test_pickled_weights_are_named_as_such(model: Path) -> None:
    (model / f"{VAE}.safetensors").rename(model / f"{VAE}.bin")
    assert problems_of(model) == [
        f"{VAE}.safetensors is missing. Its pickled .bin weights are not read: convert them first."
    ]


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", None])
def test_weights_that_are_a_pointer_or_cut_off_are_refused_before_they_are_read(
    model: Path, content: bytes | None
) -> None:
    file = model / f"{UNET}.safetensors"
    size = file.stat().st_size
    file.write_bytes(content or file.read_bytes()[:100_000])
    cut_off = f"{UNET}.safetensors is cut off: by its header it has {size} bytes, and it has 100000."
    pointer = f"{UNET}.safetensors is a pointer of Git LFS and not the file itself; fetch it with: git lfs pull"
    assert f"- {pointer if content else cut_off}" in refused(model)


# One file


@pytest.mark.slow
@pytest.mark.parametrize("name", one_file.MODELS)
def test_one_file_loads_with_a_tokenizer_beside_it(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.write_tokenizer(tmp_path / "words", "tiny-sd1")
    file = one_file.write_one_file(tmp_path / "some.safetensors", name)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        checkpoint = load_checkpoint(file, tokenizer=tmp_path / "words")
    assert f"some.safetensors: prediction_type is {'v_prediction' if name == 'sd2' else 'epsilon'}." in caplog.text
    for part, arrays in one_file.arrays(name).items():
        loaded = to_tensors(checkpoint.networks[part], np.float32)
        assert loaded.keys() == arrays.keys()
        assert all(np.array_equal(loaded[name].reshape(arrays[name].shape), arrays[name]) for name in arrays)
    assert checkpoint.tokenizers.keys() == ({"tokenizer", "tokenizer_2"} if name == "sdxl" else {"tokenizer"})


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["!", "<|endoftext|>"])
def test_the_tokenizer_of_one_file_pads_as_its_kind_does(stored: str, tmp_path: Path) -> None:
    """CLIP pads with its end token, OpenCLIP with token 0, which an exclamation mark in a text is then too."""
    tiny.write_tokenizer(tmp_path / "words", "tiny-sd1", pad=stored)
    for padding in ("!", "<|endoftext|>"):
        tiny.write_tokenizer(tmp_path / "own", "tiny-sd1", pad=padding)
        tokens, expected = Tokenizer(tmp_path / "words", 77, padding), Tokenizer(tmp_path / "own", 77)
        ids = tokens(tiny.PROMPTS).input_ids
        assert np.array_equal(ids, expected(tiny.PROMPTS).input_ids)
        assert ids[0, -1] == (0 if padding == "!" else 525)


def test_one_file_without_a_tokenizer_is_refused_and_the_setting_is_named(tmp_path: Path) -> None:
    file = one_file.write_one_file(tmp_path / "some.safetensors", "sd1")
    assert "- It holds no tokenizer: set `tokenizer:` to a folder with CLIP's vocabulary, or to a repo id." in refused(
        file
    )
    (tmp_path / "words").mkdir()
    with pytest.raises(ValueError, match="tokenizer/vocab.json and tokenizer/merges.txt are missing"):
        load_checkpoint(file, tokenizer=tmp_path / "words")


def test_what_one_file_lacks_is_named(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "words", "tiny-sd1")
    file = one_file.write_one_file(tmp_path / "some.safetensors", "sd1")
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.2.bias"], tensors["model.diffusion_model.input_blocks.0.0.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="- some.safetensors: unet: in_channels must be a positive number, got 0."):
        load_checkpoint(file, tokenizer=tmp_path / "words")


# The Hub


def test_of_a_repos_files_those_that_load_are_chosen_and_no_others(tmp_path: Path) -> None:
    """SDXL's repo holds weights four times: plain, fp16, for ONNX and for Flax; and other files beside them."""
    folder = written(tmp_path / "m")
    others = written(tmp_path / "n", variant="fp16", shards=2)
    names = [str(file.relative_to(folder)) for file in folder.rglob("*.*")]
    names += [str(file.relative_to(others)) for file in others.rglob("*.*")]
    names += ["unet/model.onnx", "unet/diffusion_pytorch_model.bin", "unet/diffusion_flax_model.msgpack", "README.md"]
    names += ["safety_checker/model.safetensors", "safety_checker/config.json", "some_1.0.safetensors", "unet/.json"]
    index = json.loads((folder / "model_index.json").read_text())
    for variant, expected in ((None, folder), ("fp16", others)):
        problems: list[str] = []
        chosen = checkpoint_names(sorted(set(names)), index, variant, problems)
        assert not problems
        assert sorted(chosen) == sorted(str(file.relative_to(expected)) for file in expected.rglob("*.*"))
    checkpoint_names([name for name in names if name != f"{UNET}.safetensors"], index, None, problems)
    assert problems == [f"{UNET}.safetensors is missing, and its variant fp16 lies there: set `variant: fp16`."]


def test_a_tokenizer_is_in_folders_of_that_name_or_at_the_top() -> None:
    top = ["vocab.json", "merges.txt", "tokenizer_config.json"]
    assert tokenizer_names([*top, "model.safetensors", "README.md"]) == top
    folders = ["tokenizer/vocab.json", "tokenizer_2/merges.txt"]
    assert tokenizer_names([*top, *folders, "tokenizer/x.bin", "unet/config.json"]) == folders


@pytest.mark.slow
def test_of_a_repo_with_two_variants_one_is_downloaded_and_loads(model: Path, tmp_path: Path) -> None:
    written(model, variant="fp16", shards=2)
    for extra in ("unet/diffusion_pytorch_model.bin", "unet/model.onnx", "some.safetensors"):
        (model / extra).touch()
    with serving(server := Hub(REPO, model)) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        assert loaded(environment, variant="fp16") == ""
        weights = [name for name in server.sent if not name.endswith((".json", ".txt"))]
        assert len(weights) == 6 and all(".fp16-0000" in name for name in weights)
        server.sent = []
        message = loaded(environment, variant="bf16")
        assert "- variant bf16 has no file there: weights are in text_encoder/model.safetensors, unet/" in message
        assert not [name for name in server.sent if name.endswith(".safetensors")]


@pytest.mark.slow
def test_a_tokenizer_from_the_hub_goes_with_one_file(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "repo", "tiny-sd1")
    (tmp_path / "repo/model.safetensors").touch()
    file = one_file.write_one_file(tmp_path / "some.safetensors", "sd1")
    with serving(server := Hub(REPO, tmp_path / "repo")) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        assert loaded(environment, str(file), tokenizer=REPO) == ""
    assert sorted(server.sent) == sorted(
        name.name for name in (tmp_path / "repo").glob("*.*") if name.suffix != ".safetensors"
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Hub's environment, whose cache holds the model, as an older client left it: without a list of its files."""
    folder = tmp_path_factory.mktemp("hub")
    model = tiny.write_checkpoint(folder / "model", "tiny-sd1", tiny.tensor_shapes()["tiny-sd1"])
    with serving(Hub(REPO, model)) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
        assert loaded(environment) == ""
        (repo,) = (folder / "cache/hub").glob("models--*")
        for file in (repo / "trees").iterdir():
            file.unlink()
        (repo / "trees").rmdir()
        (missing,) = (repo / "snapshots").glob("*/vae/config.json")
        missing.unlink()
    return environment


def loaded(environment: dict[str, str], repo: str = REPO, **options: str) -> str:
    """What loading says in a process of its own: the Hub's client reads its environment once."""
    code = (
        "import sys\nfrom app.diffusion.models.loading import load_checkpoint\n"
        f"try:\n    load_checkpoint({repo!r}, **{options!r})\nexcept ValueError as error:\n    print(error)"
    )
    variables = processes.environment(**environment)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "why"), [({}, "Connection refused"), ({"HF_HUB_OFFLINE": "1"}, "`HF_HUB_OFFLINE` environment variable")]
)
def test_a_cache_that_lacks_a_file_and_no_way_to_the_hub(cache: dict[str, str], more: dict[str, str], why: str) -> None:
    message = loaded(cache | more)
    assert "- vae/config.json is missing.\n" in message
    assert "\nThe Hub could not be asked for what is missing: " in message and why in message


@pytest.mark.slow
def test_a_repo_that_the_hub_does_not_have_is_said_in_its_words(model: Path) -> None:
    with serving(Hub(REPO, model)) as endpoint:
        message = loaded({"HF_ENDPOINT": endpoint, "HF_HOME": str(model.parent / "cache")}, "somebody/else")
    assert message.startswith("model somebody/else is no folder here and could not be fetched from Hugging Face: 404 ")
    assert "Repository Not Found" in message and message.count("\n") == 1
