"""cluster/deploy.py, cluster/dashboard.py and cluster/logs.py without a cluster: what they read, decide and print."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import deploy, logs, processes, serve_status, status
from cluster.cli import UserError
from cluster.dashboard import Dashboard, Details, Late, log_places, reason, serve_address
from cluster.nodes import Nodes
from cluster.terminal import Progress, format_duration

CONSTRUCTOR_FAILED = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:app:Model.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "server.py", line 24, in __init__
    raise ValueError(...)
ValueError: model must be a folder in diffusers layout, got nowhere.
  unet: missing config.json"""
IMPORT_FAILED = """Deploying app 'app' failed with exception:
Traceback (most recent call last):
  File "builders.py", line 1, in <module>
    import nowhere
ModuleNotFoundError: No module named 'nowhere'
"""
ARGS_REFUSED = """Traceback (most recent call last):
  File "pydantic/main.py", line 792, in model_validate
pydantic_core._pydantic_core.ValidationError: 1 validation error for Args
sizes
  Field required [type=missing]
    For further information visit https://errors.pydantic.dev/2.14/v/missing
"""
ACTOR_DIED = """Traceback (most recent call last):
  File "ray/dashboard/modules/serve/serve_head.py", line 190, in put_all_applications
    client = await serve_start_async()
             ^^^^^^^^^^^^^^^^^^^^^^^^^
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, ray::ProxyActor (pid=1)
    return import_module_and_attr(full_path, reload_module=reload_module)[1]
  File "ray/serve/_private/utils.py", line 578, in call_function_from_import_path
    raise ValueError(f"The import path {import_path} cannot be imported: {e}")
ValueError: The import path app.nowhere:guards cannot be imported: No module named 'app.nowhere'
"""
WAITING = "Deployment 'Model' has 1 replicas that have taken more than 30s to be scheduled."


# Ray 2.60 announces environment variables in its place, and then does not read them.
USES_METRICS_INTERVAL = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (CONSTRUCTOR_FAILED, "model must be a folder in diffusers layout, got nowhere.\n  unet: missing config.json"),
        (IMPORT_FAILED, "ModuleNotFoundError: No module named 'nowhere'"),
        (ARGS_REFUSED, "1 validation error for Args\nsizes\n  Field required [type=missing]"),
        (ACTOR_DIED, "The import path app.nowhere:guards cannot be imported: No module named 'app.nowhere'"),
        (WAITING, WAITING),
        ("Retrying 2 more time(s). Error:\nThe actor died because of an error.", "The actor died because of an error."),
        ("", ""),
    ],
)
def test_a_reason_is_the_exceptions_own_words(message: str, words: str) -> None:
    assert reason(message) == words


def replica(state: str = "RUNNING", name: str = "r1") -> Details:
    return {"replica_id": name, "state": state, "node_id": "n", "actor_id": "a", "log_file_path": f"/serve/{name}.log"}


def app(status: str = "RUNNING", deployment: str = "HEALTHY", **changes: Any) -> Details:
    deployment_details = {
        "status": deployment,
        "status_trigger": "CONFIG_UPDATE_COMPLETED",
        "message": "",
        "target_num_replicas": 1,
    }
    deployment_details |= {"replicas": [replica()], **changes}
    return {
        "status": status,
        "message": "",
        "deployed_app_config": {"name": "app"},
        "deployments": {"Model": deployment_details},
    }


def details(**apps: Details) -> Details:
    return {"applications": apps, "proxies": {"n": {"status": "HEALTHY"}}, "proxy_location": "HeadOnly"}


def test_ready_is_all_apps_running_behind_a_healthy_proxy() -> None:
    assert serve_status.ready(details(app=app()), ["app"])
    assert not serve_status.ready(details(), ["app"])
    assert not serve_status.ready(details(app=app("DEPLOYING", "UPDATING")), ["app"])
    assert not serve_status.ready(details(app=app()) | {"proxies": {}}, ["app"])
    assert not serve_status.ready(details(app=app()) | {"proxies": {"n": {"status": "STARTING"}}}, ["app"])


def test_replicas_that_load_asked_for_are_not_waited_for() -> None:
    assert serve_status.ready(details(app=app("RUNNING", "UPSCALING", status_trigger="AUTOSCALING")), ["app"])
    assert not serve_status.ready(
        details(app=app("RUNNING", "UPSCALING", status_trigger="CONFIG_UPDATE_STARTED")), ["app"]
    )


def test_a_failure_ends_the_wait_with_its_reason() -> None:
    failed = app("DEPLOY_FAILED", "DEPLOY_FAILED", message=CONSTRUCTOR_FAILED)
    with pytest.raises(UserError, match="app/Model did not start: model must be a folder .* got nowhere"):
        serve_status.ready(details(app=failed), ["app"])
    not_built = app("DEPLOY_FAILED") | {"message": IMPORT_FAILED, "deployments": {}}
    with pytest.raises(UserError, match="app did not start: ModuleNotFoundError: No module named 'nowhere'"):
        serve_status.ready(details(app=not_built), ["app"])


def test_only_what_serve_would_not_retry_is_removed_first() -> None:
    same, changed = {"applications": [{"name": "app"}]}, {"applications": [{"name": "app", "args": {"a": 1}}]}
    assert deploy.stuck(details(app=app()), same) == set()
    assert deploy.stuck(details(app=app("DEPLOY_FAILED")), same) == {"app"}
    assert deploy.stuck(details(app=app("DEPLOY_FAILED")), changed) == set(), "its old replicas still serve"
    assert deploy.stuck(details(app=app("DEPLOY_FAILED", replicas=[])), changed) == {"app"}
    assert deploy.stuck(details(other=app("DEPLOY_FAILED")), same) == set()


def test_only_what_runs_with_the_same_config_is_unchanged() -> None:
    same, changed = {"applications": [{"name": "app"}]}, {"applications": [{"name": "app", "args": {"a": 1}}]}
    assert deploy.unchanged(details(app=app()), same) == ["app"]
    assert deploy.unchanged(details(app=app()), changed) == []
    assert deploy.unchanged(details(app=app("DEPLOY_FAILED")), same) == deploy.unchanged(details(), same) == []


def test_a_line_of_progress_counts_replicas_and_quotes_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"/serve/r2.log": "INFO now app_Model r2 -- Warming up bucket 2 of 3", "a": "Downloading:  50%"}

    def log(self: Dashboard, place: Details, lines: int, follow: bool = False) -> list[str]:
        return [
            line
            for line in [written.get(f"/{place.get('filename')}") or written.get(place.get("actor_id", ""))]
            if line
        ]

    monkeypatch.setattr(Dashboard, "log", log)
    starting = app("DEPLOYING", "UPDATING", replicas=[replica(), replica("STARTING", "r2")], target_num_replicas=2)
    news: dict[str, list[str]] = {}

    def row() -> tuple[str, str]:
        return dict(deploy.rows(Dashboard(""), details(app=starting), news))["app/Model"]

    assert row() == ("1 of 2 ready, 1 starting", "Downloading:  50%")
    written["/serve/r2.log"] = "INFO now app_Model r2 -- Warming up bucket 3 of 3"
    assert row()[1] == "Warming up bucket 3 of 3", "whichever file has news"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("applications: [", "is not valid YAML: while parsing a flow node"),
        ("", "must have a list `applications`"),
        ("- a", "must have a list `applications`"),
        ("applications: [{name: a}]", r"applications.0.import_path: Field required"),
        ("applications: [{name: a, import_path: x}]", "import_path"),
        ("applications: [{name: a, import_path: x:y}]\nhttp_options: {port: many}", r"http_options.port: .*integer"),
        ("applications: [{name: a, import_path: x:y}, {name: a, import_path: x:y}]", "is not a Serve config"),
    ],
)
def test_a_bad_config_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as stop:
        deploy.read(path, None)
    assert "\n" not in str(stop.value) and str(path) in str(stop.value)


def test_a_missing_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*nowhere.yaml"):
        deploy.read(tmp_path / "nowhere.yaml", None)


@USES_METRICS_INTERVAL
def test_the_port_can_be_overridden_for_a_second_checkout() -> None:
    sent, shipped = (
        deploy.read(Path("serve_config.yaml"), port).model_dump(exclude_unset=True) for port in (8123, None)
    )
    assert sent["http_options"] == shipped["http_options"] | {"port": 8123}
    assert sent["applications"] == shipped["applications"]


@USES_METRICS_INTERVAL
def test_http_options_that_serve_would_ignore_are_an_error() -> None:
    path = Path("serve_config.yaml")
    config = deploy.read(path, 8123)
    options = config.http_options.model_dump()
    running = {"controller_info": {"node_id": "n"}, "http_options": options | {"port": 8000}}
    with pytest.raises(UserError, match="http_options.port is 8000 while Serve runs, and serve_config.yaml wants 8123"):
        deploy.check_http_options(running, config, path, "local")
    with pytest.raises(
        UserError, match="make undeploy CLUSTER=x.yaml, or keep it: make deploy SERVE_PORT=8000 CLUSTER=x.y"
    ):
        deploy.check_http_options(running, config, path, "x.yaml")
    deploy.check_http_options(running | {"http_options": options}, config, path, "local")


@USES_METRICS_INTERVAL
def test_a_port_that_is_taken_here_matters_to_a_cluster_here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("serve_config.yaml")
    config = deploy.read(path, 8123)
    monkeypatch.setattr(processes, "free", lambda port: False)
    with pytest.raises(UserError, match="Port 8123 .* is taken"):
        deploy.check_http_options({}, config, path, "local")
    deploy.check_http_options({}, config, path, "x.yaml")


def test_the_api_is_addressed_on_loopback_when_it_listens_everywhere() -> None:
    assert serve_address({"http_options": {"host": "0.0.0.0", "port": 8000}}) == "http://127.0.0.1:8000"
    assert serve_address({"http_options": {"host": "10.0.0.7", "port": 80}}) == "http://10.0.0.7:80"


def test_a_dashboard_that_is_gone_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"The dashboard at http://127.0.0.1:1 does not answer"):
        Dashboard("http://127.0.0.1:1").details()
    assert list(Dashboard("http://127.0.0.1:1").log({}, 1)) == []


def test_logs_are_of_the_living_or_else_of_those_that_died_last() -> None:
    dead = app("DEPLOY_FAILED", "DEPLOY_FAILED", replicas=[], recent_dead_replicas=[replica(name="r0")])
    names = [name for name, _ in logs.all_replicas(details(a=app(), b=dead))]
    assert names == ["Model r1", "Model r0"]
    assert [set(place) for place in log_places(replica())] == [{"node_id", "filename"}, {"actor_id", "suffix"}]
    with pytest.raises(UserError, match="No replica has started"):
        list(logs.all_replicas(details()))


def test_progress_without_a_terminal_is_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for detail in ("", "loading", "warming"):
            progress.show({"app/Model": ("0 of 1 ready", detail)})
            progress.show({"app/Model": ("0 of 1 ready", detail)})
        progress.show({"app/Model": ("1 of 1 ready", "")})
    lines = [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["app/Model  0 of 1 ready", "app/Model  0 of 1 ready  loading", "app/Model  1 of 1 ready"]


def test_spans_are_told_in_two_units_at_most() -> None:
    assert [format_duration(seconds) for seconds in (4.2, 75, 7300)] == ["4 s", "1 min 15 s", "2 h 1 min"]


# A config that fails


class FakeServe:
    """A fake Serve. An application with the text "bad" fails and replaces what ran; one with "slow" never gets ready.
    Applications in `broken` do not start again either."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *running: Details, broken: str = "") -> None:
        self.puts: list[list[Details]] = []
        self.apps = {config["name"]: app() | {"deployed_app_config": config} for config in running}
        self.broken = broken
        monkeypatch.setattr(Dashboard, "details", lambda _: details(**self.apps) | {"http_options": {}})
        monkeypatch.setattr(Dashboard, "log", lambda *_, **__: [])
        monkeypatch.setattr(deploy, "client", lambda _: self)
        monkeypatch.setattr(deploy, "check_http_options", lambda *_: None)

    def deploy_applications(self, config: Details) -> None:
        self.puts.append(config["applications"])
        self.apps = {application["name"]: self.outcome(application) for application in config["applications"]}

    def outcome(self, config: Details) -> Details:
        text, known = config["args"]["text"], self.apps.get(config["name"])
        if known and known["deployed_app_config"] == config:
            return known
        if text == "bad" or config["name"] == self.broken:
            outcome = app("DEPLOY_FAILED", "DEPLOY_FAILED", message=CONSTRUCTOR_FAILED, replicas=[])
        else:
            outcome = app("DEPLOYING", "UPDATING") if text == "slow" else app()
        return outcome | {"deployed_app_config": config}


def one_app(name: str, text: str) -> Details:
    return {"name": name, "import_path": "tests.serve_apps:greeter", "route_prefix": f"/{name}", "args": {"text": text}}


def deployed(tmp_path: Path, *apps: Details, timeout_s: float = 60) -> None:
    path = tmp_path / "new.yaml"
    path.write_text(json.dumps({"applications": apps}))
    deploy.deploy(Dashboard("http://127.0.0.1:1"), deploy.read(path, None), path, timeout_s)


REASON = "did not start: model must be a folder in diffusers layout, got nowhere."


def test_what_ran_before_a_config_that_fails_is_put_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = FakeServe(monkeypatch, one_app("a", "good"))
    with pytest.raises(UserError) as stop:
        deployed(tmp_path, one_app("a", "bad"))
    assert serve.puts == [[one_app("a", "bad")], [one_app("a", "good")]]
    first, *_, last = str(stop.value).splitlines()
    assert first == f"a/Model {REASON}"
    assert last == f"{tmp_path}/new.yaml is not deployed. a serves as before, since 0 s after the failure."
    assert f"{tmp_path}/new.yaml failed. Rolling back to what ran before: a." in capsys.readouterr().out
    assert serve.apps["a"]["status"] == "RUNNING"


def test_all_applications_of_before_are_put_back_also_those_that_the_new_config_leaves_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve = FakeServe(monkeypatch, one_app("a", "good"), one_app("b", "good"), one_app("c", "good"))
    with pytest.raises(UserError, match="a, b, c serves as before"):
        deployed(tmp_path, one_app("a", "bad"), one_app("b", "better"), one_app("d", "good"))
    assert serve.puts[-1] == [one_app(name, "good") for name in "abc"]
    assert {name: app["status"] for name, app in serve.apps.items()} == dict.fromkeys("abc", "RUNNING")


def test_the_capacity_of_before_is_put_back_with_it() -> None:
    before = details(a=app() | {"deployed_app_config": one_app("a", "good")}) | {"target_capacity": None}
    failed = {"http_options": {"port": 8000}, "applications": [one_app("a", "bad")], "target_capacity": 10}
    previous = {"http_options": {"port": 8000}, "applications": [one_app("a", "good")]}
    assert deploy.running_config(before, failed) == previous
    assert deploy.running_config(before | {"target_capacity": 50}, failed) == previous | {"target_capacity": 50}


def test_a_first_config_that_fails_has_nothing_to_put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve = FakeServe(monkeypatch)
    serve.apps = {"other": app() | {"deployed_app_config": None}}  # made by serve.run, which no config can make again
    with pytest.raises(UserError) as stop:
        deployed(tmp_path, one_app("a", "bad"))
    assert len(serve.puts) == 1 and str(stop.value).startswith(f"a/Model {REASON}") and "before" not in str(stop.value)


def test_what_does_not_start_again_either_is_told_with_both_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve = FakeServe(monkeypatch, one_app("a", "good"), broken="a")
    with pytest.raises(UserError) as stop:
        deployed(tmp_path, one_app("a", "bad"))
    assert len(serve.puts) == 2
    assert str(stop.value).count(REASON) == 2 and "the rollback failed too" in str(stop.value)


def test_an_application_that_was_unhealthy_is_put_back_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve = FakeServe(monkeypatch, one_app("a", "good"), one_app("b", "slow"))
    serve.apps["b"]["status"] = "UNHEALTHY"
    with pytest.raises(UserError, match="a, b serves as before"):
        deployed(tmp_path, one_app("a", "bad"), one_app("b", "good"), timeout_s=5)
    assert serve.puts[-1] == [one_app("a", "good"), one_app("b", "slow")]


def test_what_is_only_slow_or_interrupted_is_not_put_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = FakeServe(monkeypatch, one_app("a", "good"))
    with pytest.raises(UserError, match="Not ready after .* Serve keeps trying"):
        deployed(tmp_path, one_app("a", "slow"), timeout_s=0)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployed(tmp_path, one_app("a", "slow"))
    assert f"Serve keeps deploying {tmp_path}/new.yaml; see: make status" in capsys.readouterr().out
    assert [config for (config,) in serve.puts] == [one_app("a", "slow")] * 2


# Status


@pytest.fixture
def api() -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """The URL of an API, and its answer for each path."""
    answers: dict[str, tuple[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answers[self.path]
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()
        thread.join()


def status_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, **changes: Any
) -> tuple[str, str]:
    """The output and the error of `make status`."""
    port = int(url.rpartition(":")[2])
    application = app() | {"route_prefix": "/v2"} | changes.pop("app", {})
    state = details(app=application) | {"http_options": {"port": port}, "controller_info": {"node_id": "n"}} | changes
    monkeypatch.setattr(Dashboard, "details", lambda _: state)
    monkeypatch.setattr("cluster.nodes.status", lambda _: Nodes(Counter(head=1), []))
    monkeypatch.setattr("cluster.nodes.past", lambda _: [])
    try:
        status.status(Dashboard("http://127.0.0.1:1"), "up 3 s")
    except UserError as stop:
        return capsys.readouterr().out, str(stop)
    return capsys.readouterr().out, ""


def test_status_asks_the_api_itself_and_shows_the_proxies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], api: Any
) -> None:
    url, answers = api
    answers["/v2/healthz"] = (200, b"{}")
    shown, wrong = status_output(monkeypatch, capsys, url)
    assert "Proxy  HEALTHY on n\napp  RUNNING, answers after 0.0" in shown and not wrong
    answers["/v2/healthz"] = (404, b"not ours")
    assert status_output(monkeypatch, capsys, url)[1] == "", "another application has no such route"


def test_an_api_that_does_not_serve_is_wrong_whatever_serve_calls_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], api: Any
) -> None:
    url, answers = api
    answers["/v2/healthz"] = (503, json.dumps({"error": {"message": "No replica has answered."}}).encode())
    assert status_output(monkeypatch, capsys, url)[1] == (
        "app does not serve: its /healthz answers 503: No replica has answered."
    )
    answers["/v2/healthz"] = (500, b"Internal\nServer Error")
    assert status_output(monkeypatch, capsys, url)[1].endswith("answers 500: Internal Server Error")
    closed = f"http://127.0.0.1:{processes.free_ports(1)[0]}"
    shown, wrong = status_output(monkeypatch, capsys, closed)
    assert wrong == "app does not serve: its /healthz does not answer: [Errno 111] Connection refused"
    assert "app  RUNNING, its /healthz does not answer" in shown
    starting = app("DEPLOYING", "UPDATING") | {"route_prefix": "/v2"}
    assert status_output(monkeypatch, capsys, closed, app=starting)[1] == "", "what starts need not answer yet"


def test_an_api_that_hangs_is_wrong_within_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert status_output(monkeypatch, capsys, url)[1].endswith("its /healthz does not answer: nothing within 0.1 s")


def test_what_serve_itself_calls_wrong_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], api: Any
) -> None:
    url, answers = api
    answers["/v2/healthz"] = (200, b"{}")
    failed = app("DEPLOY_FAILED", "DEPLOY_FAILED", message=CONSTRUCTOR_FAILED) | {"route_prefix": "/v2"}
    shown, wrong = status_output(monkeypatch, capsys, url, app=failed)
    assert wrong == "app is DEPLOY_FAILED." and REASON in shown
    sick = {"n": {"status": "UNHEALTHY", "node_ip": "10.0.0.7"}}
    assert status_output(monkeypatch, capsys, url, proxies=sick)[1] == "The proxy on 10.0.0.7 is UNHEALTHY."


class Busy(Dashboard):
    """A dashboard that is late with its first answers."""

    late = 0

    def details(self) -> Details:
        type(self).late -= 1
        if type(self).late >= 0:
            raise Late("The dashboard does not answer: timed out.")
        return details(app=app())


def test_a_dashboard_that_is_late_is_asked_again_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Busy, "late", deploy.LATE_ANSWERS)
    deploy.wait(Busy("http://127.0.0.1:1"), lambda seen: serve_status.ready(seen, ["app"]), 1.0)
    monkeypatch.setattr(Busy, "late", deploy.LATE_ANSWERS + 1)
    with pytest.raises(Late, match="timed out"):
        deploy.wait(Busy("http://127.0.0.1:1"), lambda seen: serve_status.ready(seen, ["app"]), 1.0)


def test_an_answer_that_takes_too_long_is_late_and_a_closed_port_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dashboard = Dashboard(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Late, match="does not answer: timed out"):
            dashboard.open("/", timeout_s=0.05)
    with pytest.raises(UserError, match="does not answer") as closed:
        dashboard.open("/", timeout_s=0.05)
    assert not isinstance(closed.value, Late)
