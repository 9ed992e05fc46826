"""Rules about how the numbers of a Serve config fit together: slots, queues, chips, timeouts, the autoscaling target.

They get configs whose every value is valid by itself. Knows nothing of clusters.
"""

from collections.abc import Iterator

from ray.serve.config import AutoscalingConfig

from app.api.auth import is_loopback
from app.api.ingress import APIIngress
from app.api.routing.page import MOST_HELD
from app.api.settings import LONGEST_QUERY
from app.builders import Args
from app.ray_internals.core import tpu
from app.ray_internals.serve import DEFAULT_AUTOSCALING_POLICY_NAME
from app.serving.draining import LAST_S
from app.serving.replica import StableDiffusion
from cluster.config.documents import Finding
from cluster.config.serve_config import Application, Deployment, ServeConfig

ESCAPED_BYTES = 12  # at most, of one character in a query or in JSON: two surrogates as \uXXXX
NOTICE_S = 25.0  # of a preemption: 30 s, less what it takes until Serve knows
FAILURES = 3  # failed health checks in a row, after which Serve replaces a replica


# Rules for a whole config


def check_access(config: ServeConfig) -> Iterator[Finding]:
    """Without API keys, only this machine may reach the API."""
    document, host = config.document, config.http.host
    has_keys = all(getattr(app.args, "api_keys_file", None) is not None for app in config.applications)
    loopback = host == "localhost" or is_loopback((host,))
    if not loopback and not has_keys:
        text = f"must be loopback, 127.0.0.1, unless every application has args.api_keys_file, got {host}."
        yield document.error(("http_options", "host"), text)
    if loopback and document.value.get("proxy_location", "EveryNode") == "EveryNode":
        text = f"is EveryNode, and http_options.host {host}: only a node itself could reach its proxy."
        yield document.advice(("proxy_location",), text)


# Rules for each deployment


def check_chip_count(deployment: Deployment) -> Iterator[Finding]:
    chips = deployment.actor.resources.get("TPU", 0)
    if chips and chips != deployment.chips:
        options = ", ".join(map(str, tpu.TPU_VALID_CHIP_OPTIONS))
        yield deployment.error(("ray_actor_options", "resources", "TPU"), f"must be one of {options}, got {chips}.")


def check_shutdown(deployment: Deployment) -> Iterator[Finding]:
    loop_s, timeout_s = (deployment.option(f"graceful_shutdown_{name}_s") for name in ("wait_loop", "timeout"))
    if loop_s >= timeout_s:
        text = f"must be below graceful_shutdown_timeout_s, {timeout_s:g}, or nothing drains, got {loop_s:g}."
        yield deployment.error(("graceful_shutdown_wait_loop_s",), text)


def check_window(deployment: Deployment) -> Iterator[Finding]:
    """Ray only logs a warning of it, and announces that it will refuse it."""
    scaling: AutoscalingConfig | None = deployment.autoscaling
    if scaling and scaling.look_back_period_s <= scaling.metrics_interval_s:
        text = f"must be above metrics_interval_s, {scaling.metrics_interval_s:g}, got {scaling.look_back_period_s:g}."
        yield deployment.error(("autoscaling_config", "look_back_period_s"), text)


# Rules for each application of app.builders:text_to_image


def check_request_limits(app: Application, args: Args) -> Iterator[Finding]:
    prompt = ESCAPED_BYTES * args.limits.prompt_characters
    needs = (
        ("query_bytes", "one prompt", min(prompt, LONGEST_QUERY - 1)),  # a URL has no room for two of the longest
        ("body_bytes", "two prompts", 2 * prompt),
    )
    for name, what, needed in needs:
        if (limit := getattr(args.limits, name)) <= needed:
            text = f"must be above {needed}, what {what} of prompt_characters can take, got {limit}."
            yield app.error(("args", "limits", name), text)


def check_images_at_once(app: Application, args: Args) -> Iterator[Finding]:
    largest = max(args.batch_buckets)
    if isinstance(args.images_at_once, int) and args.images_at_once > largest:
        text = f"is {args.images_at_once}, and the largest of batch_buckets, {largest}, is the most."
        yield app.advice(("args", "images_at_once"), text)


def check_queues(app: Application, args: Args) -> Iterator[Finding]:
    """A replica takes all that the ingress sends it, and the API refuses in its own words before Serve does."""
    if not (model := app.deployment(StableDiffusion)):
        return
    held, ongoing = held_by_replica(args), model.option("max_ongoing_requests")
    if ongoing <= held:
        text = (
            f"must be above {held}, the most that the ingress sends a replica whose largest bucket is "
            f"{max(args.batch_buckets)}, so that Serve never refuses them and health checks get through, got {ongoing}."
        )
        yield model.error(("max_ongoing_requests",), text)
    if model.option("max_queued_requests") < 0:
        text = "is unlimited: while no replica is ready, requests pile up until they time out."
        yield model.advice(("max_queued_requests",), text)
    elif ingress := app.deployment(APIIngress):
        most = model.max_replicas * (held + args.max_waiting)
        passed = ingress.max_replicas * ingress.option("max_ongoing_requests")
        if passed <= most:
            text = (
                f"is {passed} over all replicas, and {most} may wait and run: under full load Serve refuses in its "
                "own words instead of the API's."
            )
            yield ingress.advice(("max_ongoing_requests",), text)


def check_target(app: Application, args: Args) -> Iterator[Finding]:
    """Ray's own policy adds replicas when they are full, and not before or never."""
    model = app.deployment(StableDiffusion)
    if not model or not (scaling := model.autoscaling):
        return
    if scaling.policy.policy_function != DEFAULT_AUTOSCALING_POLICY_NAME:
        return
    key, target = ("autoscaling_config", "target_ongoing_requests"), scaling.target_ongoing_requests or 0
    held, largest = held_by_replica(args), max(args.batch_buckets)
    if target >= held:
        text = f"must be below {held}, what a replica holds at most, or no load adds a replica, got {target:g}."
        yield model.error(key, text)
    elif target < largest:
        text = f"is {target:g}: replicas are added before one replica fills its largest bucket, {largest}."
        yield model.advice(key, text)


def check_chips_are_used(app: Application, args: Args) -> Iterator[Finding]:
    """A guided image is two rows of a step, and the rows are divided among 1, 2, 4 or 8 chips or GPUs."""
    if not (model := app.deployment(StableDiffusion)):
        return
    chips, largest = model.devices, max(args.batch_buckets)
    if chips & (chips - 1):
        text = f"is {chips}, of which {1 << chips.bit_length() - 1} compute, a power of two: the others idle."
        yield model.advice(model.devices_key, text)
    if chips > 2 * largest:
        text = f"is {chips}, and the largest of batch_buckets, {largest}, is {2 * largest} rows: the other chips idle."
        yield model.advice(model.devices_key, text)
    for bucket in args.batch_buckets:
        used = min(chips, 2 * bucket & -(2 * bucket))  # the largest power of two that divides the rows
        if used < min(chips, 2 * bucket):
            text = f"hold {bucket}, whose {2 * bucket} rows are divided among {used} of {chips} chips: the others idle."
            yield app.advice(("args", "batch_buckets"), text)


def check_timeouts(app: Application, args: Args) -> Iterator[Finding]:
    """A request reaches its own deadline before Serve ends it."""
    timeout_s = args.limits.timeout_s
    request_s = app.document.at(("http_options", "request_timeout_s"))
    if app.deployment(StableDiffusion) and request_s is not None and request_s <= timeout_s:
        text = f"must be above limits.timeout_s, {timeout_s:g}, or Serve answers 408 before the API, got {request_s:g}."
        yield app.document.error(("http_options", "request_timeout_s"), text)


def check_drain(app: Application, args: Args) -> Iterator[Finding]:
    """Answers pass through the ingress to their end. Images leave the model's replicas, for other replicas."""
    key, timeout_s = ("graceful_shutdown_timeout_s",), args.limits.timeout_s
    if (ingress := app.deployment(APIIngress)) and (drain_s := ingress.option(*key)) <= timeout_s:
        text = f"must be above limits.timeout_s, {timeout_s:g}, or accepted requests are cut off, got {drain_s:g}."
        yield ingress.error(key, text)
    if not (model := app.deployment(StableDiffusion)):
        return
    if (drain_s := model.option(*key)) <= LAST_S:
        text = f"must be above {LAST_S:g}, the seconds in which images leave for other replicas, got {drain_s:g}."
        yield model.error(key, text)
    elif drain_s >= NOTICE_S:
        text = (
            f"is {drain_s:g}: Serve ends a preempted replica so long before its node goes, and starts another one "
            f"first only if that is below {NOTICE_S:g}."
        )
        yield model.advice(key, text)


def check_health(app: Application, args: Args) -> Iterator[Finding]:
    """A replica that hangs is replaced before all that wait for it have timed out."""
    for deployment in on_the_way(app):
        period_s, timeout_s = (deployment.option(f"health_check_{name}_s") for name in ("period", "timeout"))
        noticed_s = FAILURES * (period_s + timeout_s)
        if noticed_s >= args.limits.timeout_s:
            longer = "health_check_timeout_s" if timeout_s >= period_s else "health_check_period_s"
            text = (
                f"is {max(period_s, timeout_s):g}: a replica that hangs is replaced after {FAILURES} failed checks, "
                f"{noticed_s:g} s, and by then all that wait for it have reached limits.timeout_s, "
                f"{args.limits.timeout_s:g}."
            )
            yield deployment.advice((longer,), text)


def on_the_way(app: Application) -> Iterator[Deployment]:
    """The deployments that an answer passes through."""
    yield from filter(None, (app.deployment(APIIngress), app.deployment(StableDiffusion)))


def held_by_replica(args: Args) -> int:
    """The most requests that the ingress sends to a replica. A bucket has two rows for each image."""
    return MOST_HELD * 2 * max(args.batch_buckets)
