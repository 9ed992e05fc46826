"""The model of a Serve config: applications and deployments, each value as Ray Serve and the app builder will read it.

Values that the file leaves out are Ray's defaults. Rules about values stand in cluster/config/rules/.
"""

import importlib
import inspect
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import HTTPOptionsSchema, RayActorOptionsSchema, ServeDeploySchema

from app.builders import Args
from app.ray_internals.core import tpu
from app.ray_internals.serve import default_option
from cluster import ROOT
from cluster.config.documents import Document, Finding, Key, Section, read_with, refuse

KEY = "applications"  # the key that makes a file a Serve config
BUILDER = "app.builders:text_to_image"
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Deployment(Section):
    @property
    def name(self) -> str:
        return str(self.at("name"))

    def option(self, name: str) -> Any:
        options: Mapping[str, Any] = self.at()
        return options.get(name, default_option(name))

    @property
    def actor(self) -> RayActorOptionsSchema:
        return RayActorOptionsSchema.model_validate(self.at("ray_actor_options") or {})

    @property
    def chips(self) -> int:
        """The TPU chips of a replica: 0 if it asks for none, or for a number that Ray refuses."""
        chips = self.actor.resources.get("TPU", 0)
        return int(chips) if chips in tpu.TPU_VALID_CHIP_OPTIONS else 0

    @property
    def gpus(self) -> float:
        return self.actor.num_gpus or 0

    @property
    def devices(self) -> int:
        """The chips or GPUs that a replica divides its rows among."""
        return self.chips or int(self.gpus)

    @property
    def devices_key(self) -> Key:
        return ("ray_actor_options", "num_gpus") if self.gpus else ("ray_actor_options", "resources", "TPU")

    @property
    def autoscaling(self) -> AutoscalingConfig | None:
        options = self.at("autoscaling_config") or {}
        if self.at("num_replicas") == "auto":
            options = {"max_replicas": 100, **options}  # as in AutoscalingConfig.default()
        return validated(AutoscalingConfig, options) if options else None

    @property
    def max_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else int(self.option("num_replicas") or 1)

    @property
    def max_replicas_key(self) -> Key:
        return ("autoscaling_config", "max_replicas") if self.autoscaling else ("num_replicas",)


@dataclass(frozen=True)
class Application(Section):
    @property
    def import_path(self) -> str:
        return str(self.at("import_path")).replace(":", ".")

    @cached_property
    def args(self) -> BaseModel | None:
        """The args as the builder's model, without unknown ones; None if there is no model, or they do not fit it."""
        model = args_model(load(self.at("import_path")))
        try:
            return model.model_validate(known_args(self.document, self.key, model)) if model else None
        except ValidationError:  # an unknown key in a nested mapping
            return None

    def image_args(self) -> Args:
        """The args of an application of app.builders:text_to_image. Raises UserError with the line of each mistake."""
        refuse(invalid_values(self.document, (*self.key, "args"), Args, unknown_too=True))
        return Args.model_validate(self.at("args") or {})

    @property
    def deployments(self) -> list[Deployment]:
        return [Deployment(self.document, key) for key in self.document.mappings((*self.key, "deployments"))]

    def deployment(self, kind: type) -> Deployment | None:
        return next((deployment for deployment in self.deployments if deployment.name == kind.__name__), None)


@dataclass(frozen=True)
class ServeConfig:
    document: Document

    @property
    def applications(self) -> list[Application]:
        return [Application(self.document, key) for key in self.document.mappings((KEY,))]

    @property
    def image_applications(self) -> list[Application]:
        """The applications that app.builders:text_to_image builds."""
        return [app for app in self.applications if app.import_path == BUILDER.replace(":", ".")]

    @property
    def http(self) -> HTTPOptionsSchema:
        return HTTPOptionsSchema.model_validate(self.document.at(("http_options",)) or {})


def read(path: Path) -> ServeConfig:
    """Raises UserError where the file is no Serve config, or Ray would refuse a value. Does not look at the args."""
    document = read_with(path, KEY, "Serve config")
    refuse(problems(document))
    return ServeConfig(document)


def problems(document: Document) -> list[Finding]:
    """Values that Ray Serve would refuse, or misread in silence."""
    findings = [*invalid_values(document, (), ServeDeploySchema)]
    for application in ServeConfig(document).applications:
        for deployment in application.deployments:
            key = (*deployment.key, "autoscaling_config")
            if isinstance(document.at(key), dict):  # Ray's schema accepts any mapping
                findings += invalid_values(document, key, AutoscalingConfig)
            findings += invalid_resources(deployment)
    return [*dict.fromkeys(findings)]


def invalid_values(
    document: Document, key: Key, model: type[BaseModel], unknown_too: bool = False
) -> Iterator[Finding]:
    """What a pydantic model refuses of a value. Unknown keys have a rule of their own, which knows the right ones."""
    try:
        validated(model, document.at(key) if document.has(key) else {})
    except ValidationError as error:
        for problem in error.errors():
            if unknown_too or problem["type"] != "extra_forbidden":
                yield document.error(resolved(document, key, problem["loc"]), sentence(problem))
    except (ImportError, ValueError, AttributeError) as error:  # of an autoscaling policy, which Ray imports
        if key:  # not for the whole file, as the autoscaling_config is validated by itself too
            yield document.error(key, f"is not valid: {error}")


def invalid_resources(deployment: Deployment) -> Iterator[Finding]:
    """Amounts that are no numbers, which Ray's schema accepts."""
    resources = deployment.at("ray_actor_options", "resources")
    for name, amount in resources.items() if isinstance(resources, dict) else ():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 0:
            text = f"must be a number and not negative, got {amount!r}."
            yield deployment.error(("ray_actor_options", "resources", name), text)


def validated(model: type[Model], value: Any) -> Model:
    """A value as a model, without Ray's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.model_validate(value)


def resolved(document: Document, key: Key, location: tuple[str | int, ...]) -> Key:
    """Pydantic's location as a key of the file: without the members of a union, which pydantic adds."""
    for i, part in enumerate(location):
        if document.has((*key, part)) or i == len(location) - 1:
            key = (*key, part)
    return key


def sentence(problem: Any) -> str:
    match problem["type"]:
        case "missing":
            return "is missing."
        case "extra_forbidden":
            return "is not known, and would be refused."
        case "value_error":
            return f"is not valid: {str(problem['msg']).removeprefix('Value error, ')}"
        case _:
            return f"is not valid: {problem['msg']}, got {problem['input']!r}."


# The builder and the model of its args


def load(import_path: object) -> object:
    """The object that an import path names, as on the cluster, or the exception that its import raises."""
    module, _, name = str(import_path).replace(":", ".").rpartition(".")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # an import runs the module, so it may raise anything
        return error


def args_model(builder: object) -> type[BaseModel] | None:
    """The pydantic model that a builder takes, by the annotation of its first parameter."""
    if isinstance(builder, FunctionType):
        for parameter in inspect.signature(builder).parameters.values():
            return next(models_in(parameter.annotation), None)
    return None


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def known_args(document: Document, key: Key, model: type[BaseModel]) -> dict[str, Any]:
    """An application's args without those that the model does not know."""
    args = document.at((*key, "args")) or {}
    return {name: value for name, value in args.items() if name in model.model_fields}
