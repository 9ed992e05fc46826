"""What plain `ray`, `serve` and `curl` need to know to speak with the local cluster, for `eval` or in a shell.

eval "$(make -s address)"
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import auth_token, processes
from cluster.dashboard import serve_address
from cluster.local.state import Cluster
from cluster.terminal import say


def variables(cluster: Cluster) -> dict[str, str]:
    return {
        "RAY_ADDRESS": cluster.gcs_address,  # `ray status` and ray.init(), which do not take the dashboard's
        "RAY_API_SERVER_ADDRESS": cluster.address,  # `ray job`, `ray list`
        "RAY_DASHBOARD_ADDRESS": cluster.address,  # `serve`
        **auth_token.environment(cluster.token_file),  # the file, and not what is in it
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes another address for 127.0.0.1
        "IMAGINE_URL": serve_address(cluster.dashboard.details()),  # curl "$IMAGINE_URL/v1/models"
        **processes.past_proxies(),
    }


def path() -> str:
    return str(Path(sys.executable).parent)


def export(cluster: Cluster) -> None:
    tell(variables(cluster), unset=strays(auth_token.environment(cluster.token_file)))
    say(f'export PATH={shlex.quote(path())}:"$PATH"')


def strays(ours: Mapping[str, str]) -> list[str]:
    """What another cluster may have left in a shell, and would lead Ray past ours."""
    return [name for name in auth_token.VARIABLES if name not in ours]


def tell(variables: Mapping[str, str], unset: Sequence[str]) -> None:
    """Lines for a shell's `eval`."""
    if unset:
        say(f"unset {' '.join(unset)}")
    for name, value in variables.items():
        say(f"export {name}={shlex.quote(value)}")


def attach(cluster: Cluster) -> None:
    """Becomes a shell, which ends as shells do."""
    ours = variables(cluster)
    environment = {name: value for name, value in os.environ.items() if name not in strays(ours)} | ours
    environment["PATH"] = f"{path()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    shell = os.environ.get("SHELL", "/bin/sh")
    words = "A shell for the local Ray: ray status, serve status, curl $IMAGINE_URL/healthz. Leave it with: exit"
    print(words, file=sys.stderr, flush=True)
    os.execvpe(shell, [shell], environment)
