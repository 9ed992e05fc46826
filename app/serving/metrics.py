"""Every metric of a replica, declared once. Knows of engines only what their statistics look like.

Each node exports them at its /metrics as `ray_imagine_...`, tagged with application, deployment and replica.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from app.api.messages import ImageRequest

SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]  # bounds of buckets


class Metrics:
    """Construct it in the replica's constructor, where Serve's tags are known."""

    def __init__(self) -> None:
        self.waiting = Gauge("imagine_waiting_requests", "Requests none of whose images has begun.")
        self.unfinished = Gauge("imagine_unfinished_requests", "Requests that wait or run.")
        self.active = Gauge("imagine_active_slots", "Slots whose image is in the making.")
        self.slots = Gauge("imagine_slots", "Slots of all sizes.")
        self.backlog = Gauge("imagine_backlog_device_seconds", "Device time that all unfinished requests still need.")
        self.fill = Gauge("imagine_bucket_fill_ratio", "Rows that requests asked for over rows that steps computed.")
        of_step: Any = ("size", "rows")  # Ray's annotation allows one key only, its code any number
        self.step = Gauge("imagine_step_seconds", "One step of a bucket of rows, as measured.", of_step)
        self.at_once = Gauge("imagine_images_at_once", "Images of a size that denoise at once.", ("size",))

        # A gauge, so that a 0 is exported too.
        self.compiles = Gauge("imagine_compiles_after_ready", "Programs compiled while serving: each is a bug.")
        self.requests = Counter("imagine_requests", "Requests by how they ended.", ("outcome",))
        self.images = Counter("imagine_images", "Images answered.")
        self.busy = Counter("imagine_device_busy_seconds", "Time for which the device had work.")

        self.first_image = Histogram("imagine_time_to_first_image_seconds", "From a request to its image.", SECONDS)
        self.phase = Histogram("imagine_phase_seconds", "A request's time by phase.", SECONDS, ("phase",))
        self.device = Histogram("imagine_request_device_seconds", "Device time that a request's images cost.", SECONDS)
        self._busy_s = 0.0

    def ended(self, request: ImageRequest, outcome: str) -> None:
        if request.counted:
            self.requests.inc(tags={"outcome": outcome})

    def finished(self, request: ImageRequest, seconds: float, timings: Mapping[str, float]) -> None:
        """Counts an answered request, with its whole duration and that of each phase.

        The part that counts stands for a request in parts, whose images cost alike.
        """
        images = request.generation.n
        self.images.inc(images)
        if not request.counted:
            return
        self.first_image.observe(seconds)
        self.device.observe(timings["device_s"] * (1 + request.siblings / images))
        for phase in ("queue", "denoise", "decode", "encode"):
            self.phase.observe(timings[f"{phase}_s"], {"phase": phase})

    def report(self, stats: Mapping[str, Any]) -> None:
        """Sets the engine's state. Call it every few seconds."""
        self.waiting.set(stats["waiting"])
        self.unfinished.set(stats["unfinished"])
        self.active.set(stats["active_slots"])
        self.slots.set(stats["num_slots"])
        self.backlog.set(stats["backlog_s"])
        self.fill.set(stats["bucket_fill"])
        for size, size_stats in stats["sizes"].items():
            self.at_once.set(size_stats["images_at_once"], {"size": size})
            for rows, seconds in size_stats["step_s"].items():
                self.step.set(seconds, {"size": size, "rows": rows})
        self.compiles.set(stats["compiles_after_ready"])
        if (more := stats["device_busy_s"] - self._busy_s) > 0:  # Ray's counters refuse an increment of nothing
            self.busy.inc(more)
            self._busy_s += more
