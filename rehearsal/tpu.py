"""Cloud TPU v2alpha1: the methods that Ray's launcher and autoscaler call (cloud.google.com/tpu/docs/reference)."""

from rehearsal.books import Books, Machine, Operation, host, lookup
from rehearsal.call import NAME, Call, Handler, Json, check_labels, may
from rehearsal.catalogue import ACCELERATORS, RUNTIMES, chips, hosts, offered
from rehearsal.permissions import ACT_AS
from rehearsal.refusal import Refusal

# How the service names its limits on chips, as its errors quote them.
QUOTA_NAMES = {"v5litepod": "TPUV5sLitepod", "v4": "TPUV4s", "v6e": "TPUV6e"}
IN_THE_WAY = "unable to queue the operation"  # Ray looks for these words


def list_nodes(books: Books, call: Call) -> Json:
    location(call["parent"])
    nodes = [node for name, node in books.nodes.items() if name.startswith(call["parent"] + "/")]
    return {"nodes": nodes} if nodes else {}


def get_node(books: Books, call: Call) -> Json:
    return lookup(books.nodes, call["name"], call["name"])


def create_node(books: Books, call: Call) -> Json:
    zone, short = location(call["parent"]), call.parameters.get("nodeId", "")
    name = f"{call['parent']}/nodes/{short}"
    if not NAME.fullmatch(short):
        bad(f"Invalid TPU name: {short!r}")
    check_hardware(zone, call.body)
    check_scheduling(call.body)
    check_network(call.body)
    check_labels(call.body.get("labels", {}))
    account = call.body.get("serviceAccount", {}).get("email", books.project.compute_account)
    if account not in {*books.project.accounts, books.project.compute_account}:
        bad(f"Service account {account} does not exist.")
    may(books, call, ACT_AS, f"serviceAccounts/{account}")
    if name in books.nodes:
        raise Refusal(409, f"Resource '{name}' already exists")
    check_quota(books, zone, call.body["acceleratorType"])
    books.nodes[name] = {
        **call.body,
        "name": name,
        "id": str(10**18 + books.number()),
        "state": "CREATING",
        "health": "HEALTHY",
        "serviceAccount": {"email": account, "scope": ["https://www.googleapis.com/auth/cloud-platform"]},
        "apiVersion": "V2_ALPHA1",
    }

    def finish() -> Json:
        books.nodes[name] |= {"state": "READY", "networkEndpoints": endpoints(books, name)}
        return books.nodes[name]

    return operation(call, books.begin(call.method, name, finish, lambda: gone(books, name)))


def endpoints(books: Books, name: str) -> list[Json]:
    """An address inside for each host, and one outside if the node asks for it."""
    node, addresses = books.nodes[name], []
    for worker in range(hosts(node["acceleratorType"])):
        endpoint: Json = {"ipAddress": books.address("10.128.0", name), "port": 8470}
        if node.get("networkConfig", {}).get("enableExternalIps"):
            endpoint["accessConfig"] = {"externalIp": books.address("203.0.113", name)}
        addresses.append(endpoint)
        outside = [endpoint["accessConfig"]["externalIp"]] if "accessConfig" in endpoint else []
        books.keeper.start(
            Machine(
                host(name, worker),
                node["serviceAccount"]["email"],
                (endpoint["ipAddress"], *outside),
                node["acceleratorType"],
                worker,
                chips(node["acceleratorType"]) // hosts(node["acceleratorType"]),
            )
        )
    return addresses


def patch_node(books: Books, call: Call) -> Json:
    node, fields = get_node(books, call), call.parameters.get("updateMask", "").split(",")
    if not {*fields} <= {"labels", "description", "tags", "metadata"}:
        bad(f"Invalid update mask: {','.join(fields)}")
    check_idle(books, call["name"])
    check_labels(call.body.get("labels", {}))

    def finish() -> Json:
        node.update({field: call.body[field] for field in fields})
        return node

    return operation(call, books.begin(call.method, call["name"], finish))


def delete_node(books: Books, call: Call) -> Json:
    node = get_node(books, call)
    node["state"] = "DELETING"

    def finish() -> Json:
        gone(books, call["name"])
        return {"@type": "type.googleapis.com/google.protobuf.Empty"}

    return operation(call, books.begin(call.method, call["name"], finish))


def gone(books: Books, name: str) -> None:
    node = books.nodes.pop(name)
    for worker in range(hosts(node["acceleratorType"])):
        books.keeper.stop(host(name, worker))
    books.release(name)


def get_operation(books: Books, call: Call) -> Json:
    name = call["name"].rpartition("/")[2]
    if name not in books.operations:
        raise Refusal(404, f"Resource '{call['name']}' was not found")
    return operation(call, books.operations[name])


def operation(call: Call, operation: Operation) -> Json:
    parent = "/".join(operation.target.split("/")[:4])
    answer: Json = {
        "name": f"{parent}/operations/{operation.name}",
        "metadata": {
            "@type": "type.googleapis.com/google.cloud.tpu.v2alpha1.OperationMetadata",
            "target": operation.target,
            "verb": operation.method.rpartition(".")[2],
            "apiVersion": "v2alpha1",
        },
        "done": operation.done,
    }
    if operation.done and operation.error:
        return answer | {"error": operation.error}
    return answer | ({"response": operation.result} if operation.done else {})


def location(path: str) -> str:
    zone = path.split("/")[3]
    if zone not in ACCELERATORS:
        raise Refusal(403, f"Location {zone} is not found or access is unauthorized.")
    return zone


def check_hardware(zone: str, body: Json) -> None:
    accelerator, runtime = body.get("acceleratorType", ""), body.get("runtimeVersion", "")
    if not offered(zone, accelerator):
        bad(f"the accelerator {accelerator} was not found in zone {zone}")
    if runtime not in RUNTIMES:
        bad(f"Invalid RuntimeVersion {runtime!r}")


def check_scheduling(body: Json) -> None:
    chosen = [name for name in ("preemptible", "spot", "reserved") if body.get("schedulingConfig", {}).get(name)]
    if len(chosen) > 1:
        bad(f"only one of {', '.join(chosen)} can be set")


def check_network(body: Json) -> None:
    config = body.get("networkConfig", {})
    for field in ("network", "subnetwork"):
        if config.get(field, "default").rpartition("/")[2] != "default":
            bad(f"{field} {config[field]} does not exist")
    for tag in body.get("tags", ()):
        if not NAME.fullmatch(tag):
            bad(f"Invalid network tag {tag!r}")


def check_idle(books: Books, name: str) -> None:
    if any(op.target == name and not op.done for op in books.operations.values()):
        raise Refusal(409, f"There is an operation on {name}: {IN_THE_WAY}", "aborted")


def check_quota(books: Books, zone: str, accelerator: str) -> None:
    generation = accelerator.partition("-")[0]
    running = [node["acceleratorType"] for name, node in books.nodes.items() if f"/locations/{zone}/" in name]
    wanted = sum(chips(kind) for kind in [accelerator, *running] if kind.partition("-")[0] == generation)
    if wanted > (limit := books.project.quotas[generation]):
        name = f"{QUOTA_NAMES[generation]}PerProjectPerZoneForTPUAPI"
        raise Refusal(429, f"Quota limit '{name}' has been exceeded. Limit: {limit} in zone {zone}.")


def bad(sentence: str) -> None:
    raise Refusal(400, f"Cloud TPU received a bad request. {sentence}")


METHODS: dict[str, Handler] = {
    "tpu.projects.locations.nodes.list": list_nodes,
    "tpu.projects.locations.nodes.get": get_node,
    "tpu.projects.locations.nodes.create": create_node,
    "tpu.projects.locations.nodes.patch": patch_node,
    "tpu.projects.locations.nodes.delete": delete_node,
    "tpu.projects.locations.operations.get": get_operation,
}
