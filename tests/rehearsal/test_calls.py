"""Ray's launcher, node provider and autoscaler against the simulated Google Cloud, for every cluster file."""

from pathlib import Path

import pytest

pytest.importorskip("googleapiclient", reason="needs Google's client: make gcp")

from cluster import ROOT
from rehearsal.__main__ import walk
from rehearsal.calls import Rehearsal

FILES = [ROOT / "cluster.yaml", *sorted((ROOT / "configs").glob("cluster-*.yaml"))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("source", FILES, ids=lambda file: file.stem)
def test_every_cluster_file_comes_up_scales_and_leaves_nothing(cloud: Rehearsal, source: Path) -> None:
    steps = list(walk(cloud, source))
    assert "TPU nodes are READY" in steps[1] and "is up-to-date" in steps[2]
    assert "nothing is left" in steps[-1]
