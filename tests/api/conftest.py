"""Fixtures of all tests of the API."""

import pytest


@pytest.fixture(autouse=True)
def no_replica_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """While requests wait, the ingress looks for starting replicas in the cluster. There is no cluster here."""
    monkeypatch.setattr("app.api.replicas.all_replica_ids", none_start)


async def none_start(handle: object) -> list[str]:
    return []
