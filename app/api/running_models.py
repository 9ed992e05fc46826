"""Which models the replicas run, and the rules that a request for one of them must meet."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from app.api.errors import ApiError
from app.api.jobs.worker import Serving
from app.api.messages import Description, ImageRequest
from app.api.replica_calls import Pending, answer_of
from app.api.replicas import BROADCAST_TIMEOUT_S, Replicas
from app.api.settings import Service
from app.types import InvalidField, RequestDefaults

Content = TypeVar("Content")

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

READY_TIMEOUT_S = 5.0  # how long /v1/models and /healthz wait for a replica that may still be warming up
PATIENCE_S = 0.3  # how long they wait for a new description if there is an older one


class RunningModels:
    """The rules of the config, `service`, adapted to what the replicas describe."""

    def __init__(self, service: Service, replicas: Replicas) -> None:
        self.service = service
        self.replicas = replicas
        self.logged: set[str] = set()

    def services(self) -> list[Service]:
        """The rules for requests, one for each running replica; the config's while none has answered."""
        known = self.replicas.watch.current
        if not known and self.service.defaults.numbers is None:  # which a busy replica need not say again
            known = self.replicas.watch.latest
        return [self.adapted(description) for description in known] or [self.service]

    async def candidates(self, edits: bool = False) -> list[Service]:
        """The rules of each model that runs: a request may name any of them. Only a replica knows what it can make."""
        await self.replicas.watch.descriptions(0, BROADCAST_TIMEOUT_S)
        services = {service.model: service for service in self.services()}
        unknown = any(service.defaults.numbers is None for service in services.values())
        if unknown or edits and not self.replicas.watch.current:  # no replica has answered yet
            service = self.adapted(await self.describe(self.service.limits.timeout_s))
            services = {service.model: service}
        return [*services.values()]

    async def serving(self) -> Serving:
        """What jobs may be sent to. Where no replica runs, the first of them starts one."""
        await self.replicas.watch.descriptions(PATIENCE_S, BROADCAST_TIMEOUT_S)
        models = {service.model for service in self.services()}
        return Serving(models, max(1, len(self.replicas.watch.current)))

    async def latest(self) -> list[tuple[Service, Description]]:
        """The replicas that run, by their latest descriptions."""
        if not (descriptions := await self.replicas.watch.descriptions(PATIENCE_S, BROADCAST_TIMEOUT_S)):
            descriptions = (await self.describe(READY_TIMEOUT_S),)
        return [(self.adapted(description), description) for description in descriptions]

    def adapted(self, description: Description) -> Service:
        """The config's rules for a replica. Logs once what its limits change."""
        service = adapted(self.service, description)
        for note in service.notes:
            if note not in self.logged:
                self.logged.add(note)
                logger.warning(note)
        return service

    async def describe(self, timeout_s: float) -> Description:
        """Asks as image requests do, where a broadcast has reached no replica: that starts one where the deployment has
        scaled to zero, and fails at once if none will start."""
        response: Pending[Description] = self.replicas.handle.describe.remote()
        try:
            return await answer_of(response, timeout_s)
        except ApiError as error:
            if error.status != 504:
                raise
            message = "No replica has answered: the model may still be loading."
            raise ApiError(503, message, None, "model_not_ready", READY_TIMEOUT_S) from None


def parse_for(
    services: Sequence[Service], parse: Callable[[Content, Service], ImageRequest], content: Content
) -> tuple[ImageRequest, Service]:
    """The request, and the rules of the model that it is for."""
    for service in services:
        try:
            return parse(content, service), service
        except InvalidField as error:
            if error.code != "model_not_found":
                raise
            unknown_model = error
    raise unknown_model


def adapted(service: Service, description: Description) -> Service:
    """The config's rules, with the model and the sizes that the replica serves, and its checkpoint's own defaults where
    the config has none."""
    own = RequestDefaults(description.num_inference_steps, description.guidance_scale)
    sizes, able = description.sizes or service.sizes, description.capabilities
    return replace(service.completed(own), model=description.model or service.model, sizes=sizes, capabilities=able)
