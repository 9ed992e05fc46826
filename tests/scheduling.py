"""Which tests on clusters a process of pytest-xdist runs together; `--dist loadscope` asks for this. A file in
tests/on_cluster/ shares the cluster of conftest.py unless it is named as having its own."""

from typing import Any

import pytest

SHARED = "tests/on_cluster/"  # where a file's tests share the cluster of conftest.py
OWN_CLUSTER = ("tests/on_cluster/test_verbs.py",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadscope":
        return None  # xdist's own
    from xdist.scheduler import LoadScopeScheduling

    class ByCluster(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            """Tests of one scope run in one process, in their order."""
            file = nodeid.partition("::")[0]
            return "shared cluster" if file.startswith(SHARED) and file not in OWN_CLUSTER else file

    return ByCluster(config, log)
