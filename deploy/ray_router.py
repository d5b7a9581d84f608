"""Ray Serve's choice of a replica: by `deploy.affinity`, or among two at random where any will do."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deploy.affinity import Holdings, ranked
from deploy.asgi_call import Head


class ExpertRouter(RequestRouter):  # type: ignore[misc]
    """Prefers the replica that holds a request's expert; a full one is passed over for the next best.

    Replicas report what they hold once in `request_routing_stats_period_s`; a burst that comes before the report goes
    to one replica too, the one that the name's hash prefers.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas in the order in which Ray shall try them; of a group, it takes the least busy."""
        if pending_request is not None:  # after a round in which all were full, come again after a pause
            pending_request.routing_context.should_backoff = True
        name = _wanted(pending_request)
        if not name:
            pair = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            return [pair, candidate_replicas]
        by_id = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        holdings = {key: Holdings.of(replica.routing_stats or {}) for key, replica in by_id.items()}
        return [[by_id[key] for key in group] for group in ranked(name, holdings)]


def _wanted(pending_request: PendingRequest | None) -> str:
    arguments: Any = () if pending_request is None else pending_request.args
    head = arguments[0] if arguments else None
    return head.wanted if isinstance(head, Head) else ""
