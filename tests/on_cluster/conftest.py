"""One cluster serves the tests of this folder that only use it; those that end a cluster start their own. Its ports are
its own and its state is in .run/test, so a cluster that is up in this checkout is neither used nor disturbed.
"""

from collections.abc import Iterator

import pytest

from cluster import ROOT
from tests.clusters import Verbs, one_node_cluster, succeeds


@pytest.fixture(scope="session")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verbs]:
    yield from one_node_cluster(ROOT / ".run" / "test", tmp_path_factory.mktemp("local-cluster"))


@pytest.fixture(scope="module")
def api(verbs: Verbs) -> str:
    """The address of serve_config.yaml's application, deployed anew where a module before left something else."""
    succeeds(verbs("deploy", "deploy", "--config", str(verbs.config), "--serve-port", str(verbs.serve_port)))
    return f"http://127.0.0.1:{verbs.serve_port}"
