"""Rules about what the app builder makes of its args: it can be imported, accepts them, and makes these deployments."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from app.ray_internals.serve import deployment_names
from app.types import InvalidField
from cluster.config.documents import Finding, did_you_mean
from cluster.config.serve_config import Application, args_model, invalid_values, known_args, load


def check_builder(app: Application) -> Iterator[Finding]:
    builder = load(app.at("import_path"))
    if isinstance(builder, Exception):
        if app.at("import_path") is not None:
            yield app.error(("import_path",), f"cannot be imported: {type(builder).__name__}: {builder}")
        return
    args: Any = app.at("args") or {}
    if (model := args_model(builder)) and isinstance(args, dict):
        yield from invalid_values(app.document, (*app.key, "args"), model)
        args = known_args(app.document, app.key, model)
        try:
            model.model_validate(args)
        except ValidationError:  # already a finding: of a wrong value, or of an unknown key
            return
    yield from wrong_deployments(app, builder, args)


def wrong_deployments(app: Application, builder: Any, args: Any) -> Iterator[Finding]:
    """The builder accepts the args, and makes every deployment that the config names."""
    try:
        names = deployment_names(builder, args)
    except InvalidField as error:
        if app.document.has((*app.key, "args", error.field)):
            yield app.error(("args", error.field), error.message.removeprefix(f"{error.field} "))
        else:
            yield app.error(("args",), f"are refused by the builder: {error}")
        return
    except Exception as error:  # a user's own builder may raise anything
        yield app.error(("args",), f"are refused by the builder: {error}")
        return
    for deployment in app.deployments:
        if (name := deployment.at("name")) not in names:
            text = f"must be one that the builder makes, {' or '.join(names)}, got {name}.{did_you_mean(name, names)}"
            yield deployment.error(("name",), text)
