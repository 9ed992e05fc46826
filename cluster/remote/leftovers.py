"""What is left of a cluster on Google Cloud after `ray down`, which calls a machine gone once it is stopping.

A TPU node that was preempted stays listed until somebody deletes it, and Ray never does.
"""

import time
from pathlib import Path

from app.ray_internals.google import Machines, retry_reads_and_deletes, sentence
from cluster.cli import UserError
from cluster.remote.preflight import content
from cluster.terminal import say

TIMEOUT_S = 300.0
POLL_S = 5.0


def clear(path: Path) -> None:
    """Deletes what is left and waits until Google lists nothing. Raises UserError that names what stays."""
    cluster = content(path)
    if cluster["provider"]["type"] != "gcp":
        return
    try:
        retry_reads_and_deletes()
        wait_for_none(Machines(cluster))
    except UserError:
        raise
    except Exception as error:
        if reason := sentence(error):
            raise UserError(f"Whether Google Cloud still has machines of {path} is not known. {reason}") from None
        raise


def wait_for_none(machines: Machines) -> None:
    deleted: set[str] = set()
    until = time.monotonic() + TIMEOUT_S
    while remaining := list(machines):
        for machine in remaining:
            if not machine.leaving and machine.name not in deleted:
                say(f"Deleting {machine}, which Ray leaves behind")
                deleted.add(machine.name)
                machines.delete(machine)
        if time.monotonic() > until:
            names = ", ".join(map(str, remaining))
            raise UserError(
                f"Google Cloud still lists {names} after {TIMEOUT_S / 60:.0f} minutes, and may charge for it. "
                "Look at it in Google's console, then run the same command again."
            )
        time.sleep(POLL_S)
