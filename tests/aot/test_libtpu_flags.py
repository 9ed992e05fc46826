from app.aot.libtpu_flags import FLAGS, VARIABLE, set_flags


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
