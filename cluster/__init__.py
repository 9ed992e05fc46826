"""The verbs. A command of ours (`python -m cluster.deploy`) takes no module from where the user's PYTHONPATH points:
that may be another Python's pydantic. An entry that names our own code stays, and nothing changes in a process of Ray.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def forget_strangers() -> None:
    """What PYTHONPATH names beside our code: for this process and those that it starts."""
    named = [entry for entry in os.environ.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    ours = [entry for entry in named if Path(entry).resolve() == ROOT]
    if ours:
        os.environ["PYTHONPATH"] = os.pathsep.join(ours)
    strangers = {os.path.abspath(entry) for entry in named} - {os.path.abspath(entry) for entry in ours}
    current_folder = os.getcwd()  # first in the path of `python -m`
    sys.path[:] = [entry for entry in sys.path if entry == current_folder or os.path.abspath(entry) not in strangers]


if sys.argv[:1] == ["-m"]:  # so it is while the packages of a module that is run are imported
    forget_strangers()
