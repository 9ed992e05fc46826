"""Each key and each value of a Serve config by itself, against the models that will read it: Ray's own, which ignore a
key that they do not know, and what the app's builder takes as its args.

Knows nothing of how values fit together.
"""

import importlib
import inspect
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from app.builders import Args
from app.ray_internals.serve import deployment_names
from app.types import InvalidField
from cluster import ROOT
from cluster.config.documents import Document, Finding, Key, nearest

Model = TypeVar("Model", bound=BaseModel)

# Names that Ray had once. Some of them it still takes, as deprecated.
RETIRED = {
    "max_concurrent_queries": "max_ongoing_requests",
    "target_num_ongoing_requests_per_replica": "target_ongoing_requests",
    "smoothing_factor": "upscaling_factor and downscaling_factor",
    "upscale_smoothing_factor": "upscaling_factor",
    "downscale_smoothing_factor": "downscaling_factor",
}


def check_keys(document: Document) -> Iterator[Finding]:
    yield from unknown_keys(document, (), ServeDeploySchema)


def check_values(document: Document) -> Iterator[Finding]:
    found = [*wrong_values(document, (), ServeDeploySchema)]
    for key in applications(document):
        found += check_builder(document, key)
        for deployment in items(document, (*key, "deployments")):
            scaling = (*deployment, "autoscaling_config")
            if isinstance(document.at(scaling), dict):  # to Ray a dict as well as a model, so whatever it holds passes
                found += [*wrong_values(document, scaling, AutoscalingConfig)] or check_window(document, scaling)
            found += check_resources(document, (*deployment, "ray_actor_options", "resources"))
    yield from dict.fromkeys(found)


def applications(document: Document) -> Iterator[Key]:
    return items(document, ("applications",))


def items(document: Document, key: Key) -> Iterator[Key]:
    """Of a list of mappings, if that is what stands there."""
    value = document.at(key)
    for i, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict):
            yield (*key, i)


# Keys


def unknown_keys(document: Document, key: Key, model: Any) -> Iterator[Finding]:
    value = document.at(key)
    if not isinstance(value, dict):
        return
    for name in value:
        if name not in fields(model):
            yield document.error((*key, name), f"is not known here, and {fate(model)}.{right_key(name, model)}")
        elif model is not RuntimeEnv:
            yield from deprecated(document, (*key, name), model)
            for place, reader in readers(document, (*key, name), model):
                yield from unknown_keys(document, place, reader)


def fields(model: Any) -> set[str]:
    return set(RuntimeEnv.known_fields if model is RuntimeEnv else model.model_fields)


def readers(document: Document, key: Key, model: type[BaseModel]) -> Iterator[tuple[Key, Any]]:
    """Which model reads a value, or each item of it if it is a list."""
    name = str(key[-1])
    reader: Any = next(models_in(model.model_fields[name].annotation), None)
    if name == "runtime_env":  # here and below, Ray's models say dict
        reader = RuntimeEnv
    elif (model, name) == (ServeApplicationSchema, "autoscaling_policy"):
        reader = AutoscalingPolicy
    elif (model, name) == (ServeApplicationSchema, "args"):
        reader = args_model(load(document.at((*key[:-1], "import_path"))))
    if reader:
        yield from ((place, reader) for place in [key, *items(document, key)])


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def fate(model: Any) -> str:
    refused = model is not RuntimeEnv and model.model_config.get("extra") == "forbid"
    return "would be refused" if refused else "Ray would ignore it in silence"


def right_key(name: object, model: Any) -> str:
    if (new := RETIRED.get(str(name))) and set(new.split(" and ")) <= fields(model):
        return f" It is called {new} now."
    if elsewhere := [place for place, known in PLACES.items() if name in known]:
        return f" It belongs in {' or '.join(elsewhere)}."
    return nearest(name, (known for known in fields(model) if not known.startswith("_")))


def deprecated(document: Document, key: Key, model: type[BaseModel]) -> Iterator[Finding]:
    """Not metrics_interval_s, which Ray marks as deprecated too: what is to replace it has no effect in Ray 2.60."""
    name = str(key[-1])
    if name in RETIRED and (model.model_fields[name].description or "").startswith("[DEPRECATED]"):
        yield document.advice(key, f"is deprecated: use {RETIRED[name]}.")


def places(model: type[BaseModel], place: str) -> Iterator[tuple[str, frozenset[str]]]:
    yield place, frozenset(model.model_fields)
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from places(inner, f"args.{name}" if place == "args" else name)


# What is known where, for a key that stands in the wrong mapping.
PLACES: Mapping[str, frozenset[str]] = dict([*places(ServeDeploySchema, "the top"), *places(Args, "args")])


# Values


def wrong_values(document: Document, key: Key, model: type[BaseModel]) -> Iterator[Finding]:
    try:
        quietly(model, document.at(key) if document.has(key) else {})
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] != "extra_forbidden":  # unknown_keys tells it, with the right one
                yield document.error(resolved(document, key, problem["loc"]), words(problem))
    except (ImportError, ValueError, AttributeError) as error:  # of an autoscaling policy, which is imported
        if key:  # not where the whole file is read, but where the policy stands
            yield document.error(key, f"is not valid: {error}")


def check_window(document: Document, key: Key) -> Iterator[Finding]:
    """Ray only warns of it, on a console that nobody sees, and announces that it will refuse it."""
    config = quietly(AutoscalingConfig, document.at(key))
    if config.look_back_period_s <= config.metrics_interval_s:
        text = f"must be above metrics_interval_s, {config.metrics_interval_s:g}, got {config.look_back_period_s:g}."
        yield document.error((*key, "look_back_period_s"), text)


def check_resources(document: Document, key: Key) -> Iterator[Finding]:
    """Ray's model takes anything here."""
    resources = document.at(key)
    for name, amount in resources.items() if isinstance(resources, dict) else ():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 0:
            yield document.error((*key, name), f"must be a number and not negative, got {amount!r}.")


def quietly(model: type[Model], value: Any) -> Model:
    """A value as its model, whatever Ray warns of meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.model_validate(value)


def resolved(document: Document, key: Key, location: tuple[str | int, ...]) -> Key:
    """Pydantic's location as a key of the file: without the members of a union that it tried."""
    for i, part in enumerate(location):
        if document.has((*key, part)) or i == len(location) - 1:
            key = (*key, part)
    return key


def words(problem: Any) -> str:
    if problem["type"] == "missing":
        return "is missing."
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"is not valid: {message}" + ("" if problem["type"] == "value_error" else f", got {problem['input']!r}.")


# The builder


def load(import_path: object) -> object:
    """What an import path names, or the exception instead: as it will go on the cluster."""
    module, _, name = str(import_path).replace(":", ".").rpartition(".")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a module runs it, so anything may happen
        return error


def args_model(builder: object) -> type[BaseModel] | None:
    if isinstance(builder, FunctionType):
        for parameter in inspect.signature(builder).parameters.values():
            return next(models_in(parameter.annotation), None)
    return None


def known_args(document: Document, key: Key, model: type[BaseModel]) -> dict[str, Any]:
    """An application's args without those keys that unknown_keys tells."""
    args = document.at((*key, "args")) or {}
    return {name: value for name, value in args.items() if name in model.model_fields}


def check_builder(document: Document, key: Key) -> Iterator[Finding]:
    builder = load(document.at((*key, "import_path")))
    if isinstance(builder, Exception):
        if document.has((*key, "import_path")):
            text = f"cannot be imported: {type(builder).__name__}: {builder}"
            yield document.error((*key, "import_path"), text)
        return
    args: Any = document.at((*key, "args")) or {}
    if (model := args_model(builder)) and isinstance(args, dict):
        yield from wrong_values(document, (*key, "args"), model)
        args = known_args(document, key, model)
        try:
            model.model_validate(args)
        except ValidationError:  # told by now: a wrong value, or an unknown key
            return
    yield from check_names(document, key, builder, args)


def check_names(document: Document, key: Key, builder: Any, args: Any) -> Iterator[Finding]:
    """A deployment of the config must be one of those that the builder makes."""
    try:
        names = deployment_names(builder, args)
    except InvalidField as error:
        if document.has((*key, "args", error.field)):
            yield document.error((*key, "args", error.field), error.message.removeprefix(f"{error.field} "))
        else:
            yield document.error((*key, "args"), f"are refused by the builder: {error}")
        return
    except Exception as error:  # a user's own builder may raise anything
        yield document.error((*key, "args"), f"are refused by the builder: {error}")
        return
    for deployment in items(document, (*key, "deployments")):
        if (name := document.at((*deployment, "name"))) not in names:
            text = f"must be one that the builder makes, {' or '.join(names)}, got {name}.{nearest(name, names)}"
            yield document.error((*deployment, "name"), text)
