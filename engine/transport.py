"""Framing of every socket: [token, header, msgpack body], never pickle.

All bound sockets are PULL sockets, so that a stranger who connects can at most send, never receive; what he sends
has no valid token and is dropped and counted.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import zmq

from engine.errors import M3Error

log = logging.getLogger(__name__)

TOKEN_BYTES = 16
MAX_MESSAGE_BYTES = 256 * 2**20
HEARTBEAT_MS = 5000
_HEADER = struct.Struct("<BQQ")
S = TypeVar("S", bound=zmq.Socket[Any])
_encoder = msgspec.msgpack.Encoder()


class Kind(IntEnum):
    """What the body of a message is."""

    STEP = 1  # StepPlan, executor -> rank
    RESULT = 2  # StepResult, rank 0 -> executor
    FAILURE = 3  # str, any rank -> executor
    ACCEPTED = 4  # replica -> ingress: a submit arrived
    EVENTS = 5  # replica -> ingress: what one step did
    ABORT = 6  # ingress -> replica
    HELLO = 7  # int, the rank: executor -> rank and back
    TIMES = 8  # RankTimes, ranks other than 0 -> executor, after a probed step
    ALIVE = 9  # nothing, replica -> ingress: its requests are looked after, whether or not a step has news of them


class Header(NamedTuple):
    """epoch: the worker group or process that sends.  sequence: the step id, or 0."""

    kind: int
    epoch: int
    sequence: int


def new_token() -> bytes:
    """A secret that members of one group share."""
    return secrets.token_bytes(TOKEN_BYTES)


def new_epoch() -> int:
    """A number that no other group or process has, but for a chance of 2**-63."""
    return secrets.randbits(63)


def encode(value: Any) -> bytes:
    """msgpack bytes of a dataclass, a msgspec struct or plain values."""
    return _encoder.encode(value)


def pack(token: bytes, header: Header, body: bytes) -> list[bytes]:
    """The frames of one message."""
    return [token, _HEADER.pack(*header), body]


class Gate:
    """Lets in messages with the right token that decode to the type of their kind; counts the others.

    name: of the socket, for the log.  types: kind -> type of the body; other kinds are dropped.
    """

    def __init__(self, name: str, token: bytes, types: Mapping[int, Any]) -> None:
        self._name = name
        self._token = token
        self._decoders = {kind: msgspec.msgpack.Decoder(body) for kind, body in types.items()}
        self.dropped = 0

    def admit(self, frames: Sequence[bytes]) -> tuple[Header, Any] | None:
        """The header and decoded body, or None for a message to ignore."""
        reason = "no valid token"
        if len(frames) == 3 and hmac.compare_digest(frames[0], self._token) and len(frames[1]) == _HEADER.size:
            header = Header(*_HEADER.unpack(frames[1]))
            decoder = self._decoders.get(header.kind)
            if decoder is None:
                reason = f"kind {header.kind}"
            else:
                try:
                    return header, decoder.decode(frames[2])
                # M3Error: types like SamplingParams check their values when they are built. ValueError: text that is
                # not UTF-8.
                except (msgspec.MsgspecError, M3Error, ValueError) as error:
                    reason = str(error)
        self.dropped += 1
        # At 1, 2, 4, 8, ...: a stranger must not be able to fill the log.
        if self.dropped & (self.dropped - 1) == 0:
            log.warning("%s: %d messages dropped so far, the last one for: %s", self._name, self.dropped, reason)
        return None


def bind_pull(context: zmq.Context[S], *, directory: Path | None, name: str, host: str) -> tuple[S, str]:
    """A bound PULL socket and its endpoint: ipc inside `directory` when both ends can see it, else tcp on `host`."""
    bound = context.socket(zmq.PULL)
    bound.setsockopt(zmq.LINGER, 0)
    bound.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    bound.bind(f"ipc://{directory / name}" if directory is not None else f"tcp://{host}:*")
    endpoint: str = bound.getsockopt_string(zmq.LAST_ENDPOINT)
    return bound, endpoint


def connect_push(context: zmq.Context[S], endpoint: str, *, max_queued: int = 1000) -> S:
    """A PUSH socket to `endpoint`. A non-blocking send raises zmq.Again when `max_queued` messages are waiting."""
    pusher = context.socket(zmq.PUSH)
    pusher.setsockopt(zmq.LINGER, 0)
    pusher.setsockopt(zmq.SNDHWM, max_queued)
    # A peer whose machine is gone, or that is stopped, closes nothing: only silence tells.
    pusher.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    pusher.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6 * HEARTBEAT_MS)
    pusher.connect(endpoint)
    return pusher
