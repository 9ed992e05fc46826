"""Applications that tests deploy on a real cluster. Imported by Serve, never by pytest."""

import os
import time
from pathlib import Path

from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from starlette.requests import Request


class Args(BaseModel):
    text: str = "hello"
    model: str = "."  # a folder that must exist when the replica starts
    start_s: float = 0.0


class Greeter:
    def __init__(self, args: Args) -> None:
        time.sleep(args.start_s)
        if not Path(args.model).is_dir():
            raise ValueError(
                f"model must be a folder in diffusers layout, got {args.model}.\nIt has no model_index.json."
            )
        self.text = args.text

    async def __call__(self, request: Request) -> dict[str, str | None]:
        return {"text": self.text, "chips": os.environ.get("TPU_VISIBLE_CHIPS")}


def greeter(args: Args) -> Application:
    return serve.deployment(name="Greeter")(Greeter).bind(args)
