"""Serve's request router of the model's deployment: it sends each request to the replica that the ingress names.

The ingress chooses (app/api/routing/). Its handle carries the choice as session id. Calls without one, such as the
question that wakes a first replica, go to the replica with the fewest requests.

Ray pickles this module by value and runs the class on a thread of its own, so it keeps no state.
"""

from app.api.errors import ReplicaGone
from app.ray_internals.routing import PendingRequest, RequestRouter, RunningReplica


class ReplicaRouter(RequestRouter):
    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named replica alone. If it does not run any more, the caller gets ReplicaGone and chooses again."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # a full replica is asked again later, not at once
        name = pending_request.metadata.session_id
        if not name:
            return [candidate_replicas]
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
        if named:
            return [named]
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGone(name))
            self._remove_pending_request_from_indices(pending_request)  # as the same HTTP request may call again
        return [candidate_replicas]  # at the next candidates, Serve's loop sees that the request is done
