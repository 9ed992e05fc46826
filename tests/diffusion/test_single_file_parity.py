"""app/diffusion/models/single_file.py held to the converters behind diffusers' `from_single_file`."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from app.diffusion.models.ldm_names import unet_names, vae_names
from app.diffusion.models.single_file import read_single_file
from tests.one_file import MODELS, unet_name, vae_name, write_one_file
from tests.published import CHECKPOINTS, XL_CHECKPOINTS

pytestmark = pytest.mark.parity

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
XL = "stable-diffusion-xl-base-1.0"
FULL_SIZE = {name: CHECKPOINTS[name] for name in ("stable-diffusion-v1-4", "stable-diffusion-2-1")}
FULL_SIZE[XL] = XL_CHECKPOINTS[XL]


@pytest.mark.parametrize("part", PREFIXES)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_name_of_a_full_size_network_is_what_diffusers_makes_of_it(name: str, part: str) -> None:
    import diffusers
    import torch
    from diffusers.loaders import single_file_utils

    config = FULL_SIZE[name][part]
    network = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    convert = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint,
        "vae": single_file_utils.convert_ldm_vae_checkpoint,
    }[part]
    published_name, our_names = {"unet": (unet_name, unet_names), "vae": (vae_name, vae_names)}[part]
    with torch.device("meta"):
        model = network.from_config({name: value for name, value in config.items() if name[0] != "_"})
    stored = {published_name(key, config): tensor for key, tensor in model.state_dict().items()}
    converted = convert({PREFIXES[part] + key: tensor for key, tensor in stored.items()}, dict(model.config))
    ours = {name: stored[key] for key, name in our_names(stored).items()}
    assert ours.keys() == converted.keys() == model.state_dict().keys()
    # A converter that reshapes a tensor makes another of it.
    moved = [name for name, tensor in converted.items() if tensor is not ours[name] and "attentions.0.to_" not in name]
    assert not moved


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_of_a_file_has_the_values_that_diffusers_converts_it_to(model: str, tmp_path: Path) -> None:
    import torch
    from diffusers.loaders import single_file_utils

    file = write_one_file(tmp_path / "some.safetensors", model)
    problems: list[str] = []
    single = read_single_file(file, problems)
    assert single and not problems
    stored = {key: torch.from_numpy(array) for key, array in load_file(file).items()}
    converted = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(stored, single.configs["unet"]),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(stored, single.configs["vae"]),
    }
    for part, prefix in ENCODERS[model].items():
        if prefix.endswith("transformer."):
            texts = single_file_utils.convert_ldm_clip_checkpoint(stored, remove_prefix=prefix)
        else:
            # The width is that of in_proj, which the converter takes from text_projection where there is one.
            config = SimpleNamespace(config=SimpleNamespace(**single.configs[part]))
            texts = single_file_utils.convert_open_clip_checkpoint(config, stored, prefix=prefix)
        converted[part] = {key.removeprefix("text_model."): value for key, value in texts.items()}
    assert single.tensors.keys() == converted.keys()
    for part, named in converted.items():
        assert single.tensors[part].keys() == named.keys()
        for name, tensor in named.items():
            value = single.tensors[part][name].read()
            assert np.array_equal(value.reshape(tensor.shape), tensor.numpy()), name
