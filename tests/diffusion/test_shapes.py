"""app/diffusion/models/shapes.py says what the modules build, held to published checkpoints and to the modules
themselves."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from flax import nnx

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from app.diffusion.models.loading import OneKey
from app.diffusion.models.shapes import Shape, text_encoder_tensors, unet_tensors, vae_tensors
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tensors import tensor_name, tensor_shape
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from tests import tiny
from tests.published import CHECKPOINTS

PARTS: dict[str, tuple[Any, Callable[[Any], Mapping[str, Shape]], Any]] = {
    "unet": (UNetConfig, unet_tensors, UNet),
    "vae": (VAEConfig, vae_tensors, VAE),
    "text_encoder": (CLIPTextConfig, text_encoder_tensors, CLIPText),
}


def tensors(part: str, json: Mapping[str, Any]) -> tuple[Any, dict[str, Shape]]:
    config_class, shapes, _ = PARTS[part]
    problems: list[str] = []
    config = config_class.from_json(json, problems)
    assert not problems
    return config, {name: squeezed(shape) for name, shape in shapes(config).items()}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [*CHECKPOINTS, "tiny-sd1", "tiny-sd2"])
def test_they_are_the_tensors_of_published_checkpoints(name: str, part: str) -> None:
    json = (CHECKPOINTS | tiny.MODELS)[name][part]
    stored = tiny.tensor_shapes()[name][part]
    assert tensors(part, json)[1] == {tensor: squeezed(tuple(shape)) for tensor, shape in stored.items()}


SMALL_UNET = tiny.MODELS["tiny-sd2"]["unet"]
SMALL_VAE = tiny.MODELS["tiny-sd2"]["vae"]
UNUSUAL: list[tuple[str, Mapping[str, Any]]] = [
    ("unet", SMALL_UNET | {"layers_per_block": 3, "in_channels": 9, "out_channels": 5, "cross_attention_dim": 7}),
    ("unet", SMALL_UNET | {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}),
    (
        "unet",
        SMALL_UNET
        | {
            "block_out_channels": [8],
            "attention_head_dim": 2,
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
        },
    ),
    ("vae", SMALL_VAE | {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}),
    ("vae", SMALL_VAE | {"layers_per_block": 2, "latent_channels": 16, "block_out_channels": [8, 8]}),
    ("text_encoder", tiny.MODELS["tiny-sd1"]["text_encoder"] | {"num_hidden_layers": 1, "intermediate_size": 9}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "json"), UNUSUAL)
def test_they_are_what_the_modules_build_of_unusual_configs(part: str, json: Mapping[str, Any]) -> None:
    config, ours = tensors(part, json)
    rngs = OneKey()
    module = nnx.eval_shape(lambda: PARTS[part][2](config, rngs=rngs))
    parameters = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert ours == {tensor_name(path): squeezed(tensor_shape(path, parameter.shape)) for path, parameter in parameters}
