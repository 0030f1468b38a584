"""The engine replicas that an ingress has heard of: where their aborts go, and whether they still speak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from engine.transport import Header, Kind, connect_push, encode, pack
from service.messages import Abort, Accepted

# A replica without requests for so long may have been removed; its next Accepted brings it back.
FORGET_AFTER_S = 60.0


@dataclass(slots=True)
class _Replica:
    """silent_s: for how long it has said nothing, by the count of `tick`."""

    name: str
    socket: zmq.Socket[Any]
    token: bytes
    used_at_s: float
    silent_s: float = 0.0


class ReplicaTable:
    """Replicas by the epoch in the headers of their messages, which no two processes share.

    epoch: of the ingress, for the headers of its own messages.
    """

    def __init__(self, context: zmq.Context[Any], epoch: int) -> None:
        self._context = context
        self._epoch = epoch
        self._replicas: dict[int, _Replica] = {}

    def __len__(self) -> int:
        return len(self._replicas)

    def name(self, epoch: int | None) -> str | None:
        """The replica's name in Serve, if it is known."""
        replica = None if epoch is None else self._replicas.get(epoch)
        return None if replica is None else replica.name

    def accepted(self, epoch: int, message: Accepted) -> None:
        """A replica took a submit."""
        replica = self._replicas.get(epoch)
        if replica is None:
            control = connect_push(self._context, message.control_endpoint)
            replica = _Replica(message.replica_id, control, message.control_token, 0.0)
            self._replicas[epoch] = replica
        replica.used_at_s = time.monotonic()

    def heard(self, epoch: int) -> None:
        """A message came from this process."""
        if (replica := self._replicas.get(epoch)) is not None:
            replica.silent_s = 0.0

    def abort(self, epoch: int, attempt_ids: Sequence[str]) -> None:
        """Tell a replica that nobody waits for these attempts any more."""
        replica = self._replicas.get(epoch)
        if replica is None or not attempt_ids:
            return
        frames = pack(replica.token, Header(Kind.ABORT, self._epoch, 0), encode(Abort(list(attempt_ids))))
        # A replica that does not read its aborts is about to be found dead.
        with contextlib.suppress(zmq.Again):
            replica.socket.send_multipart(frames, zmq.NOBLOCK)

    def drop(self, epoch: int) -> None:
        """The process is dead."""
        if (replica := self._replicas.pop(epoch, None)) is not None:
            replica.socket.close(linger=0)

    def tick(self, period_s: float, busy: Collection[int]) -> None:
        """Call every `period_s`: lets those of `busy`, which have requests of ours, grow silent, and forgets others.

        A tick counts as `period_s`, however late it comes: when this process itself stood still, what the replicas
        sent in the meantime is still to be read.
        """
        now_s = time.monotonic()
        for epoch, replica in list(self._replicas.items()):
            if epoch in busy:
                replica.silent_s += period_s
            elif now_s - replica.used_at_s > FORGET_AFTER_S:
                self.drop(epoch)
            else:
                replica.silent_s = 0.0

    def silent_s(self, epoch: int) -> float:
        """For how long a replica with requests of ours has said nothing."""
        replica = self._replicas.get(epoch)
        return 0.0 if replica is None else replica.silent_s

    def close(self) -> None:
        """Free the sockets: their context waits for ever for one that is left open."""
        for epoch in list(self._replicas):
            self.drop(epoch)
