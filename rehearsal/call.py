"""One request to a simulated service, after it passed the discovery document."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rehearsal.books import Books
from rehearsal.permissions import demand
from rehearsal.refusal import Refusal

Json = dict[str, Any]
NAME = re.compile("[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_KEY, LABEL_VALUE = re.compile(r"[a-z][-_a-z0-9]{0,62}"), re.compile(r"[-_a-z0-9]{0,63}")
MAX_LABELS = 64


@dataclass(frozen=True)
class Call:
    method: str
    parameters: Mapping[str, str]  # of path and query
    body: Json
    member: str  # who calls, as the project's policy names it

    def __getitem__(self, parameter: str) -> str:
        return self.parameters[parameter]


Handler = Callable[[Books, Call], Json]


def may(books: Books, call: Call, permission: str, resource: str) -> None:
    demand(books.project.policy, call.member, permission, resource)


def check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise Refusal(400, f"Invalid value for field 'resource.labels': at most {MAX_LABELS} labels.", "invalid")
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            form = "Label keys and values can only contain lowercase letters, numbers, underscores and dashes"
            raise Refusal(400, f"Invalid value for field 'resource.labels': '{key}: {value}'. {form}.", "invalid")
