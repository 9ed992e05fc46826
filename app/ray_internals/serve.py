"""Private parts of Ray Serve: constants of its proxy, defaults of its options, and how it runs an app builder."""

from collections.abc import Awaitable, Callable
from typing import Any

from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.constants import (
    DEFAULT_AUTOSCALING_POLICY_NAME,
    RAY_SERVE_ENABLE_HA_PROXY,
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)
from ray.serve._private.utils import generate_request_id
from ray.serve.context import _set_request_context

__all__ = [
    "DEFAULT_AUTOSCALING_POLICY_NAME",  # the policy that looks at target_ongoing_requests
    "RAY_SERVE_ENABLE_HA_PROXY",  # whether HAProxy stands before Serve's own proxy
    "SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER",  # this and the following: headers that a client must not set
    "SERVE_HTTP_REQUEST_ID_HEADER",
    "SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER",
    "SERVE_MULTIPLEXED_MODEL_ID",
    "SERVE_SESSION_ID",
    "begin_own_request",
    "default_option",
    "deployment_names",
    "on_shutdown",
]


def on_shutdown(callback: Callable[[float], None]) -> None:
    """Has this process's replica call `callback`, with its graceful_shutdown_timeout_s, when Serve begins to end it.

    Serve then waits for all requests to end, and only after that calls user code, `__del__`. The callback runs on
    Serve's event loop, so it must return at once (ray/serve/_private/replica.py).
    """
    from ray.serve._private.replica import Replica  # a replica's process has it anyway, the ingress need not

    shutdown: Callable[[Replica], Awaitable[None]] = Replica._perform_graceful_shutdown

    async def tell_and_shutdown(self: Replica) -> None:
        try:
            callback(float(self._deployment_config.graceful_shutdown_timeout_s))
        finally:
            await shutdown(self)

    Replica._perform_graceful_shutdown = tell_and_shutdown  # type: ignore[method-assign]


def begin_own_request() -> None:
    """Gives the handle calls of the current task an id of their own, under the X-Request-ID of the HTTP request.

    Serve's router looks its pending calls up by that id, so calls of one HTTP request that wait at the same time would
    be taken for one another (ray/serve/_private/request_router/request_router.py).
    """
    _set_request_context(_internal_request_id=generate_request_id())


def default_option(name: str) -> Any:
    """The value of a deployment's option where a Serve config has none."""
    return DeploymentConfig.model_fields[name].default


def deployment_names(builder: Any, args: Any) -> list[str]:
    """The deployments of the application that a builder makes of these args. Raises whatever the builder raises."""
    application: Application = call_user_app_builder_with_args_if_necessary(builder, args)
    return [deployment.name for deployment in build_app(application, name="lint").deployments]
