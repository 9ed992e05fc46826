"""Private parts of Ray Serve: constants of its proxy, defaults of its options, and how it runs an app builder."""

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

__all__ = [
    "DEFAULT_AUTOSCALING_POLICY_NAME",  # the policy that looks at target_ongoing_requests
    "RAY_SERVE_ENABLE_HA_PROXY",  # whether HAProxy stands before Serve's own proxy
    "SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER",  # this and the following: headers that a client must not set
    "SERVE_HTTP_REQUEST_ID_HEADER",
    "SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER",
    "SERVE_MULTIPLEXED_MODEL_ID",
    "SERVE_SESSION_ID",
    "default_option",
    "deployment_names",
]


def default_option(name: str) -> Any:
    """The value of a deployment's option where a Serve config has none."""
    return DeploymentConfig.model_fields[name].default


def deployment_names(builder: Any, args: Any) -> list[str]:
    """The deployments of the application that a builder makes of these args. Raises whatever the builder raises."""
    application: Application = call_user_app_builder_with_args_if_necessary(builder, args)
    return [deployment.name for deployment in build_app(application, name="lint").deployments]
