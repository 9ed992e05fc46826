"""Fixtures of all tests of the API."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.api.ingress import APIIngress
from app.api.settings import Jobs
from tests.api.test_ingress import SERVICE, Replicas, local_client


@pytest.fixture(autouse=True)
def no_replica_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """While requests wait, the ingress looks for starting replicas in the cluster. There is no cluster here."""
    monkeypatch.setattr("app.api.replicas.all_replica_ids", none_start)


async def none_start(handle: object) -> list[str]:
    return []


def with_jobs(folder: Path, **settings: object) -> APIIngress:
    """An ingress that keeps jobs and files below the folder, before fake replicas."""
    paths = {"database": str(folder / "state" / "jobs.sqlite3"), "files": str(folder / "files")}
    limits = SERVICE.limits.model_copy(update={"timeout_s": 60.0})
    return APIIngress(Replicas(), replace(SERVICE, limits=limits, jobs=Jobs.model_validate({**paths, **settings})))


@pytest.fixture
def ingress(tmp_path: Path) -> APIIngress:
    return with_jobs(tmp_path)


@pytest.fixture
def client(ingress: APIIngress) -> Iterator[TestClient]:
    with local_client(ingress) as client:
        yield client
