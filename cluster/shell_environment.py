"""Environment variables with which plain `ray`, `serve` and `curl` reach the local cluster.

    eval "$(make -s address)"

Prints them for a shell, or starts a shell that has them.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import ROOT, auth_token, processes
from cluster.dashboard import serve_address
from cluster.local.state import Cluster
from cluster.terminal import say


def variables(cluster: Cluster) -> dict[str, str]:
    return {
        "RAY_ADDRESS": cluster.gcs_address,  # for `ray status` and ray.init()
        "RAY_API_SERVER_ADDRESS": cluster.address,  # `ray job`, `ray list`
        "RAY_DASHBOARD_ADDRESS": cluster.address,  # `serve`
        "PYTHONPATH": str(ROOT),  # `serve` imports the autoscaling policy that a config names
        **auth_token.environment(cluster.token_file),  # the path of the token, not the token
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without it Ray replaces 127.0.0.1
        "IMAGINE_URL": serve_address(cluster.dashboard.details()),  # curl "$IMAGINE_URL/v1/models"
        **processes.past_proxies(),
    }


def path() -> str:
    return str(Path(sys.executable).parent)


def export(cluster: Cluster) -> None:
    tell(variables(cluster), unset=strays(auth_token.environment(cluster.token_file)))
    say(f'export PATH={shlex.quote(path())}:"$PATH"')


def strays(ours: Mapping[str, str]) -> list[str]:
    """Token variables of another cluster, which a shell may still have."""
    return [name for name in auth_token.VARIABLES if name not in ours]


def tell(variables: Mapping[str, str], unset: Sequence[str]) -> None:
    """Prints lines for a shell's `eval`."""
    if unset:
        say(f"unset {' '.join(unset)}")
    for name, value in variables.items():
        say(f"export {name}={shlex.quote(value)}")


def attach(cluster: Cluster) -> None:
    """Replaces this process by a shell."""
    ours = variables(cluster)
    environment = {name: value for name, value in os.environ.items() if name not in strays(ours)} | ours
    environment["PATH"] = f"{path()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    shell = os.environ.get("SHELL", "/bin/sh")
    words = "A shell for the local cluster: ray status, serve status, curl $IMAGINE_URL/healthz. Leave it with: exit"
    print(words, file=sys.stderr, flush=True)
    os.execvpe(shell, [shell], environment)
