"""The builder, and what the serve configs must say for it; cluster/config/lint.py checks the rest of them."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private import api

from app import builders
from app.api.settings import Defaults, Limits
from app.builders import Args, locate, text_to_image
from app.serving.draining import LAST_S
from app.serving.replica import StableDiffusion
from app.types import PipelineSpec, RequestDefaults
from cluster import ROOT
from cluster.config.rules.serve_limits import NOTICE_S

CONFIGS = [ROOT / "serve_config.yaml", *sorted((ROOT / "configs").glob("sd*.yaml"))]
each_config = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def args_of(path: Path) -> dict[str, Any]:
    (application,) = read(path)["applications"]
    args: dict[str, Any] = application["args"]
    return args


def deployments_of(path: Path) -> dict[str, Any]:
    (application,) = read(path)["applications"]
    return {deployment["name"]: deployment for deployment in application["deployments"]}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository root with the bundled model's folder in it."""
    (tmp_path / "assets/demo-model").mkdir(parents=True)
    monkeypatch.setattr(builders, "ROOT", tmp_path)
    return tmp_path


@each_config
def test_every_setting_has_a_comment_of_one_line(path: Path) -> None:
    for line in path.read_text().splitlines():
        if re.match(r"[ -]*\w+: \S", line):
            assert re.search(r"\S +# \w.{5,}", line), f"{line!r} has no comment"
        assert len(line) <= 120


@each_config
def test_every_setting_of_args_is_written_out(path: Path) -> None:
    args = args_of(path)
    assert args == json.loads(Args.model_validate(args).model_dump_json())


def deployments_made(args: Args) -> tuple[Any, Any, Any]:
    """The ingress, the replicas behind it and the service it was told of, as Serve will get them."""
    ingress: Any = text_to_image(args)._bound_deployment
    replicas, service = ingress.init_args
    return ingress, replicas._bound_deployment, service


@each_config
def test_the_yaml_names_the_deployments_that_the_builder_makes(path: Path, repository: Path) -> None:
    ingress, replicas, service = deployments_made(Args.model_validate(args_of(path)))
    assert {ingress.name, replicas.name} == set(deployments_of(path))
    options = replicas.init_kwargs
    (spec,) = replicas.init_args
    assert [f"{width}x{height}" for width, height in spec.sizes] == list(service.sizes)
    assert spec.max_steps == service.limits.num_inference_steps[1]
    assert options["name"] == service.model
    assert options["images_at_once"] is None
    assert spec.programs == repository / ".cache/programs"


@each_config
def test_the_ingress_drains_for_as_long_as_a_request_may_take_and_the_model_within_a_preemptions_notice(
    path: Path,
) -> None:
    """A change of args restarts the ingress too, through which the model's answers pass."""
    drain_s = {name: deployment["graceful_shutdown_timeout_s"] for name, deployment in deployments_of(path).items()}
    assert drain_s["APIIngress"] > args_of(path)["limits"]["timeout_s"]
    assert LAST_S < drain_s["StableDiffusion"] < NOTICE_S


def test_what_the_yaml_says_reaches_the_replica(repository: Path) -> None:
    options = {"images_at_once": 3, "admission_gain": 0.2, "prompt_cache": 9, "encoding_threads": 5}
    options |= {"max_waiting": 7, "stall_s": 30.0}
    shapes = {"sizes": ["64x64"], "decode_buckets": [4, 2], "dtype": "bfloat16", "revision": "v1", "programs": None}
    replicas = deployments_made(Args.model_validate({"model": "a/b", **shapes, **options}))[1]
    assert replicas.init_kwargs == {"name": "a/b", **options}
    assert replicas.init_args == (
        PipelineSpec("a/b", ((64, 64),), (1, 2, 4), 100, decode_buckets=(2, 4), revision="v1", dtype="bfloat16"),
    )
    absolute = Args.model_validate({"model": "a/b", "sizes": ["64x64"], "programs": "/var/programs"})
    assert deployments_made(absolute)[1].init_args[0].programs == Path("/var/programs")


def test_a_keys_file_is_read_before_anything_is_loaded_and_named_to_the_ingress(repository: Path) -> None:
    args = Args.model_validate({"model": "a/b", "sizes": ["64x64"], "api_keys_file": "keys.yaml"})
    with pytest.raises(ValueError, match=r"^api_keys_file .*/keys.yaml cannot be read: No such file or directory\.$"):
        text_to_image(args)
    (repository / "keys.yaml").write_text("- {name: alice}")
    with pytest.raises(ValueError, match=r"^api_keys_file .*/keys.yaml, entry 1 \(alice\): sha256 is missing"):
        text_to_image(args)
    (repository / "keys.yaml").write_text("[]")
    assert deployments_made(args)[0].init_kwargs["api_keys_file"] == repository / "keys.yaml"
    with pytest.raises(ValueError, match="^api_keys_file "):
        text_to_image(args.model_copy(update={"api_keys_file": ""}))  # a slip, not a wish for no keys


def test_what_jobs_need_is_read_before_anything_is_loaded_and_their_paths_are_the_repositorys(
    repository: Path,
) -> None:
    def jobs_made(**jobs: object) -> Any:
        args = Args.model_validate({"model": "a/b", "sizes": ["64x64"], "jobs": jobs})
        return deployments_made(args)[2].jobs

    with pytest.raises(ValueError, match=r"^jobs.webhook_secret_file .*/secret cannot be read: No such file"):
        jobs_made(webhook_hosts=["hooks.example.com"], webhook_secret_file="secret")
    with pytest.raises(
        ValueError, match=r"^jobs.files must be a folder or a URL that fsspec can open, got nowhere://a"
    ):
        jobs_made(files="nowhere://a")
    assert jobs_made(database="kept/jobs.sqlite3").database == str(repository / "kept/jobs.sqlite3")
    assert jobs_made(files="memory://bucket/prefix").files == "memory://bucket/prefix"
    assert jobs_made(database=None).database is None and not [*repository.glob("**/*.sqlite3")]


def test_the_replica_takes_exactly_what_the_builder_gives() -> None:
    replicas = deployments_made(Args(model="a/b", sizes=["64x64"]))[1]
    inspect.signature(StableDiffusion.__init__).bind(None, *replicas.init_args, **replicas.init_kwargs)


def test_ray_accepts_the_builder_and_its_args(repository: Path) -> None:
    args, builder = args_of(ROOT / "serve_config.yaml"), cast(FunctionType, text_to_image)
    api.call_user_app_builder_with_args_if_necessary(builder, args)
    with pytest.raises(ValidationError, match="max_queue"):
        api.call_user_app_builder_with_args_if_necessary(builder, args | {"max_queue": 3})


def test_model_and_size_are_all_that_a_user_changes_to_serve_stable_diffusion(repository: Path) -> None:
    args = args_of(ROOT / "serve_config.yaml") | {"model": "CompVis/stable-diffusion-v1-4", "sizes": ["512x512"]}
    _, replicas, service = deployments_made(Args.model_validate(args))
    assert (service.model, service.sizes) == ("CompVis/stable-diffusion-v1-4", ("512x512",))
    assert replicas.init_args[0].model == "CompVis/stable-diffusion-v1-4"


@pytest.mark.slow
def test_building_imports_no_jax() -> None:
    """In a process of its own, because another test may have imported JAX into this one."""
    script = (
        "import json, sys; from app.builders import Args, text_to_image;"
        "text_to_image(Args(model='CompVis/stable-diffusion-v1-4', sizes=['512x512']));"
        "print(json.dumps([name for name in ('jax', 'jaxlib', 'flax', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


BAD_ARGS: list[tuple[dict[str, Any], str]] = [
    ({"modle": "x"}, "Extra inputs are not permitted"),
    ({"limits": {"image": 1}}, "Extra inputs are not permitted"),
    ({"dtype": "float16"}, "Input should be 'float32' or 'bfloat16'"),
    ({"sizes": []}, "at least 1 item"),
    ({"sizes": ["512"]}, "sizes must be WIDTHxHEIGHT in multiples of 8, such as 512x512, got 512."),
    ({"sizes": ["512x510"]}, "got 512x510."),
    ({"sizes": ["64x64", "64x64"]}, "a value must not stand twice, got ['64x64', '64x64']."),
    ({"batch_buckets": []}, "at least 1 item"),
    ({"batch_buckets": [0]}, "greater than or equal to 1"),
    ({"batch_buckets": [2, 2]}, "a value must not stand twice, got [2, 2]."),
    ({"decode_buckets": []}, "at least 1 item"),
    ({"decode_buckets": [1, 1]}, "a value must not stand twice, got [1, 1]."),
    (
        {"batch_buckets": [1], "decode_buckets": [4]},
        "decode_buckets must be at most 2, twice the largest of batch_buckets, got 4.",
    ),
    ({"decode_buckets": [1, 9]}, "decode_buckets must be at most 8, twice the largest of batch_buckets, got 9."),
    ({"images_at_once": "all"}, "Input should be 'auto'"),
    ({"images_at_once": 0}, "greater than or equal to 1"),
    ({"admission_gain": -0.1}, "greater than or equal to 0"),
    ({"max_waiting": 0}, "greater than or equal to 1"),
    ({"prompt_cache": 0}, "greater than or equal to 1"),
    ({"encoding_threads": 0}, "greater than or equal to 1"),
    ({"stall_s": 0.5}, "greater than or equal to 1"),
    ({"limits": {"partial_images": 17}}, "less than or equal to 16"),
    (
        {"limits": {"num_inference_steps": [50, 1]}},
        "a range must be [lowest, highest] with lowest at least 1, got [50, 1].",
    ),
    (
        {"limits": {"num_inference_steps": [0, 9]}},
        "a range must be [lowest, highest] with lowest at least 1, got [0, 9].",
    ),
    ({"limits": {"guidance_scale": [1, float("inf")]}}, "finite number"),
    ({"limits": {"timeout_s": 0}}, "greater than 0"),
    (
        {"defaults": {"num_inference_steps": 101}},
        "defaults.num_inference_steps must be within limits.num_inference_steps, 1 to 100, got 101.",
    ),
    (
        {"defaults": {"guidance_scale": 0.5}},
        "defaults.guidance_scale must be within limits.guidance_scale, 1.0 to 20.0, got 0.5.",
    ),
    ({"defaults": {"sampler": "plms"}}, "defaults.sampler must be null or one of ddim, "),
    ({"encoding": {"output_format": "gif"}}, "Input should be 'png', 'webp' or 'jpeg'"),
    ({"encoding": {"png_level": 10}}, "less than or equal to 9"),
    ({"qualities": {"hd": 200}}, "qualities.hd must be within limits.num_inference_steps, 1 to 100, got 200."),
    ({"qualities": {"auto": 20}}, "Input should be 'low', 'medium', 'high' or 'hd'"),
    ({"cors_origins": ["https://a.example/"]}, "a host in lower case, without a path, got https://a.example/."),
    ({"cors_origins": ["*"]}, "an origin must be http:// or https:// and a host"),
    ({"aliases": ["a", "a"]}, "a value must not stand twice, got ['a', 'a']."),
]


def test_defaults_may_be_left_to_the_checkpoint() -> None:
    defaults = {"num_inference_steps": None, "guidance_scale": None}
    args = Args.model_validate({"model": "a/b", "sizes": ["64x64"], "defaults": defaults})
    assert args.defaults.numbers is None
    own, limits = RequestDefaults(50, 0.0), Limits(num_inference_steps=(1, 8), guidance_scale=(0.0, 1.0))
    numbers, remarks = args.defaults.completed(own, limits)
    assert numbers == (8, 0.0)
    assert remarks == (
        "The checkpoint's num_inference_steps is 50, outside limits.num_inference_steps; the default is 8.",
    )
    assert Defaults(num_inference_steps=3, guidance_scale=None).completed(own, limits) == ((3, 0.0), ())
    assert Defaults(num_inference_steps=3, guidance_scale=9.0).numbers == (3, 9.0)


@pytest.mark.parametrize(("change", "message"), BAD_ARGS, ids=[str(case[0]) for case in BAD_ARGS])
def test_bad_args_are_refused_with_the_offender_and_the_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Args.model_validate({"model": "a/b", "sizes": ["64x64"], **change})
    assert message in str(caught.value)


def test_a_model_is_a_folder_of_the_repository_or_a_repo_id(repository: Path) -> None:
    assert locate("assets/demo-model") == (str(repository / "assets/demo-model"), "demo-model")
    assert locate(str(repository / "assets/demo-model")) == (str(repository / "assets/demo-model"), "demo-model")
    assert locate("CompVis/stable-diffusion-v1-4") == ("CompVis/stable-diffusion-v1-4",) * 2


@pytest.mark.parametrize(
    "model",
    ["assets/demo-modle", "/no/such/folder", "./x", "stable-diffusion", "a/b/c", "", "../x", "models/x.safetensors"],
)
def test_a_slip_in_a_path_is_not_taken_for_a_repo_id(repository: Path, model: str) -> None:
    with pytest.raises(
        ValueError, match="model must be a folder in diffusers layout, a .safetensors file or a Hugging"
    ):
        locate(model)


def test_a_model_in_one_file_needs_a_tokenizer(repository: Path) -> None:
    (repository / "some.safetensors").touch()
    args = {"model": "some.safetensors", "sizes": ["64x64"]}
    with pytest.raises(ValueError, match="tokenizer must be a folder with CLIP's vocabulary, or a repo id such as op"):
        text_to_image(Args.model_validate(args))
    with pytest.raises(ValueError, match="tokenizer must be a folder or a Hugging Face repo id, got ./clip"):
        text_to_image(Args.model_validate({**args, "tokenizer": "./clip"}))
    with pytest.raises(ValueError, match="variant is only of a folder or a repo id, and some.safetensors is one file"):
        text_to_image(Args.model_validate({**args, "variant": "fp16"}))
    for name, location in (("assets", str(repository / "assets")), ("openai/clip", "openai/clip")):
        _, replicas, service = deployments_made(Args.model_validate({**args, "tokenizer": name}))
        (spec,) = replicas.init_args
        assert (spec.model, spec.tokenizer) == (str(repository / "some.safetensors"), location)
        assert service.model == "some"


def test_only_a_model_in_one_file_takes_a_tokenizer(repository: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer is only of a model in one file; assets/demo-model has its own"):
        text_to_image(Args.model_validate({"model": "assets/demo-model", "tokenizer": "a/b", "sizes": ["64x64"]}))


def test_a_pickled_file_is_refused(repository: Path) -> None:
    (repository / "some.ckpt").touch()
    with pytest.raises(ValueError, match="model must be a .safetensors file where it is one file, got some.ckpt"):
        locate("some.ckpt")
