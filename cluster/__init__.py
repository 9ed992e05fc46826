"""The commands behind the make verbs.

A command such as `python -m cluster.deploy` ignores the user's PYTHONPATH, which may hold another Python's pydantic. An
entry that names this repository stays. Ray's own processes are not affected.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def forget_strangers() -> None:
    """Removes PYTHONPATH entries other than this repository, for this process and those that it starts."""
    named = [entry for entry in os.environ.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    ours = [entry for entry in named if Path(entry).resolve() == ROOT]
    if ours:
        os.environ["PYTHONPATH"] = os.pathsep.join(ours)
    strangers = {os.path.abspath(entry) for entry in named} - {os.path.abspath(entry) for entry in ours}
    current_folder = os.getcwd()  # first in the path of `python -m`
    sys.path[:] = [entry for entry in sys.path if entry == current_folder or os.path.abspath(entry) not in strangers]


if sys.argv[:1] == ["-m"]:  # true while `python -m` imports the packages of its module
    forget_strangers()
