"""Programs that act as another user of this machine: they become `nobody`, which only root can do."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster import ROOT

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
# A program runs this after its imports: only root may be able to read Python's own folder.
BECOME = f"""
import os
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
"""
# gRPC calls that would have an effect or reveal something, for every kind of port of Ray. An empty request is no bytes.
CALLS = (
    *("NodeInfoGcsService/GetAllNodeInfo", "JobInfoGcsService/GetNextJobID", "InternalKVGcsService/InternalKVKeys"),
    *("NodeManagerService/GetNodeStats", "NodeManagerService/ShutdownRaylet", "CoreWorkerService/Exit"),
    *(
        "CoreWorkerService/PushTask",
        "ObjectManagerService/Push",
        "ObjectManagerService/Pull",
        "RayletDriver/ClusterInfo",
    ),
    *("ReporterService/GetTraceback", "LogService/ListLogs"),
)
ATTACK = f"""
import json, pickle, sys
import grpc
from ray.serve.generated import serve_pb2, serve_pb2_grpc
marker, ports, calls = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
{BECOME}
class Touch:
    def __reduce__(self): return (os.system, (f"touch {{marker}}",))
answers = {{}}
for port in ports:
    with grpc.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        asks = {{call: channel.unary_unary(f"/ray.rpc.{{call}}") for call in calls}}
        asks["ASGIService/HandleRequest"] = serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest
        for name, ask in asks.items():
            pickled = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Touch()))
            try:
                ask(pickled if name.startswith("ASGI") else b"", timeout=2)
                answers[f"{{port}} {{name}}"] = "OK"
            except grpc.RpcError as error:
                answers[f"{{port}} {{name}}"] = error.code().name
print(json.dumps(answers))
"""
ASK = f"""
import encodings.idna, http.client, json, sys
requests = json.loads(sys.argv[1])
{BECOME}
answers = {{}}
for port, method, path, headers in requests:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, b"{{}}" if method == "POST" else None, headers)
    answers[f"{{method}} {{port}} {{path}}"] = connection.getresponse().status
print(json.dumps(answers))
"""
READ = f"""
import json, sys
{BECOME}
def content(path):
    try:
        return open(path).read()
    except OSError as error:
        return type(error).__name__
print(json.dumps({{path: content(path) for path in sys.argv[1:]}}))
"""
VERB = f"""
import importlib, runpy, sys
from cluster import cli
module = importlib.import_module(sys.argv[1])
{BECOME}
sys.argv[:] = sys.argv[1:]
cli.run_command(module.main)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def attack(ports: Iterable[int], marker: Path) -> dict[str, str]:
    """The answer of each port to each gRPC call. A server that unpickles creates `marker`."""
    return answers(run(ATTACK, str(marker), json.dumps(sorted(ports)), json.dumps(CALLS)))


def ask(*requests: tuple[int, str, str, dict[str, str]]) -> dict[str, int]:
    """The status of each request: port, method, path, headers."""
    return {line: int(status) for line, status in answers(run(ASK, json.dumps(requests))).items()}


def read(*paths: Path) -> dict[str, str]:
    """The content of each file, or the error."""
    return answers(run(READ, *map(str, paths)))


def answers(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads(done.stdout)
    return results
