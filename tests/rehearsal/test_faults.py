"""What our verbs and Ray make of Google's refusals and of the wrong moment: retries, one sentence, nothing left."""

import math
from pathlib import Path

import pytest

pytest.importorskip("googleapiclient", reason="needs Google's client: make gcp")

from cluster import ROOT
from cluster.cli import UserError
from cluster.remote import leftovers
from cluster.remote.tunnel import NoHead, route
from rehearsal.books import OWNER, Fault, binding, stock_out
from rehearsal.calls import Rehearsal

# Ray opens files and leaves their closing to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
INSERT, CREATE = "compute.instances.insert", "tpu.projects.locations.nodes.create"


@pytest.fixture
def file(cloud: Rehearsal) -> Path:
    return cloud.desk.cluster_file(ROOT / "cluster.yaml")


def refusal(cloud: Rehearsal, file: Path) -> str:
    """The sentence with which `up` ends."""
    with pytest.raises(UserError) as error:
        cloud.up(file)
    assert error.value.exit_status == 1 and "\n" not in str(error.value)
    return str(error.value)


def test_a_stock_out_of_the_head_is_one_sentence_and_leaves_nothing(cloud: Rehearsal, file: Path) -> None:
    cloud.books.faults.append(stock_out(INSERT, times=1))
    assert refusal(cloud, file).startswith(
        "Google Cloud could not do it: ZONE_RESOURCE_POOL_EXHAUSTED The zone does not have enough resources"
    )
    assert list(cloud.books.open_entries()) == []
    assert cloud.up(file) == 0  # the same command again


@pytest.mark.parametrize(
    ("service", "title"),
    [
        ("cloudresourcemanager", "Cloud Resource Manager API"),
        ("iam", "Identity and Access Management (IAM) API"),
        ("compute", "Compute Engine API"),
        ("tpu", "Cloud TPU API"),
    ],
)
def test_an_api_that_is_not_enabled_is_named_with_the_page_that_enables_it(
    cloud: Rehearsal, file: Path, service: str, title: str
) -> None:
    cloud.books.project.services.remove(service)
    sentence = refusal(cloud, file)
    assert sentence.startswith(f"Google Cloud answers 403: {title} has not been used in project")
    assert f"/apis/api/{service}.googleapis.com/overview?project=" in sentence
    assert list(cloud.books.open_entries()) == []


def test_an_editor_who_may_not_grant_roles_is_refused_in_a_sentence(cloud: Rehearsal, file: Path) -> None:
    cloud.books.project.policy["bindings"] = [binding("roles/editor", OWNER)]
    assert refusal(cloud, file).startswith(
        "Google Cloud answers 403: Required 'resourcemanager.projects.setIamPolicy' permission for 'projects/"
    )


def test_a_quota_that_is_too_small_for_the_head_is_named(cloud: Rehearsal, file: Path) -> None:
    cloud.books.project.quotas["N2_CPUS"] = 2
    assert refusal(cloud, file) == (
        "Google Cloud answers 403: Quota 'N2_CPUS' exceeded. Limit: 2.0 in region us-central1."
    )


def test_a_login_that_expired_names_the_command(cloud: Rehearsal, file: Path) -> None:
    credentials = cloud.desk.folder.parent / "application_default_credentials.json"
    credentials.write_text(credentials.read_text().replace("1//rehearsal", "1//expired"))
    sentence = refusal(cloud, file)
    assert sentence.startswith("Google's credentials do not work (")
    assert sentence.endswith("gcloud auth application-default login")


@pytest.mark.parametrize("status", [429, 503])
def test_reads_and_deletes_are_repeated_when_google_is_too_busy(cloud: Rehearsal, file: Path, status: int) -> None:
    cloud.books.faults += [Fault(f"*.{verb}", 2, answer=status) for verb in ("get", "list", "delete")]
    assert cloud.up(file) == 0
    assert cloud.down(file) == 0
    assert list(cloud.books.open_entries()) == []
    assert sum(code == status for _, code in cloud.books.calls) == 6


def test_a_start_that_google_is_too_busy_for_is_not_repeated_behind_the_users_back(
    cloud: Rehearsal, file: Path
) -> None:
    cloud.books.faults.append(Fault(INSERT, 1, answer=503))
    assert refusal(cloud, file).endswith("Run the same command again later.")
    assert cloud.books.instances == {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Ray's own way to give up
def test_a_head_whose_start_never_ends_is_given_up_and_removed_by_down(
    cloud: Rehearsal, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cloud.books.faults.append(Fault(INSERT, 1, takes_s=math.inf))
    (cloud.desk.folder / "bin/ssh").write_text("#!/bin/sh\nexit 255\n")  # nobody answers there
    assert cloud.up(file) == 1
    assert "Failed to setup head node." in capfd.readouterr().err
    assert cloud.down(file) == 0
    leftovers.clear(file)
    assert list(cloud.books.open_entries()) == []


def test_a_stock_out_of_tpus_is_what_the_autoscaler_logs_and_later_it_succeeds(cloud: Rehearsal, file: Path) -> None:
    cloud.up(file)
    head = cloud.head()
    cloud.books.faults.append(stock_out(CREATE, times=1))
    (logged,) = head.add("ray_tpu")
    assert "There is no more capacity in the zone" in logged and cloud.books.nodes == {}
    cloud.books.project.quotas["v5litepod"] = 2
    (logged,) = head.add("ray_tpu")
    assert "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 2" in logged
    cloud.books.project.quotas["v5litepod"] = 4
    cloud.books.faults.append(Fault(CREATE, 1, takes_s=400.0))  # Ray waits for 480 s
    assert head.add("ray_tpu") == [] and len(cloud.books.nodes) == 1


def test_a_preempted_node_is_gone_for_the_autoscaler_and_down_deletes_it(
    cloud: Rehearsal, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cloud.up(file)
    head = cloud.head()
    head.add("ray_tpu")
    (node,) = cloud.books.nodes
    cloud.books.preempt(node)
    assert node not in head.nodes()
    assert cloud.down(file) == 0
    assert list(cloud.books.nodes) == [node]  # Ray leaves it
    leftovers.clear(file)
    short = node.rpartition("/")[2]
    assert f"Deleting {short} (PREEMPTED), which Ray leaves behind" in capfd.readouterr().out
    assert list(cloud.books.open_entries()) == []


def test_a_tpu_whose_creation_never_ends_is_removed_by_down(cloud: Rehearsal, file: Path) -> None:
    cloud.up(file)
    cloud.books.faults.append(Fault(CREATE, 1, takes_s=math.inf))
    cloud.head().add("ray_tpu")  # Ray waits for eight minutes
    assert [node["state"] for node in cloud.books.nodes.values()] == ["CREATING"]
    assert cloud.down(file) == 0
    leftovers.clear(file)
    assert list(cloud.books.open_entries()) == []


def test_down_names_a_machine_whose_end_never_comes(cloud: Rehearsal, file: Path) -> None:
    cloud.up(file)
    (name,) = cloud.books.instances
    cloud.books.faults.append(Fault("compute.instances.delete", takes_s=math.inf))
    assert cloud.down(file) == 0  # for Ray, a machine is gone once it is stopping
    with pytest.raises(UserError, match=rf"^Google Cloud still lists {name} \(STOPPING\) after 5 minutes, and may ch"):
        leftovers.clear(file)


def test_the_way_to_the_head_is_looked_up_again_when_google_is_too_busy(cloud: Rehearsal, file: Path) -> None:
    cloud.up(file)
    cloud.books.faults.append(Fault("*.list", 2, answer=503))
    assert route(file)[-1].startswith("ubuntu@")


def test_asking_for_a_cluster_that_is_not_up_changes_nothing_in_the_project(cloud: Rehearsal, file: Path) -> None:
    with pytest.raises(NoHead):
        route(file)
    assert {method for method, _ in cloud.books.calls} == {"compute.instances.list"}
    assert cloud.books.project.accounts == {}
