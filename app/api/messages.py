"""The messages between ingress and replica. They are pickled, so each is plain data.

During a rollout the two sides may run different versions of the code: a field that is added needs a default.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.api.settings import Encoding
from app.types import Capabilities, Generation, Resumed


@dataclass(frozen=True)
class Description:
    """What a replica serves. It differs from the config while a deployment rolls out, and after a failed one."""

    samplers: tuple[str, ...]
    default_sampler: str
    model: str = ""  # empty: an older replica did not send it, and the config's applies
    sizes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # sentences on what the checkpoint says and this server does otherwise
    # The checkpoint's own defaults of a request; an older replica did not send them.
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    fields: tuple[str, ...] = ()  # of a request, that only some models have
    capabilities: Capabilities = Capabilities()


@dataclass(frozen=True)
class SizeCosts:
    """Seconds of the programs of one size, as a replica has measured them."""

    step_s: Mapping[int, float]  # by rows
    launch_s: Mapping[int, float]  # what a dispatch of so many rows adds to its steps
    decode_s: Mapping[int, float]  # by images
    encode_image_s: float = 0.0  # of an image that a request comes with
    reference_step_s: Mapping[int, float] = field(default_factory=dict)  # by rows, of images that look at others


@dataclass(frozen=True)
class Report:
    """What a replica tells of its load: with each answer, and when the ingress polls."""

    replica: str  # its id in Serve
    sizes: Mapping[str, SizeCosts]
    unfinished: int  # requests
    backlog_s: float  # device-seconds that they still need
    healthy: bool = True
    start_s: float = 0.0  # from the start of its process until it was warm
    description: Description | None = None  # only where the ingress polls


@dataclass(frozen=True)
class QueueState:
    """What the ingress tells replicas of its queue when it polls, for the autoscaling policy."""

    ingress: str  # an id of its own
    waiting: int = 0  # requests
    waiting_s: float = 0.0  # their device-seconds
    arriving: float = 0.0  # device-seconds of the requests that arrive in a second


@dataclass(frozen=True)
class ImageRequest:
    """A request from the ingress to a replica."""

    generation: Generation
    encoding: Encoding
    timeout_s: float
    stream: bool = False
    partial_images: int = 0  # previews to stream
    ahead_s: float = 0.0  # device-seconds by which it goes ahead of one that comes now: it has waited in the ingress
    progress: bool = False  # whether to stream Progress
    siblings: int = 0  # images of the same request that are made apart from it
    counted: bool = True  # False: another part of the same request counts in the statistics
    # Of what the ingress does with the answer; no replica reads these.
    response_format: str | None = None  # b64_json or url; None: the client has not said
    asynchronous: bool = False  # a job answers it
    webhook_url: str | None = None  # of the job
    seeded: bool = field(default=False, compare=False)  # whether the client has chosen the seed
    place: str = field(default="", compare=False)  # the ingress's name for it, by which a replica lets it go
    # Only of a request that another replica had before.
    age_s: float = 0.0  # since the ingress got it
    moved: bool = False  # its place is beyond the usual limits
    resumed: Resumed | None = None  # with what was made of it; None: it begins
    facts: Mapping[str, str] = field(default_factory=dict)  # what was done to the images in it, for the answer


@dataclass(frozen=True)
class Accepted:
    """First item of a replica's stream: the engine has queued the request and will not refuse it any more."""


@dataclass(frozen=True)
class Progress:
    """How far a request is. The seconds are an estimate, as if no other request came."""

    status: str  # waiting, running or decoding
    ahead: int  # requests that get a slot before it
    steps: int  # of its images, taken
    total_steps: int
    left_s: float  # until its images are decoded


@dataclass(frozen=True)
class Preview:
    """A look at an unfinished image."""

    index: int
    encoded: bytes


@dataclass(frozen=True)
class Moved:
    """In place of an answer: another replica has to go on with the request."""

    resumed: Resumed | None = None  # what was made of it so far; None: nothing
    lost: bool = False  # it had begun, and must begin again
    accepted: bool = True  # False: this replica takes no requests any more


@dataclass(frozen=True)
class Images:
    """A replica's answer. The facts are what a client needs to make the same image again."""

    encoded: tuple[bytes, ...]
    seeds: tuple[int, ...]
    facts: Mapping[str, str | int | float | bool]
    timings: Mapping[str, float]  # seconds
    model: str = ""  # empty: an older replica did not send it
    report: Report | None = None


def fact_text(fact: str | int | float | bool) -> str:
    """A fact as text for HTTP headers and PNG metadata: JSON, but strings without quotes."""
    return fact if isinstance(fact, str) else json.dumps(fact)
