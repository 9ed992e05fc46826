from types import SimpleNamespace
from typing import cast

import jax
import pytest

from app.aot.libtpu_flags import FLAGS, VARIABLE, set_flags
from app.diffusion.declared_programs import step_options
from app.diffusion.families.family import Family


def test_every_flag_is_set_once_however_often_it_is_asked_for() -> None:
    environment: dict[str, str] = {}
    set_flags(environment)
    set_flags(environment)
    assert environment == {VARIABLE: " ".join(f"--{name}={value}" for name, value in FLAGS.items())}


def test_what_the_user_has_set_stays() -> None:
    name, *others = FLAGS
    environment = {VARIABLE: f"--xla_tpu_other=1 --{name}=12"}
    set_flags(environment)
    assert environment[VARIABLE] == " ".join(
        [f"--xla_tpu_other=1 --{name}=12", *(f"--{other}={FLAGS[other]}" for other in others)]
    )


@pytest.mark.parametrize(("kind", "large"), [("TPU v5 lite", True), ("TPU v6 lite", True), ("TPU v4", False)])
def test_steps_of_transformers_alone_take_more_vmem_where_a_chip_has_it(kind: str, large: bool) -> None:
    device = cast(jax.Device, SimpleNamespace(device_kind=kind))
    transformer, unet = (cast(Family, SimpleNamespace(TRANSFORMER=is_one)) for is_one in (True, False))
    assert bool(step_options(transformer, device)) is large
    assert step_options(unet, device) == {}
