"""rehearsal/cloud.py refuses what Google would refuse, with Google's status and words."""

import json
from typing import Any

import pytest

pytest.importorskip("googleapiclient", reason="needs Google's client: make gcp")

from rehearsal.accounts import token_for
from rehearsal.books import OWNER, Books, Project, binding
from rehearsal.cloud import METHODS, Cloud, Request
from rehearsal.discovery import Service
from rehearsal.permissions import NEEDS

ZONE = "/compute/v1/projects/my-project/zones/us-central1-a"
PARENT = "/v2alpha1/projects/my-project/locations/us-central1-a"
HEAD: dict[str, Any] = {
    "name": "ray-imagine-head-01234567-compute",
    "machineType": "zones/us-central1-a/machineTypes/n2-standard-4",
    "disks": [
        {
            "boot": True,
            "autoDelete": True,
            "initializeParams": {
                "diskSizeGb": 50,
                "sourceImage": "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64",
            },
        }
    ],
    "networkInterfaces": [{"network": "global/networks/default", "accessConfigs": [{"type": "ONE_TO_ONE_NAT"}]}],
    "labels": {"ray-cluster-name": "imagine"},
}
NODE: dict[str, Any] = {
    "acceleratorType": "v5litepod-4",
    "runtimeVersion": "v2-alpha-tpuv5-lite",
    "networkConfig": {"network": "default", "enableExternalIps": True},
    "labels": {"ray-cluster-name": "imagine"},
}


class Client:
    """Calls a simulated Google Cloud as the owner of its project."""

    def __init__(self) -> None:
        self.books = Books(Project("my-project"), lambda: 0.0)
        self.cloud = Cloud(self.books)
        self.token = token_for(self.books, OWNER)["access_token"]

    def __call__(self, verb: str, path: str, body: Any = None) -> tuple[int, str]:
        """The status, and the message of an error or the JSON of an answer."""
        host = "tpu.googleapis.com" if path.startswith("/v2alpha1") else "compute.googleapis.com"
        if path.startswith("/v1/projects"):
            host = "cloudresourcemanager.googleapis.com"
        status, answer = self.cloud.answer(Request(host, verb, path, self.token, body))
        return status, answer["error"]["message"] if status != 200 else json.dumps(answer)

    def insert(self, **changes: Any) -> tuple[int, str]:
        return self("POST", f"{ZONE}/instances", HEAD | changes)

    def create(self, name: str = "a-tpu", **changes: Any) -> tuple[int, str]:
        return self("POST", f"{PARENT}/nodes?nodeId={name}", NODE | changes)


@pytest.fixture
def google() -> Client:
    return Client()


def test_a_machine_and_a_tpu_start_are_listed_and_leave_nothing(google: Client) -> None:
    assert google.insert()[0] == 200 and google.create()[0] == 200
    opened = list(google.books.open_entries())
    assert sum(entry.startswith("address") for entry in opened) == 4
    assert google("DELETE", f"{ZONE}/instances/{HEAD['name']}")[0] == 200
    assert google("DELETE", f"{PARENT}/nodes/a-tpu")[0] == 200
    assert list(google.books.open_entries()) == []


def test_a_boot_disk_without_auto_delete_stays(google: Client) -> None:
    google.insert(disks=[HEAD["disks"][0] | {"autoDelete": False}])
    google("DELETE", f"{ZONE}/instances/{HEAD['name']}")
    assert list(google.books.open_entries()) == [f"disk {HEAD['name']} (without autoDelete) of nothing"]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"machinetype": "x"}, 400, "Unknown name \"machinetype\" at 'resource': Cannot find field."),
        ({"name": "Imagine_TPU"}, 400, "Invalid value for field 'resource.name': 'Imagine_TPU'. Must be a match"),
        ({"labels": {"team": 3}}, 400, "Invalid value at 'resource.labels.team' (string), 3"),
        ({"labels": {"Team": "a"}}, 400, "Label keys and values can only contain lowercase letters"),
        ({"tags": ["imagine"]}, 400, "Invalid value at 'resource.tags' (type object)"),
        ({"tags": {"items": ["My Tag"]}}, 400, "'resource.tags.items[0]': 'My Tag'. Must be a match"),
        ({"machineType": "zones/us-east1-b/machineTypes/n2-standard-4"}, 400, "Machine type does not exist in zone"),
        ({"machineType": "zones/us-central1-a/machineTypes/n2-standard-5"}, 400, "Machine type does not exist"),
        ({"disks": []}, 400, "exactly the first disk must be a boot disk"),
        ({"networkInterfaces": [{"network": "global/networks/mine"}]}, 400, "network resource 'mine' cannot be found"),
        ({"serviceAccounts": [{"email": "nobody@x.com", "scopes": []}]}, 400, "nobody@x.com' was not found"),
    ],
)
def test_a_machine_that_google_would_refuse_is_refused(
    google: Client, changes: dict[str, Any], status: int, words: str
) -> None:
    code, message = google.insert(**changes)
    assert code == status and words in message
    assert google.books.instances == {} and google.books.addresses == {}


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"name_": "x"}, 400, "Unknown name \"name_\" at 'resource'"),
        ({"acceleratorType": "v5e-4"}, 400, "the accelerator v5e-4 was not found in zone us-central1-a"),
        ({"acceleratorType": "v6e-4"}, 400, "the accelerator v6e-4 was not found in zone us-central1-a"),
        ({"runtimeVersion": "v2-alpha-tpuv7"}, 400, "Invalid RuntimeVersion 'v2-alpha-tpuv7'"),
        ({"schedulingConfig": {"spot": "yes"}}, 400, "Invalid value at 'resource.schedulingConfig.spot'"),
        ({"schedulingConfig": {"spot": True, "preemptible": True}}, 400, "only one of preemptible, spot can be set"),
        ({"networkConfig": {"subnetwork": "mine"}}, 400, "subnetwork mine does not exist"),
        ({"acceleratorType": "v5litepod-32"}, 429, "has been exceeded. Limit: 16 in zone us-central1-a."),
    ],
)
def test_a_tpu_that_google_would_refuse_is_refused(
    google: Client, changes: dict[str, Any], status: int, words: str
) -> None:
    code, message = google.create(**changes)
    assert code == status and words in message and google.books.nodes == {}


def test_each_name_is_given_once(google: Client) -> None:
    assert google.insert()[0] == google.create()[0] == 200
    assert (google.insert()[0], google.create()[0], google.create("A")[0]) == (409, 409, 400)


def test_without_a_permission_the_answer_names_it(google: Client) -> None:
    google.books.project.policy["bindings"] = [binding("roles/viewer", OWNER)]
    status, message = google.insert()
    assert status == 403 and message == "Required 'compute.instances.create' permission for 'projects/my-project'"
    google.token = "stolen"
    assert google.insert()[0] == 401


def test_another_project_or_zone_is_refused(google: Client) -> None:
    assert google("GET", "/v1/projects/other-project")[0] == 403
    assert google("GET", f"{ZONE.replace('central1', 'central9')}/instances") == (
        400,
        "Invalid value for field 'zone': 'us-central9-a'. Unknown zone.",
    )
    assert google("GET", f"{PARENT.replace('central1', 'central9')}/nodes")[0] == 403


def test_lists_are_filtered_as_ray_asks(google: Client) -> None:
    google.insert()
    for text, count in {
        "(labels.ray-cluster-name = imagine) AND (NOT labels.tpu_cores:*)": 1,
        "((status = RUNNING) OR (status = STAGING)) AND (labels.ray-cluster-name = imagine)": 1,
        "(labels.ray-cluster-name = other)": 0,
        "(NOT labels.ray-cluster-name:*)": 0,
    }.items():
        answer = google("GET", f"{ZONE}/instances?filter={text.replace(' ', '%20')}")[1]
        assert answer.count('"compute#instance"') == count
    for text in ("(status = RUNNING", "status == RUNNING)", "AND"):
        assert google("GET", f"{ZONE}/instances?filter={text.replace(' ', '%20')}")[0] == 400
    assert google("GET", f"{ZONE}/instances?filtre=x")[1].endswith(
        'Unknown name "filtre": Cannot bind query parameter.'
    )


def test_a_change_that_read_an_old_state_is_refused(google: Client) -> None:
    google.insert()
    path = f"{ZONE}/instances/{HEAD['name']}/setLabels"
    assert google("POST", path, {"labels": {}, "labelFingerprint": "b2xk"})[0] == 412
    metadata = "/compute/v1/projects/my-project/setCommonInstanceMetadata"
    assert google("POST", metadata, {"items": [], "fingerprint": "b2xk"})[0] == 412


def test_the_tpu_bodies_also_fit_the_newer_version_of_the_api() -> None:
    """Ray asks for the documentation without a version, so Google may answer with v2."""
    Service("tpu", "v2").check("Node", NODE | {"schedulingConfig": {"spot": True}, "tags": ["imagine"]}, "node")


def test_each_simulated_method_needs_a_permission() -> None:
    assert set(NEEDS) == set(METHODS)
