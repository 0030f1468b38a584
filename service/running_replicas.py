"""Which replicas Serve sends the calls of a handle to, as this process knows it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

_lock = threading.Lock()
# Made by Serve with the first call of a handle. Of several for one deployment in one process, each knows the same.
_routers: weakref.WeakValueDictionary[Any, RequestRouter] = weakref.WeakValueDictionary()


def register(deployment_id: Any, router: RequestRouter) -> None:
    """A router of this deployment exists in this process."""
    with _lock:
        _routers[deployment_id] = router


def running(handle: DeploymentHandle) -> list[str]:
    """Names of the replicas that take calls, in order; none before the first call."""
    with _lock:
        router = _routers.get(handle.deployment_id)
    return [] if router is None else sorted(replica_id.unique_id for replica_id in list(router.curr_replicas))
