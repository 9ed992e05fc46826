"""A rehearsal with hosts in which Google is busy, refuses and loses: each fault in turn, and what comes after it."""

import math

from rehearsal.books import Fault, stock_out
from rehearsal.catalogue import QUOTAS
from rehearsal.full import AUTOSCALER_LOG, CREATE, SOLD_OUT, expect
from rehearsal.stage import Stage

INSERT_S = 20.0
EXHAUSTED = "Quota limit .* has been exceeded"


def act(scene: Stage, file: str, config: str) -> None:
    quota(scene, file)
    sold_out(scene, file)
    scene.make("deploy", file, config)
    scene.picture(file, "a+red+house")
    lost(scene, file, config)
    endless(scene)


def quota(scene: Stage, file: str) -> None:
    """A head that is slow to start, answers of 429 and 503 to questions, and a quota that admits no TPU."""
    scene.say("Google answers questions with 429 and 503, takes its time for the head, and has no quota for TPUs")
    scene.books.project.quotas["v5litepod"] = 0
    busy = [Fault("*.list", 2, answer=429), Fault("*.get", 2, answer=503)]
    scene.books.faults[:0] = [*busy, Fault("compute.instances.insert", 1, takes_s=INSERT_S)]
    scene.make("up", file)
    expect(not any(fault.times for fault in busy), "`make up` did not meet 429 and 503")
    scene.await_call(CREATE, 429, "The autoscaler has met the quota")
    scene.make("attach", file, f"CMD=grep -o -m 1 '{EXHAUSTED}' {AUTOSCALER_LOG}")


def sold_out(scene: Stage, file: str) -> None:
    scene.say("The quota is granted, and the zone is sold out for one request")
    scene.books.faults.insert(0, stock_out(CREATE, 1))
    scene.books.project.quotas = dict(QUOTAS)
    scene.await_nodes(bool, "The autoscaler has set up a TPU node")
    scene.make("attach", file, f"CMD=grep -o -m 1 '{SOLD_OUT}' {AUTOSCALER_LOG}")


def lost(scene: Stage, file: str, config: str) -> None:
    """A TPU node that goes without a notice."""
    (node,) = scene.nodes()
    scene.say("A TPU node goes without a notice")
    scene.books.preempt(node)
    scene.await_nodes(lambda nodes: nodes - {node}, "Another TPU node has taken its place")
    scene.make("deploy", file, config)
    scene.picture(file, "a+blue+boat")


def endless(scene: Stage) -> None:
    """A TPU node that is being created when `make down` comes, and would be for ever."""
    scene.books.faults.insert(0, Fault(CREATE, 1, takes_s=math.inf))
    (node,) = scene.nodes()
    calls = len(scene.books.calls)
    scene.say("A TPU node goes without a notice, and the creation of the next never ends")
    scene.books.preempt(node)
    scene.await_call(CREATE, 200, "The autoscaler waits for the next TPU node", calls)
