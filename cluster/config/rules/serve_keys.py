"""Rules about unknown keys of a Serve config. Ray ignores many of them in silence.

Known are the fields of the models that will read them: Ray's own, and the builder's model of its args.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from app.builders import Args
from cluster.config.documents import Document, Finding, Key, did_you_mean
from cluster.config.serve_config import args_model, load, models_in

# Names of earlier versions of Ray. Some of them it still accepts, as deprecated.
RENAMED = {
    "max_concurrent_queries": "max_ongoing_requests",
    "target_num_ongoing_requests_per_replica": "target_ongoing_requests",
    "smoothing_factor": "upscaling_factor and downscaling_factor",
    "upscale_smoothing_factor": "upscaling_factor",
    "downscale_smoothing_factor": "downscaling_factor",
}


def check_keys(document: Document) -> Iterator[Finding]:
    yield from unknown_keys(document, (), ServeDeploySchema)


def unknown_keys(document: Document, key: Key, model: Any) -> Iterator[Finding]:
    value = document.at(key)
    if not isinstance(value, dict):
        return
    for name in value:
        if name not in fields(model):
            yield document.error((*key, name), f"is not known here, and {fate(model)}.{suggestion(name, model)}")
        elif model is not RuntimeEnv:
            yield from deprecated(document, (*key, name), model)
            for place, reader in readers(document, (*key, name), model):
                yield from unknown_keys(document, place, reader)


def fields(model: Any) -> set[str]:
    return set(RuntimeEnv.known_fields if model is RuntimeEnv else model.model_fields)


def readers(document: Document, key: Key, model: type[BaseModel]) -> Iterator[tuple[Key, Any]]:
    """The model that reads a value, or each item of a list, with the key of what it reads."""
    name = str(key[-1])
    reader: Any = next(models_in(model.model_fields[name].annotation), None)
    if name == "runtime_env":  # Ray's models say dict for this and the next two
        reader = RuntimeEnv
    elif (model, name) == (ServeApplicationSchema, "autoscaling_policy"):
        reader = AutoscalingPolicy
    elif (model, name) == (ServeApplicationSchema, "args"):
        reader = args_model(load(document.at((*key[:-1], "import_path"))))
    if reader:
        yield from ((place, reader) for place in [key, *document.mappings(key)])


def fate(model: Any) -> str:
    refused = model is not RuntimeEnv and model.model_config.get("extra") == "forbid"
    return "would be refused" if refused else "Ray would ignore it in silence"


def suggestion(name: object, model: Any) -> str:
    if (new := RENAMED.get(str(name))) and set(new.split(" and ")) <= fields(model):
        return f" It is called {new} now."
    if elsewhere := [place for place, known in PLACES.items() if name in known]:
        return f" It belongs in {' or '.join(elsewhere)}."
    return did_you_mean(name, (known for known in fields(model) if not known.startswith("_")))


def deprecated(document: Document, key: Key, model: type[BaseModel]) -> Iterator[Finding]:
    """Leaves out metrics_interval_s, which Ray marks as deprecated too: its successor has no effect in Ray 2.60."""
    name = str(key[-1])
    if name in RENAMED and (model.model_fields[name].description or "").startswith("[DEPRECATED]"):
        yield document.advice(key, f"is deprecated: use {RENAMED[name]}.")


def places(model: type[BaseModel], place: str) -> Iterator[tuple[str, frozenset[str]]]:
    yield place, frozenset(model.model_fields)
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from places(inner, f"args.{name}" if place == "args" else name)


# The keys of each mapping, to say where a misplaced key belongs.
PLACES: Mapping[str, frozenset[str]] = dict([*places(ServeDeploySchema, "the top"), *places(Args, "args")])
