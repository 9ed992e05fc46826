"""Which tests on clusters a process of pytest-xdist runs together; `--dist loadscope` asks for this."""

from typing import Any

import pytest

SHARE_A_CLUSTER = ("tests/on_cluster/test_api.py", "tests/on_cluster/test_front.py", "tests/on_cluster/test_moves.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadscope":
        return None  # xdist's own
    from xdist.scheduler import LoadScopeScheduling

    class ByCluster(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            """Tests of one scope run in one process, in their order."""
            file = nodeid.partition("::")[0]
            return "shared cluster" if file in SHARE_A_CLUSTER else file

    return ByCluster(config, log)
