"""Rules of Google Cloud for names: of the cluster, the place, the project, node types, labels, tags and networks.

Ray checks none of these names. Google would refuse the machine, minutes later. Asks no network.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from app.ray_internals.autoscaler import GOOGLE_HEAD_NAME, GOOGLE_NAME_SUFFIX, GOOGLE_WORKER_NAME
from cluster.config.cluster_config import KEY
from cluster.config.documents import Document, Finding, Key

MAX_LENGTH = 63  # of a machine's name


@dataclass(frozen=True)
class Form:
    pattern: str
    description: str

    def __call__(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


# cloud.google.com/compute/docs/naming-resources, .../vpc/docs/add-remove-network-tags
NAME = Form(
    "[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
    "1 to 63 lower-case letters, digits and hyphens, beginning with a letter and not ending with a hyphen",
)
# cloud.google.com/resource-manager/docs/creating-managing-projects; an old one may belong to a domain: example.com:name
PROJECT = Form(
    r"([a-z0-9.-]+\.[a-z]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]",
    "the project's id, not its name: 6 to 30 lower-case letters, digits and hyphens, beginning with a letter and not "
    "ending with a hyphen",
)
# cloud.google.com/compute/docs/regions-zones
REGION = Form("[a-z]+-[a-z]+[0-9]+", "a region, such as us-central1")
ZONE = Form("[a-z]+-[a-z]+[0-9]+-[a-z][a-z0-9]*", "a zone, such as us-central1-a")
# cloud.google.com/compute/docs/labeling-resources: letters of all alphabets that are not upper-case
LABEL_KEY = "1 to 63 lower-case letters, digits, hyphens and underscores, beginning with a letter"
LABEL_VALUE = "at most 63 lower-case letters, digits, hyphens and underscores"
MAX_LABELS = MAX_TAGS = 64


def check_names(document: Document) -> Iterator[Finding]:
    yield from wrong_cluster_name(document)
    for field, form in (("region", REGION), ("availability_zone", ZONE), ("project_id", PROJECT)):
        value = document.at(("provider", field))
        if value is not None and not form(str(value)):
            yield wrong(document, ("provider", field), form.description, value)
    for name in document.at((KEY,)) or {}:
        key: Key = (KEY, name)
        if not is_label_value(str(name)):
            valid = f"a valid value of a label, because Ray labels its machines with it: {LABEL_VALUE}"
            yield wrong(document, key, valid, name)
        yield from wrong_labels(document, (*key, "node_config", "labels"))
        yield from wrong_tags(document, (*key, "node_config", "tags"))
        yield from wrong_networks(document, (*key, "node_config"))


def wrong_cluster_name(document: Document) -> Iterator[Finding]:
    name = str(document.at(("cluster_name",)))
    types = document.at((KEY,)) or {}
    machines = [GOOGLE_HEAD_NAME + GOOGLE_NAME_SUFFIX + "-compute"]
    for node_type in types:
        if node_type != document.at(("head_node_type",)):
            compute = document.has((KEY, node_type, "node_config", "machineType"))
            machines.append(GOOGLE_WORKER_NAME + GOOGLE_NAME_SUFFIX + ("-compute" if compute else "-tpu"))
    longest = MAX_LENGTH - max(len(machine.format("")) for machine in machines)
    if not NAME(name) or len(name) > longest:
        form = NAME.description.replace("1 to 63", f"1 to {longest}")
        machine = f"{GOOGLE_HEAD_NAME.format(name)}-..."
        yield wrong(document, ("cluster_name",), f"{form}, because machines are named after it ({machine})", name)


def wrong_labels(document: Document, key: Key) -> Iterator[Finding]:
    labels = document.at(key)
    if not isinstance(labels, dict):
        return
    if len(labels) > MAX_LABELS:
        yield document.error(key, f"must be at most {MAX_LABELS}, got {len(labels)}.")
    for name, value in labels.items():
        if not (str(name)[:1].isalpha() and is_label_value(str(name))):
            yield wrong(document, (*key, name), f"named with {LABEL_KEY}", name)
        if not isinstance(value, str) or not is_label_value(value):
            yield wrong(document, (*key, name), f"a text of {LABEL_VALUE}", value)


def is_label_value(text: str) -> bool:
    return len(text) <= MAX_LENGTH and all(c in "-_" or unicodedata.category(c) in ("Ll", "Lo", "Nd") for c in text)


def wrong_tags(document: Document, key: Key) -> Iterator[Finding]:
    """Tags for firewall rules: below `items` for Compute Engine, and a list for Cloud TPU."""
    if isinstance(document.at(key), dict):
        key = (*key, "items")
    tags = document.at(key)
    if not isinstance(tags, list):
        return
    if len(tags) > MAX_TAGS:
        yield document.error(key, f"must be at most {MAX_TAGS}, got {len(tags)}.")
    for i, tag in enumerate(tags):
        if not isinstance(tag, str) or not NAME(tag):
            yield wrong(document, (*key, i), NAME.description, tag)


def wrong_networks(document: Document, key: Key) -> Iterator[Finding]:
    interfaces = document.at((*key, "networkInterfaces"))
    places = [(*key, "networkInterfaces", i) for i in range(len(interfaces))] if isinstance(interfaces, list) else []
    for place in [*places, (*key, "networkConfig")]:
        for field in ("network", "subnetwork"):
            value = document.at((*place, field))
            if value is not None and not NAME(str(value).rpartition("/")[2]):
                form = f"a name, or a path that ends with one: {NAME.description}"
                yield wrong(document, (*place, field), form, value)


def wrong(document: Document, key: Key, form: str, value: object) -> Finding:
    return document.error(key, f"must be {form}, got {value}.")
