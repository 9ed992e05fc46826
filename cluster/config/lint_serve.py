"""How the numbers of a Serve config fit together: slots, queues, chips, timeouts, the autoscaling target.

Takes configs whose every value is valid by itself. Knows nothing of clusters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import HTTPOptionsSchema, RayActorOptionsSchema

from app.api.auth import is_loopback
from app.api.ingress import APIIngress
from app.api.settings import LONGEST_QUERY
from app.builders import Args
from app.ray_internals.core import tpu
from app.ray_internals.serve import DEFAULT_AUTOSCALING_POLICY_NAME, default_option
from app.serving.replica import StableDiffusion
from app.types import SLOTS_PER_IMAGE
from cluster.config.documents import Document, Finding, Key
from cluster.config.lint_models import applications, args_model, items, known_args, load, quietly

ESCAPED_BYTES = 12  # most that a character takes in a query or in JSON: two surrogates as \uXXXX
FAILURES = 3  # of health checks in a row, after which Serve replaces a replica


@dataclass(frozen=True)
class Deployment:
    """One deployment of a config that Ray accepts, with Ray's own values where it says nothing."""

    key: Key
    name: str
    said: Mapping[str, Any]

    def option(self, name: str) -> Any:
        return self.said.get(name, default_option(name))

    @property
    def actor(self) -> RayActorOptionsSchema:
        return RayActorOptionsSchema.model_validate(self.said.get("ray_actor_options") or {})

    @property
    def chips(self) -> int:
        """0 if it asks for none, or for a number that Ray refuses."""
        chips = self.actor.resources.get("TPU", 0)
        return int(chips) if chips in tpu.TPU_VALID_CHIP_OPTIONS else 0

    @property
    def autoscaling(self) -> AutoscalingConfig | None:
        said = self.said.get("autoscaling_config") or {}
        if self.said.get("num_replicas") == "auto":
            said = {"max_replicas": 100, **said}  # as AutoscalingConfig.default() has it
        return quietly(AutoscalingConfig, said) if said else None

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else int(self.option("num_replicas") or 1)

    @property
    def most_replicas_key(self) -> Key:
        return (*self.key, *(("autoscaling_config", "max_replicas") if self.autoscaling else ("num_replicas",)))


@dataclass(frozen=True)
class App:
    """One application of a config that Ray accepts."""

    key: Key
    args: BaseModel | None  # if its builder takes a model, and these fit it
    deployments: tuple[Deployment, ...]

    def deployment(self, of: type) -> Deployment | None:
        return next((one for one in self.deployments if one.name == of.__name__), None)


def check_fit(document: Document) -> Iterator[Finding]:
    yield from check_doors(document)
    for app in apps(document):
        yield from check_app(document, app)


def apps(document: Document) -> Iterator[App]:
    for key in applications(document):
        deployments = tuple(
            Deployment(one, document.at(one)["name"], document.at(one))
            for one in items(document, (*key, "deployments"))
        )
        yield App(key, args_of(document, key), deployments)


def args_of(document: Document, key: Key) -> BaseModel | None:
    model = args_model(load(document.at((*key, "import_path"))))
    try:
        return model.model_validate(known_args(document, key, model)) if model else None
    except ValidationError:  # an unknown key within, which has been told
        return None


def check_doors(document: Document) -> Iterator[Finding]:
    http = HTTPOptionsSchema.model_validate(document.value.get("http_options") or {})
    key: Key = ("http_options", "host")
    keyed = all(getattr(app.args, "api_keys_file", None) is not None for app in apps(document))
    loopback = http.host == "localhost" or is_loopback((http.host,))
    if not loopback and not keyed:
        text = f"must be loopback, 127.0.0.1, unless every application has args.api_keys_file, got {http.host}."
        yield document.error(key, text)
    if loopback and document.value.get("proxy_location", "EveryNode") == "EveryNode":
        text = f"is EveryNode, and http_options.host {http.host}: only the node itself could reach its door."
        yield document.advice(("proxy_location",), text)


def check_app(document: Document, app: App) -> Iterator[Finding]:
    for deployment in app.deployments:
        yield from check_deployment(document, deployment)
    ingress, model = app.deployment(APIIngress), app.deployment(StableDiffusion)
    if isinstance(app.args, Args):
        yield from check_limits(document, app.key, app.args)
        for deployment in filter(None, (ingress, model)):  # an answer of the model's passes through the ingress
            yield from check_drain(document, deployment, app.args)
            yield from check_health(document, deployment, app.args)
        if model:
            yield from check_model(document, model, app.args)
            yield from check_timeouts(document, model, app.args)
    if ingress and model:
        yield from check_order_of_limits(document, ingress, model)


def check_deployment(document: Document, deployment: Deployment) -> Iterator[Finding]:
    key, chips = deployment.key, deployment.actor.resources.get("TPU", 0)
    if chips and chips != deployment.chips:
        options = ", ".join(map(str, tpu.TPU_VALID_CHIP_OPTIONS))
        yield document.error((*key, "ray_actor_options", "resources", "TPU"), f"must be one of {options}, got {chips}.")
    loop_s, timeout_s = (deployment.option(f"graceful_shutdown_{name}_s") for name in ("wait_loop", "timeout"))
    if loop_s >= timeout_s:
        text = f"must be below graceful_shutdown_timeout_s, {timeout_s:g}, or nothing drains, got {loop_s:g}."
        yield document.error((*key, "graceful_shutdown_wait_loop_s"), text)


def check_limits(document: Document, key: Key, args: Args) -> Iterator[Finding]:
    prompt = ESCAPED_BYTES * args.limits.prompt_characters
    needs = (
        ("query_bytes", "one prompt", min(prompt, LONGEST_QUERY - 1)),  # a URL has no room for two of the longest
        ("body_bytes", "two prompts", 2 * prompt),
    )
    for name, what, needed in needs:
        if (given := getattr(args.limits, name)) <= needed:
            text = f"must be above {needed}, what {what} of prompt_characters can take, got {given}."
            yield document.error((*key, "args", "limits", name), text)
    if isinstance(args.images_at_once, int) and args.images_at_once > max(args.batch_buckets):
        text = f"is {args.images_at_once}, and the largest of batch_buckets, {max(args.batch_buckets)}, is the most."
        yield document.advice((*key, "args", "images_at_once"), text)


def check_model(document: Document, model: Deployment, args: Args) -> Iterator[Finding]:
    most = max(args.batch_buckets)
    slots = SLOTS_PER_IMAGE * most * len(args.sizes)
    held, ongoing = slots + args.max_waiting, model.option("max_ongoing_requests")
    if ongoing <= held:
        text = (
            f"must be above {held}, the {slots} slots of a replica and its max_waiting, so that the engine's queue "
            f"answers before Serve's does and health questions get through, got {ongoing}."
        )
        yield document.error((*model.key, "max_ongoing_requests"), text)
    if model.option("max_queued_requests") < 0:
        text = "is without limit, so while no replica is ready requests pile up until they time out."
        yield document.advice((*model.key, "max_queued_requests"), text)
    yield from check_target(document, model, most, held)
    yield from check_chips(document, model, args)


def check_target(document: Document, model: Deployment, most: int, held: int) -> Iterator[Finding]:
    scaling = model.autoscaling
    if not scaling or scaling.policy.policy_function != DEFAULT_AUTOSCALING_POLICY_NAME:
        return
    key, target = (*model.key, "autoscaling_config", "target_ongoing_requests"), scaling.target_ongoing_requests or 0
    if target >= held:
        text = f"must be below {held}, what a replica holds at most, or no load adds a replica, got {target:g}."
        yield document.error(key, text)
    elif target < most:
        text = f"is {target:g}: replicas are added before one fills its largest bucket, {most}."
        yield document.advice(key, text)


def check_chips(document: Document, model: Deployment, args: Args) -> Iterator[Finding]:
    """A guided image is two rows of a step, and rows are divided among the chips by halves."""
    chips, most = model.chips, max(args.batch_buckets)
    if chips > 2 * most:
        text = f"is {chips}, and the largest of batch_buckets, {most}, is {2 * most} rows: the other chips idle."
        yield document.advice((*model.key, "ray_actor_options", "resources", "TPU"), text)
    for bucket in args.batch_buckets:
        used = min(chips, 2 * bucket & -(2 * bucket))  # the largest power of two that divides the rows
        if used < min(chips, 2 * bucket):
            text = f"hold {bucket}, whose {2 * bucket} rows are divided among {used} of {chips} chips: the others idle."
            yield document.advice((*model.key[:2], "args", "batch_buckets"), text)


def check_drain(document: Document, deployment: Deployment, args: Args) -> Iterator[Finding]:
    timeout_s, drain_s = args.limits.timeout_s, deployment.option("graceful_shutdown_timeout_s")
    if drain_s <= timeout_s:
        text = f"must be above limits.timeout_s, {timeout_s:g}, or accepted requests are cut off, got {drain_s:g}."
        yield document.error((*deployment.key, "graceful_shutdown_timeout_s"), text)


def check_timeouts(document: Document, model: Deployment, args: Args) -> Iterator[Finding]:
    """A request's own deadline comes before whatever would cut it off."""
    timeout_s = args.limits.timeout_s
    request_s = document.at(("http_options", "request_timeout_s"))
    if request_s is not None and request_s <= timeout_s:
        text = (
            f"must be above limits.timeout_s, {timeout_s:g}, or Serve's 408 comes before our answer, got {request_s:g}."
        )
        yield document.error(("http_options", "request_timeout_s"), text)


def check_health(document: Document, deployment: Deployment, args: Args) -> Iterator[Finding]:
    """Serve replaces a replica after three health checks in a row to which no answer came."""
    period_s, timeout_s = (deployment.option(f"health_check_{name}_s") for name in ("period", "timeout"))
    noticed_s = FAILURES * (period_s + timeout_s)
    if noticed_s >= args.limits.timeout_s:
        longer = "health_check_timeout_s" if timeout_s >= period_s else "health_check_period_s"
        text = (
            f"is {max(period_s, timeout_s):g}: a replica that hangs is replaced after {FAILURES} failed checks, "
            f"{noticed_s:g} s, and by then all that wait for it have reached limits.timeout_s, "
            f"{args.limits.timeout_s:g}."
        )
        yield document.advice((*deployment.key, longer), text)


def check_order_of_limits(document: Document, ingress: Deployment, model: Deployment) -> Iterator[Finding]:
    if model.option("max_queued_requests") < 0:
        return
    held = model.most_replicas * model.option("max_ongoing_requests") + model.option("max_queued_requests")
    given = ingress.most_replicas * ingress.option("max_ongoing_requests")
    if given <= held:
        text = (
            f"is {given} over all replicas, and {model.name} holds {held}: under full load Serve refuses in its own "
            "words instead of the API's."
        )
        yield document.advice((*ingress.key, "max_ongoing_requests"), text)
