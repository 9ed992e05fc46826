"""The Makefile's verbs as a user would run them, on a real local Ray, with an application that needs no model.

Its cluster is its own, so that these tests run beside the others: the last ones kill and end it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import ROOT, auth_token, ownership, processes
from cluster.local.state import Cluster
from tests import other_user
from tests.clusters import Verbs, fetch, one_node_cluster, refuses, soon, succeeds
from tests.on_cluster.test_api import PROMPT, imagine, refusal, the_replica

pytestmark = pytest.mark.cluster

GREETER = """
proxy_location: HeadOnly
http_options: {host: 127.0.0.1, port: PORT}
applications:
  - name: greeting
    route_prefix: /
    import_path: tests.serve_apps:greeter
    args: {text: hello}
    deployments:
      - name: Greeter
        ray_actor_options: {num_cpus: 0.1, resources: {TPU: 4}}
"""
HANGING = """
proxy_location: HeadOnly
http_options: {host: 127.0.0.1, port: PORT}
applications:
  - name: hanging
    route_prefix: /
    import_path: tests.failing_apps:hanging
    args: {model: assets/demo-model, sizes: [32x32], stall_s: 1}
    deployments:
      - name: Hanging
        num_replicas: 1
        health_check_period_s: 1
        ray_actor_options: {num_cpus: 0.1, resources: {TPU: 4}}
"""


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verbs]:
    yield from one_node_cluster(ROOT / ".run" / "test-verbs", tmp_path_factory.mktemp("cluster-of-verbs"))


@pytest.fixture
def greeter(verbs: Verbs, tmp_path: Path) -> Path:
    path = tmp_path / "greeter.yaml"
    path.write_text(GREETER.replace("PORT", str(verbs.serve_port)))
    return path


def listening(cluster: Cluster) -> set[tuple[str, int]]:
    return listening_of(cluster.search())


def listening_of(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    addresses = set()
    for process in processes:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                addresses.add((connection.laddr.ip, connection.laddr.port))
    return addresses


# The verbs, with an application that needs no model.


def test_up_again_starts_nothing_and_says_so(verbs: Verbs) -> None:
    before = verbs.cluster
    assert succeeds(verbs.up()) == f"The local cluster is already up: {before.address}\n"
    assert verbs.cluster == before
    elsewhere = verbs("local", "up", "--dashboard-port", str(verbs.dashboard_port + 1))
    assert refuses(elsewhere).startswith(f"A local cluster is already up at {before.address}.")


def test_deploy_waits_until_it_serves_and_all_is_on_loopback(verbs: Verbs, greeter: Path) -> None:
    output = succeeds(verbs.deploy(greeter))
    assert f": http://127.0.0.1:{verbs.serve_port}" in output.splitlines()[-1] and "greeting is ready" in output
    status, body, _ = fetch(f"http://127.0.0.1:{verbs.serve_port}/")
    assert (status, json.loads(body)) == (200, {"text": "hello", "chips": "0,1,2,3"})
    listeners = listening(verbs.cluster)
    assert {("127.0.0.1", verbs.dashboard_port), ("127.0.0.1", verbs.serve_port)} <= listeners
    assert {host for host, _ in listeners} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_status_and_logs_tell_of_it(verbs: Verbs, greeter: Path) -> None:
    succeeds(verbs.deploy(greeter))
    assert "greeting already runs this config." in succeeds(verbs.deploy(greeter))
    status = succeeds(verbs("deploy", "status"))
    assert re.search(r"greeting  RUNNING, answers after \d.\d\d s\n  Greeter  HEALTHY  1 of 1 ready\n", status)
    assert "\nProxy  HEALTHY on " in status
    assert "Greeter " in succeeds(verbs("logs", "--lines", "5"))


def deployed(verbs: Verbs) -> list[str]:
    """What status says of Serve, without times."""
    return re.sub(r"after [\d.]+ s", "", verbs("deploy", "status").stdout).splitlines()[2:]


def test_serve_deploy_by_hand_gives_the_same(verbs: Verbs, greeter: Path, tmp_path: Path) -> None:
    succeeds(verbs.deploy(greeter))
    before = deployed(verbs)
    serve = [str(Path(sys.executable).parent / "serve"), "deploy", str(greeter), "--address", verbs.cluster.address]
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    token = auth_token.environment(verbs.cluster.token_file)
    subprocess.run(serve, cwd=tmp_path, env=bare | token, capture_output=True, check=True, timeout=120)
    assert deployed(verbs) == before, "the same config is nothing new to Serve"


def test_what_address_says_is_all_that_plain_commands_need(verbs: Verbs, greeter: Path, tmp_path: Path) -> None:
    succeeds(verbs.deploy(greeter))
    program = f"""
        eval "$({sys.executable} -m cluster.local address --run-dir {verbs.run_dir})" && cd {tmp_path} || exit 1
        serve deploy {greeter} 2>&1; ray status | head -1
        ray job submit -- python -c 'import ray; ray.init(); print("nodes", len(ray.nodes()))' 2>&1
        curl -s -o /dev/null -w '%{{http_code}}\n' -H "Authorization: Bearer $(cat $RAY_AUTH_TOKEN_PATH)" \
            "$RAY_DASHBOARD_ADDRESS/api/version"; curl -s "$IMAGINE_URL"
        """
    strays = os.environ | {"RAY_AUTH_TOKEN": "somebody-elses", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, env=strays, capture_output=True, text=True, timeout=120)
    assert "Sent deploy request successfully" in done.stdout and "Autoscaler status" in done.stdout, done
    assert "nodes 2" in done.stdout and "succeeded" in done.stdout, done
    assert '200\n{"text":"hello"' in done.stdout, done


@other_user.as_root
def test_another_user_can_read_and_do_nothing(verbs: Verbs, greeter: Path) -> None:
    succeeds(verbs.deploy(greeter))
    cluster = verbs.cluster
    kept = (cluster.token_file, verbs.run_dir / "cluster.json", cluster.temp_dir / "autoscaling.yaml")
    assert set(other_user.read(*kept).values()) == {"PermissionError"}
    jobs, google = (cluster.dashboard_port, "POST", "/api/jobs/"), cluster.ports["metadata"]
    agent = (cluster.ports["runtime-env-agent-port"], "POST", "/get_or_create_runtime_env")
    assert {*other_user.ask((*jobs, {}), (*agent, {}), (google, "GET", "/", {})).values()} == {401}
    assert {*other_user.ask((google, "PUT", "/ray_tpu-1/preempted", {})).values()} == {401}
    guess = {"Authorization": f"Bearer {'0' * 64}"}
    assert {*other_user.ask((*jobs, guess), (*agent, guess), (google, "GET", "/", guess)).values()} == {403}


@other_user.as_root
def test_no_port_does_what_another_user_asks_for(verbs: Verbs, greeter: Path) -> None:
    """Each replica's gRPC port unpickled what it was sent. None is opened, and Ray's others ask for the token."""
    succeeds(verbs.deploy(greeter))
    replicas = [process for process in verbs.cluster.search() if "ServeReplica" in "".join(process.cmdline())]
    actors = [process for process in verbs.cluster.search() if "ServeController" in "".join(process.cmdline())]
    opened = [len(listening_of([process])) for process in replicas + actors]
    assert len(replicas) == 1 and opened == [1, 1], "Ray's own, which each of its actors has"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        answers = other_user.attack({port for _, port in listening(verbs.cluster)}, Path(folder) / "unpickled")
        assert not (Path(folder) / "unpickled").exists()
    assert {*answers.values()} == {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}, answers
    for call in other_user.CALLS:
        assert any(code == "UNAUTHENTICATED" for name, code in answers.items() if name.endswith(call)), call
    assert fetch(f"http://127.0.0.1:{verbs.serve_port}/")[0] == 200


def test_a_client_without_the_token_is_told_so(verbs: Verbs, tmp_path: Path) -> None:
    """Ray itself waits 20 s, and names no cause."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    bare |= {"RAY_ADDRESS": verbs.cluster.gcs_address}
    for token, reason in (
        ({}, "asks for a token, and RAY_AUTH_MODE is not token."),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, "has another token than the one in RAY_AUTH_TOKEN."),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "asks for a token, and /nowhere cannot be"),
    ):
        program = "from cluster import ray_client; from cluster.cli import run_command; run_command(ray_client.connect)"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=bare | token, capture_output=True, text=True
        )
        assert f"The cluster at {verbs.cluster.gcs_address} {reason}" in refuses(done)


def test_a_token_that_is_gone_or_another_is_told_by_every_verb(verbs: Verbs) -> None:
    file = verbs.cluster.token_file
    token = file.read_text()
    requests = (
        ("deploy", "status"),
        ("job", "list"),
        ("local", "monitor", "--once"),
        ("local", "address"),
        ("sample_images",),
    )
    try:
        file.write_text("0" * 64)
        for words in requests:
            assert f"403: it was started with another token than the one that is in {file} here." in refuses(
                verbs(*words)
            )
        loadtest = [sys.executable, "-m", "loadtest", "run", "smoke", "--run-dir", str(verbs.run_dir)]
        done = subprocess.run(loadtest, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert "answers 403" in refuses(done)
        file.unlink()
        for words in (*requests, ("logs",), ("local", "preempt")):
            assert refuses(verbs(*words)).startswith(f"{file} is missing")
    finally:
        ownership.write(file, token)


def test_a_failed_deploy_says_why_and_puts_back_what_ran_and_works_once_the_cause_is_gone(
    verbs: Verbs, greeter: Path
) -> None:
    succeeds(verbs.deploy(greeter))
    folder = greeter.parent / "model"
    greeter.write_text(greeter.read_text().replace("text: hello", f"model: {folder}, text: new"))
    failure = refuses(verbs.deploy(greeter))
    assert failure.startswith(
        f"greeting/Greeter did not start: model must be a folder in diffusers layout, got {folder}.\n"
        f"It has no model_index.json.\n{greeter} is not deployed. greeting serves as before, since "
    )
    succeeds(verbs("deploy", "status"))
    assert json.loads(fetch(f"http://127.0.0.1:{verbs.serve_port}/")[1])["text"] == "hello"
    folder.mkdir()
    succeeds(verbs.deploy(greeter))
    assert json.loads(fetch(f"http://127.0.0.1:{verbs.serve_port}/")[1])["text"] == "new"


def test_a_first_deploy_that_fails_says_why_and_so_does_status(verbs: Verbs, greeter: Path) -> None:
    succeeds(verbs("deploy", "undeploy"))
    folder = greeter.parent / "model"
    greeter.write_text(greeter.read_text().replace("text: hello", f"model: {folder}"))
    reason = f"model must be a folder in diffusers layout, got {folder}."
    assert refuses(verbs.deploy(greeter)) == f"greeting/Greeter did not start: {reason}\nIt has no model_index.json."
    status = verbs("deploy", "status")
    assert refuses(status).startswith("greeting is DEPLOY_FAILED.\n") and reason in status.stdout
    folder.mkdir()
    succeeds(verbs.deploy(greeter))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("serve_apps:greeter", "serve_apps:nobody", "module 'tests.serve_apps' has no attribute 'nobody'"),
        ("serve_apps:greeter", "nowhere:greeter", "No module named 'tests.nowhere'"),
        ("text: hello", "text: [1]", "Input should be a valid string"),
        ("applications:", "applications: [", "is not valid YAML"),
        ("import_path:", "path:", "applications.0.import_path: Field required"),
        ("127.0.0.1", "127.0.0.2", "http_options.host is 127.0.0.1 while Serve runs"),
    ],
)
def test_a_mistake_in_the_config_is_told_without_a_traceback(
    verbs: Verbs, greeter: Path, old: str, new: str, reason: str
) -> None:
    greeter.write_text(greeter.read_text().replace(old, new, 1))
    assert reason in refuses(verbs.deploy(greeter))


def test_undeploy_leaves_the_cluster_and_frees_the_port(verbs: Verbs, greeter: Path) -> None:
    succeeds(verbs.deploy(greeter))
    assert succeeds(verbs("deploy", "undeploy")).endswith("Removed greeting; the cluster is still up.\n")
    assert processes.free(verbs.serve_port)
    assert succeeds(verbs("deploy", "undeploy")) == "Nothing is deployed, so nothing to remove.\n"
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Serve's last connections are in TIME_WAIT
        listener.bind(("127.0.0.1", verbs.serve_port))
        listener.listen()
        assert f"is taken by process {os.getpid()}" in refuses(verbs.deploy(greeter))


def test_a_replica_whose_device_hangs_is_replaced_and_its_request_begins_again_once(
    verbs: Verbs, tmp_path: Path
) -> None:
    config = tmp_path / "hanging.yaml"
    config.write_text(HANGING.replace("PORT", str(verbs.serve_port)))
    succeeds(verbs.deploy(config))
    api = f"http://127.0.0.1:{verbs.serve_port}"
    assert imagine(api, prompt=PROMPT)[0] == 200
    before = the_replica(api)
    status, error = refusal(imagine(api, prompt="a device that hangs"))
    assert (status, error["code"]) == (503, "replica_lost")
    assert error["message"] == "The replica was lost; try again.", "it hung the next one too"
    assert soon(lambda: imagine(api, prompt=PROMPT)[0] == 200)
    assert the_replica(api)["pid"] != before["pid"]


# The end, and what comes after a crash. These go last: they end the cluster.


@pytest.mark.parametrize("victim", ["raylet", "gcs_server", "monitor"])
def test_after_a_kill_up_clears_away_what_is_left_and_starts_anew(verbs: Verbs, victim: str) -> None:
    before = verbs.cluster
    for recorded in before.processes:
        if recorded.name == victim and (process := processes.find(recorded)):
            process.send_signal(signal.SIGKILL)
            process.wait(10)
    assert f"The cluster died ({victim} gone)" in refuses(verbs("deploy", "status"))
    output = succeeds(verbs.up())
    assert output.startswith("Removed the leftovers of a cluster that died: ") and "The local cluster is up" in output
    assert not before.search() and not before.temp_dir.exists()


def test_down_leaves_no_process_no_port_and_no_folder(verbs: Verbs, greeter: Path) -> None:
    succeeds(verbs.deploy(greeter))
    cluster = verbs.cluster
    taken = {port for _, port in listening(cluster)}
    stranger = subprocess.Popen(["tail", "-f", str(cluster.temp_dir / "start.log")], stdout=subprocess.DEVNULL)
    try:
        assert succeeds(verbs.down()).startswith("The local cluster is down: ")
        assert not cluster.token_file.exists()
        assert not cluster.search() and not cluster.temp_dir.exists()
        assert len(taken) > 10 and all(processes.free(port) for port in taken)
        assert stranger.poll() is None, "who looks at our files is not ours"
    finally:
        stranger.kill()
        stranger.wait()
    assert succeeds(verbs.down()) == "Nothing is up in this checkout, so nothing to end.\n"
    assert "No cluster is up" in refuses(verbs("deploy", "status"))
