"""Compute Engine v1: the methods that Ray's launcher and autoscaler call (cloud.google.com/compute/docs/reference)."""

import re

from rehearsal.books import Books, Machine, Operation, lookup
from rehearsal.call import Call, Handler, Json, check_labels, may
from rehearsal.catalogue import ACCELERATORS, IMAGES, MACHINES
from rehearsal.label_filter import parse
from rehearsal.permissions import ACT_AS
from rehearsal.refusal import Refusal

ROOT = "https://www.googleapis.com/compute/v1"


def get_project(books: Books, call: Call) -> Json:
    project = books.project
    quotas = [{"metric": "IN_USE_ADDRESSES", "limit": project.quotas["IN_USE_ADDRESSES"], "usage": 0}]
    return {
        "kind": "compute#project",
        "name": project.id,
        "id": str(project.number),
        "commonInstanceMetadata": project.metadata,
        "defaultServiceAccount": project.compute_account,
        "quotas": quotas,
        "selfLink": f"{ROOT}/projects/{project.id}",
    }


def set_metadata(books: Books, call: Call) -> Json:
    if call.body.get("fingerprint") != books.project.metadata["fingerprint"]:
        raise Refusal(412, "Supplied fingerprint does not match current metadata fingerprint.", "conditionNotMet")

    def finish() -> Json:
        books.project.metadata = {**call.body, "fingerprint": f"AAAA{books.number():04d}"}
        return books.project.metadata

    return operation(books.begin(call.method, f"projects/{books.project.id}", finish))


def get_operation(books: Books, call: Call) -> Json:
    if call["operation"] not in books.operations:
        raise Refusal(404, f"The resource '{call['operation']}' was not found", "notFound")
    return operation(books.operations[call["operation"]])


def list_instances(books: Books, call: Call) -> Json:
    check_zone(call["zone"])
    fits = parse(call.parameters["filter"]) if "filter" in call.parameters else lambda _: True
    zone = f"{ROOT}/projects/{books.project.id}/zones/{call['zone']}"
    items = [instance for instance in books.instances.values() if instance["zone"] == zone and fits(instance)]
    id = f"projects/{books.project.id}/zones/{call['zone']}/instances"
    return {"kind": "compute#instanceList", "id": id, **({"items": items} if items else {})}


def get_instance(books: Books, call: Call) -> Json:
    return lookup(books.instances, call["instance"], f"{path(call)}/instances/{call['instance']}")


def insert_instance(books: Books, call: Call) -> Json:
    zone, body = call["zone"], call.body
    name = body["name"]
    check_zone(zone)
    check_machine(zone, body)
    check_disks(body)
    check_network(body)
    check_labels(body.get("labels", {}))
    check_accounts(books, call)
    if name in books.instances:
        raise Refusal(409, f"The resource '{path(call)}/instances/{name}' already exists", "alreadyExists")
    check_quota(books, zone, body)

    internal = books.address("10.128.0", name)
    interface = {**body["networkInterfaces"][0], "networkIP": internal, "name": "nic0"}
    for access in interface.get("accessConfigs", ())[:1]:
        interface["accessConfigs"] = [{**access, "natIP": books.address("203.0.113", name)}]
    books.disks[name] = name
    account = next((account["email"] for account in body.get("serviceAccounts", ())), books.project.compute_account)
    outside = [access["natIP"] for access in interface.get("accessConfigs", ())[:1]]
    books.keeper.start(Machine(name, account, (internal, *outside)))
    books.instances[name] = {
        **body,
        "kind": "compute#instance",
        "id": str(10**18 + books.number()),
        "status": "PROVISIONING",
        "zone": f"{ROOT}/projects/{books.project.id}/zones/{zone}",
        "machineType": f"{ROOT}/projects/{books.project.id}/{body['machineType']}",
        "selfLink": f"{ROOT}/{path(call)}/instances/{name}",
        "labelFingerprint": "42WmSpB8rSM=",
        "networkInterfaces": [interface],
    }

    def finish() -> Json:
        books.instances[name]["status"] = "RUNNING"
        return books.instances[name]

    return operation(books.begin(call.method, f"{path(call)}/instances/{name}", finish, lambda: gone(books, name)))


def gone(books: Books, name: str) -> None:
    """Removes an instance with its addresses. A boot disk without autoDelete stays."""
    instance = books.instances.pop(name)
    books.keeper.stop(name)
    if any(disk.get("boot") and not disk.get("autoDelete") for disk in instance["disks"]):
        books.disks[f"{name} (without autoDelete)"] = "nothing"
    books.release(name)


def set_labels(books: Books, call: Call) -> Json:
    instance = get_instance(books, call)
    if call.body.get("labelFingerprint") != instance["labelFingerprint"]:
        raise Refusal(412, "Labels fingerprint either invalid or resource labels have changed", "conditionNotMet")
    check_labels(call.body["labels"])

    def finish() -> Json:
        instance.update(labels=call.body["labels"], labelFingerprint=f"fp{books.number():09d}=")
        return instance

    return operation(books.begin(call.method, f"{path(call)}/instances/{call['instance']}", finish))


def delete_instance(books: Books, call: Call) -> Json:
    instance, name = get_instance(books, call), call["instance"]
    instance["status"] = "STOPPING"

    def finish() -> Json:
        gone(books, name)
        return instance

    return operation(books.begin(call.method, f"{path(call)}/instances/{name}", finish))


def path(call: Call) -> str:
    return f"projects/{call['project']}/zones/{call['zone']}"


def operation(operation: Operation) -> Json:
    error = {"error": operation.error} if operation.done and operation.error else {}
    answer = {
        "kind": "compute#operation",
        "id": str(operation.name.removeprefix("operation-").lstrip("0")),
        "name": operation.name,
        "operationType": operation.method.rpartition(".")[2],
        "targetLink": f"{ROOT}/{operation.target}",
        "status": "DONE" if operation.done else "RUNNING",
        "progress": 100 if operation.done else 0,
        **error,
    }
    return answer | ({"httpErrorStatusCode": 503, "httpErrorMessage": "SERVICE UNAVAILABLE"} if error else {})


def check_zone(zone: str) -> None:
    if zone not in ACCELERATORS:
        raise Refusal(400, f"Invalid value for field 'zone': '{zone}'. Unknown zone.", "invalid")


def check_machine(zone: str, body: Json) -> None:
    kind = body.get("machineType", "")
    match = re.fullmatch(rf"(?:.*/)?zones/{zone}/machineTypes/(\S+)", kind)
    if not match or match[1] not in MACHINES:
        text = f"'{kind}'. Machine type does not exist in zone '{zone}'."
        raise Refusal(400, f"Invalid value for field 'resource.machineType': {text}", "invalid")


def check_disks(body: Json) -> None:
    disks = body.get("disks", [])
    if [bool(disk.get("boot")) for disk in disks[:1]] != [True] or any(disk.get("boot") for disk in disks[1:]):
        raise Refusal(400, "Invalid value for field 'resource.disks': exactly the first disk must be a boot disk.")
    image = disks[0].get("initializeParams", {}).get("sourceImage", "")
    match = re.fullmatch(r"(?:.*/)?projects/([^/]+)/global/images/(?:family/)?([^/]+)", image)
    if not match or f"{match[1]}/{match[2]}" not in IMAGES:
        field = "resource.disks[0].initializeParams.sourceImage"
        text = f"Invalid value for field '{field}': The referenced image resource '{image}' cannot be found."
        raise Refusal(400, text, "invalid")


def check_network(body: Json) -> None:
    interfaces = body.get("networkInterfaces")
    if not interfaces:
        raise Refusal(400, "Invalid value for field 'resource.networkInterfaces': '[]'. At least one is needed.")
    for i, interface in enumerate(interfaces):
        name = str(interface.get("network", "default")).rpartition("/")[2]
        if name != "default":
            text = f"The referenced network resource '{name}' cannot be found."
            raise Refusal(400, f"Invalid value for field 'resource.networkInterfaces[{i}].network': {text}", "invalid")


def check_accounts(books: Books, call: Call) -> None:
    for account in call.body.get("serviceAccounts", ()):
        if account["email"] not in {*books.project.accounts, books.project.compute_account}:
            raise Refusal(400, f"The resource 'serviceAccounts/{account['email']}' was not found.", "invalid")
        may(books, call, ACT_AS, f"serviceAccounts/{account['email']}")


def check_quota(books: Books, zone: str, body: Json) -> None:
    region, kind = zone.rpartition("-")[0], body["machineType"].rpartition("/")[2]
    metric = f"{kind.partition('-')[0].upper()}_CPUS"
    running = [instance["machineType"].rpartition("/")[2] for instance in books.instances.values()]
    cpus = sum(MACHINES[name] for name in [kind, *running] if name.startswith(kind.partition("-")[0]))
    addresses = 1 + sum(address.startswith("203.0.113.") for address in books.addresses)
    for name, wanted in ((metric, cpus), ("IN_USE_ADDRESSES", addresses)):
        if wanted > (limit := books.project.quotas[name]):
            raise Refusal(403, f"Quota '{name}' exceeded.  Limit: {limit}.0 in region {region}.", "quotaExceeded")


METHODS: dict[str, Handler] = {
    "compute.projects.get": get_project,
    "compute.projects.setCommonInstanceMetadata": set_metadata,
    "compute.globalOperations.get": get_operation,
    "compute.zoneOperations.get": get_operation,
    "compute.instances.list": list_instances,
    "compute.instances.get": get_instance,
    "compute.instances.insert": insert_instance,
    "compute.instances.setLabels": set_labels,
    "compute.instances.delete": delete_instance,
}
