"""app/diffusion/models/single_file.py: one-file checkpoints by CompVis' names, of real sizes and of tiny ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.diffusion.families.registry import recognise
from app.diffusion.models.single_file import SingleFile, components, read_single_file
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.weight_files import Tensor
from app.diffusion.samplers import Schedule
from tests import tiny
from tests.one_file import MODELS, SCHEDULERS, Arrays, arrays, one_file, write_one_file
from tests.published import CHECKPOINTS, XL_CHECKPOINTS

XL = "stable-diffusion-xl-base-1.0"
PUBLISHED = CHECKPOINTS | {XL: XL_CHECKPOINTS[XL]}

# What a file holds beside the weights of its components.
SURPLUS: Arrays = {
    "alphas_cumprod": np.zeros(1000, np.float32),
    "first_stage_model.loss.logvar": np.zeros((), np.float32),
    "model_ema.decay": np.zeros((), np.float32),
    "model_ema.diffusion_modelinput_blocks00weight": np.zeros(4, np.float32),
}
CLIP_SURPLUS: Arrays = {"cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None]}


def open_clip_surplus(model: str) -> Arrays:
    """The last layer of OpenCLIP, which SD 2.x does not read, and what follows it."""
    width = MODELS[model]["text_encoder"]["hidden_size"]
    last = MODELS[model]["text_encoder"]["num_hidden_layers"]
    return {
        f"cond_stage_model.model.transformer.resblocks.{last}.attn.in_proj_weight": np.zeros((3 * width, width), "f4"),
        f"cond_stage_model.model.transformer.resblocks.{last}.mlp.c_fc.bias": np.zeros(80, np.float32),
        "cond_stage_model.model.text_projection": np.zeros((width, width), np.float32),
        "cond_stage_model.model.logit_scale": np.zeros((), np.float32),
    }


SDXL_SURPLUS: Arrays = {
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
    "conditioner.embedders.0.transformer.text_projection.weight": np.zeros((64, 64), np.float32),
    "conditioner.embedders.1.model.logit_scale": np.zeros((), np.float32),
    "denoiser.sigmas": np.zeros(1000, np.float32),
}
MORE: dict[str, Arrays] = {
    "sd1": SURPLUS | CLIP_SURPLUS,
    "sd2": SURPLUS | open_clip_surplus("sd2"),
    "sdxl": SURPLUS | SDXL_SURPLUS,
}


def read(file: Path) -> SingleFile:
    problems: list[str] = []
    single = read_single_file(file, problems)
    assert single and not problems, problems
    return single


def refused(file: Path) -> list[str]:
    problems: list[str] = []
    assert read_single_file(file, problems) is None
    return problems


def stored(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: Tensor(Path("some.safetensors"), key, "F16", value.shape, 0) for key, value in tensors.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_architecture_is_read_off_the_shapes(name: str) -> None:
    shapes, configs = tiny.tensor_shapes()[name], PUBLISHED[name]

    def zeros(part: str, key: str, shape: list[int]) -> Any:
        linear = part == "vae" and "attentions" in key  # a convolution in older folders
        return np.broadcast_to(np.int8(0), squeezed(tuple(shape)) if linear else shape)

    tensors = {part: {key: zeros(part, key, shape) for key, shape in named.items()} for part, named in shapes.items()}
    problems: list[str] = []
    single = components(stored(one_file(tensors, configs)), {}, "some.safetensors", problems)
    kind = recognise(single.index, problems) if single else None
    assert single and kind and not problems, problems
    assert single.tensors.keys() == kind.COMPONENTS.keys()
    for part, component in kind.COMPONENTS.items():
        read_off = component.read(single.configs[part], problems, part)
        assert read_off == component.read(configs[part], problems, part)
        assert {key: squeezed(tensor.shape) for key, tensor in single.tensors[part].items()} == {
            key.removeprefix("text_model."): squeezed(tuple(shape)) for key, shape in shapes[part].items()
        }
    assert not problems
    assert Schedule.from_config(single.scheduler) == Schedule.from_config(configs["scheduler"])


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_of_a_file_is_the_folders_and_surplus_is_left_out(model: str, tmp_path: Path) -> None:
    single = read(write_one_file(tmp_path / "some.safetensors", model, None, **MORE[model]))
    problems: list[str] = []
    kind = recognise(single.index, problems)
    assert kind
    for part, expected in arrays(model).items():
        assert single.tensors[part].keys() == expected.keys()
        for name, array in expected.items():
            values = single.tensors[part][name].read()
            assert np.array_equal(values.reshape(array.shape), array), name
        read_off, described = (
            kind.COMPONENTS[part].read(config, problems, part) for config in (single.configs[part], MODELS[model][part])
        )
        assert read_off == described and not problems
    assert Schedule.from_config(single.scheduler) == Schedule.from_config(SCHEDULERS[model])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"lora_unet_x": np.zeros(1)}, "s.safetensors: tensor lora_unet_x belongs to none of unet, vae, text_encoder."),
        (
            {"model.diffusion_model.out.2.bias": np.zeros(4, np.int8)},
            "s.safetensors: tensor conv_out.bias must be F32, F16 or BF16, got I8.",
        ),
    ],
)
def test_what_is_not_a_weight_of_a_component_is_refused_by_name(more: Any, problem: str, tmp_path: Path) -> None:
    assert any(problem in line for line in refused(write_one_file(tmp_path / "s.safetensors", "sd1", **more)))


def test_two_tensors_of_one_name_are_refused() -> None:
    tensors = one_file(arrays("sd1"), MODELS["sd1"])
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    problems: list[str] = []
    tensors[name.replace("text_model.", "")] = tensors[name]
    assert components(stored(tensors), {}, "s.safetensors", problems) is None
    assert problems == [
        f"s.safetensors: tensors {name} and {name.replace('text_model.', '')} are both final_layer_norm.bias."
    ]


def test_a_file_without_a_vae_is_refused() -> None:
    tensors = one_file(arrays("sd1"), MODELS["sd1"])
    kept = {key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}
    problems: list[str] = []
    assert components(stored(kept), {}, "s.safetensors", problems) is None
    assert problems == ["s.safetensors has no vae: none of its tensors begins with first_stage_model."]


def test_a_file_of_another_kind_is_refused() -> None:
    problems: list[str] = []
    assert components(stored(arrays("sd1")["unet"]), {}, "s.safetensors", problems) is None
    (problem,) = problems
    assert problem.startswith(
        "s.safetensors is no checkpoint of Stable Diffusion 1.x, Stable Diffusion 2.x, SDXL in one"
    )
    assert problem.endswith("its tensors begin with conv_in, conv_norm_out, conv_out, down_blocks, mid_block.")


@pytest.mark.parametrize(
    ("model", "more", "metadata", "expected"),
    [
        ("sd1", {}, {}, "epsilon"),
        ("sd2", {}, {}, "v_prediction"),
        ("sd2", {"global_step": np.array(875000)}, {}, "epsilon"),
        ("sd2", {"global_step": np.array(140000)}, {}, "v_prediction"),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("sd1", {"v_pred": np.zeros(0, np.float32)}, {}, "v_prediction"),
    ],
)
def test_what_the_model_predicts_follows_from_the_files_own_hints(
    model: str, more: Any, metadata: dict[str, str], expected: str, tmp_path: Path
) -> None:
    single = read(write_one_file(tmp_path / "s.safetensors", model, metadata, **more))
    assert single.scheduler["prediction_type"] == expected
