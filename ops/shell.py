"""What plain `ray`, `serve` and `curl` need to know to speak with the local cluster, for `eval` or in a shell.

eval "$(make -s address)"
"""

import os
import shlex
import sys
from pathlib import Path

from ops import processes
from ops.dashboard import Dashboard, serve_address
from ops.terminal import say


def variables(address: str, gcs_address: str) -> dict[str, str]:
    return {
        "RAY_ADDRESS": gcs_address,  # `ray status` and ray.init(), which do not take the dashboard's
        "RAY_API_SERVER_ADDRESS": address,  # `ray job`, `ray list`
        "RAY_DASHBOARD_ADDRESS": address,  # `serve`
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes another address for 127.0.0.1
        "IMAGINE_URL": serve_address(Dashboard(address).details()),  # curl "$IMAGINE_URL/v1/models"
        **processes.past_proxies(),
    }


def path() -> str:
    return str(Path(sys.executable).parent)


def export(address: str, gcs_address: str) -> None:
    for name, value in variables(address, gcs_address).items():
        say(f"export {name}={shlex.quote(value)}")
    say(f'export PATH={shlex.quote(path())}:"$PATH"')


def attach(address: str, gcs_address: str) -> None:
    """Becomes a shell, which ends as shells do."""
    environment = os.environ | variables(address, gcs_address)
    environment["PATH"] = f"{path()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    shell = os.environ.get("SHELL", "/bin/sh")
    words = "A shell for the local Ray: ray status, serve status, curl $IMAGINE_URL/healthz. Leave it with: exit"
    print(words, file=sys.stderr, flush=True)
    os.execvpe(shell, [shell], environment)
