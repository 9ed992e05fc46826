"""The application with parts that fail on request, for tests that deploy it on a real cluster. Imported by Serve, never
by pytest."""

import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.serve import Application
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import builders
from app.api import ingress
from app.engine.virtual import Encoded
from app.serving.replica import StableDiffusion
from app.types import PipelineSpec, RequestDefaults
from tests.fake_pipeline import FakePipeline


class APIIngress(ingress.APIIngress):
    """The ingress, with a route that blocks its event loop, as a mistake in a route would."""

    def __serve_build_asgi_app__(self) -> Starlette:
        app = super().__serve_build_asgi_app__()
        app.router.routes.append(Route("/block", self.block))
        return app

    async def block(self, request: Request) -> Response:
        time.sleep(float(request.query_params["s"]))  # noqa: ASYNC251
        return Response()


def blockable(args: builders.Args) -> Application:
    """The application of serve_config.yaml, with an ingress that a request can block."""
    builders.APIIngress = APIIngress  # type: ignore[attr-defined]
    return builders.text_to_image(args)


class HangingPipeline(FakePipeline):
    """A device that hangs for ever once a prompt is "a device that hangs"."""

    samplers = ("ddim",)
    notes = ()
    request_defaults = RequestDefaults()
    request_fields = ()
    hangs = False

    @classmethod
    def load(cls, spec: PipelineSpec) -> "HangingPipeline":
        return cls(sizes=spec.sizes)

    def warmup(self) -> None:
        pass

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        self.hangs = self.hangs or "a device that hangs" in texts
        return super().encode(texts)

    def wait(self, done: Any) -> None:
        if self.hangs:
            threading.Event().wait()
        super().wait(done)


class Hanging(StableDiffusion):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        sys.modules["app.diffusion.pipeline"] = SimpleNamespace(Pipeline=HangingPipeline)  # type: ignore[assignment]
        super().__init__(*arguments, **named)


def hanging(args: builders.Args) -> Application:
    """The application of serve_config.yaml over a device that can hang."""
    vars(builders)["StableDiffusion"] = Hanging
    return builders.text_to_image(args)
