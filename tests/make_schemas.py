"""Makes tests/cluster/schemas/ from what KubeRay and Kubernetes publish:

    python tests/make_schemas.py ray.io_rayservices.yaml kubernetes-json-schema/v1.34.0-local-strict

The first is the CustomResourceDefinition in KubeRay's repository, ray-operator/config/crd/bases. The second is a folder
of the package kubernetes-validate 1.37.0, whose files are made from Kubernetes' OpenAPI document. Both projects are
under the Apache License 2.0. Descriptions, defaults and status are left out, and equal parts stand once. A field that a
schema does not list is refused, as `kubectl apply` does.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "cluster" / "schemas"
KUBERAY = "v1.7.0"
LEAST_SHARED = 60  # characters of a part that is worth a name
Json = dict[str, Any]


def reduced(part: Any) -> Any:
    """A schema without words, whose mappings admit only the fields that it lists."""
    if isinstance(part, list):
        return [reduced(item) for item in part]
    if not isinstance(part, dict):
        return part
    schema: Json = {}
    for name, value in part.items():
        if name == "properties":
            schema[name] = {field: reduced(of_field) for field, of_field in value.items()}
        elif name not in ("description", "default") and not name.startswith(("x-", "$schema", "$id")):
            schema[name] = value if name in ("enum", "required") else reduced(value)
    open_ended = part.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and "additionalProperties" not in schema and not open_ended:
        schema["additionalProperties"] = False
    return schema


def shared(schema: Json) -> Json:
    """A schema whose equal parts stand once, under $defs."""
    counts = Counter(text(part) for part in parts(schema))
    names: dict[str, str] = {}
    definitions: Json = {}

    def refer(part: Any) -> Any:
        if isinstance(part, list):
            return [refer(item) for item in part]
        if not isinstance(part, dict):
            return part
        key = text(part)
        if counts[key] < 2 or len(key) < LEAST_SHARED or not isinstance(part.get("type"), str):
            return {name: refer(value) for name, value in part.items()}
        if key not in names:
            names[key] = f"part{len(names)}"
            definitions[names[key]] = {name: refer(value) for name, value in part.items()}
        return {"$ref": f"#/$defs/{names[key]}"}

    return {**refer(schema), "$defs": definitions}


def parts(schema: Any) -> Iterator[Json]:
    if isinstance(schema, dict):
        yield schema
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from parts(part)


def text(part: Any) -> str:
    return json.dumps(part, sort_keys=True)


def inlined(part: Any, definitions: Json) -> Any:
    """A schema with its references to another file filled in."""
    if isinstance(part, list):
        return [inlined(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return inlined(definitions[part["$ref"].rpartition("/")[2]], definitions)
    return {name: inlined(value, definitions) for name, value in part.items()}


def write(name: str, source: str, file: Path, schema: Json) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    comment = f"Reduced by tests/make_schemas.py from {source}, Apache License 2.0, sha256 {digest}"
    (FOLDER / name).write_text(json.dumps({"$comment": comment, **shared(reduced(schema))}, separators=(",", ":")))


def main(crd: Path, kubernetes: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
    service = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    del service["properties"]["status"]
    write("rayservice.json", f"ray-project/kuberay {KUBERAY} {crd.name}", crd, service)
    policy_file = kubernetes / "networkpolicy-networking-v1.json"
    definitions = json.loads((kubernetes / "_definitions.json").read_text())["$defs"]
    policy = inlined(json.loads(policy_file.read_text()), definitions)
    policy["properties"].pop("status", None)
    write("networkpolicy.json", f"kubernetes-validate 1.37.0 {kubernetes.name}/{policy_file.name}", policy_file, policy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
