"""The options of a training: one for each number of its recipe."""

import dataclasses
from argparse import Namespace
from collections.abc import Iterable
from typing import TypeVar

from cluster.cli import Parser, integer_between
from demo.training.flow_recipe import FlowRecipe
from demo.training.recipe import Recipe

AnyRecipe = TypeVar("AnyRecipe", Recipe, FlowRecipe)


def add_options(parser: Parser, recipe: type[Recipe] | type[FlowRecipe], architectures: Iterable[str]) -> None:
    for field in dataclasses.fields(recipe):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        if field.name == "architecture":
            parser.add_argument(option, choices=list(architectures), default=default, help="%(default)s")
        else:
            kind = float if isinstance(default, float) else integer_between(0, 10**9)
            parser.add_argument(option, type=kind, default=default, help="%(default)s")


def recipe_of(recipe: type[AnyRecipe], arguments: Namespace) -> AnyRecipe:
    return recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(recipe)})
