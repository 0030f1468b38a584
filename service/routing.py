"""Which engine replica an ingress sends a request to: the one that holds its prefix, unless that one is overloaded.

The rule, for the replicas that Serve runs and that fit (see `fits`):

1. A replica that holds a part of the prefix may be chosen for it while its load is at most `slack` times that part
   above the least one: for all of the prefix it may be fuller than for a little. And it must have room.
2. Of these, the one that holds most; equal: the least loaded; equal: the first in an order that the prompt's first page
   decides, the same in every ingress. If there is none, the least loaded of all.

Load is what replicas report with every message (engine tokens and requests, of all ingresses), plus what this ingress
has sent and no replica has accepted yet. Which pages a replica holds is what this ingress sent there: evictions are not
reported, and a wrong guess costs one prefill. No clock and no chance decides. Loads neither Ray nor torch.

Sending a request to the replica that has most of it cached, within bounds of load, is the idea of SGLang's router.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.config import PAGE_SIZE
from engine.pages import hash_page
from service.messages import Load

# Pages in the table, of 128 tokens each: at most MAX_PAGES * PAGE_BYTES bytes, 42 MB.
MAX_PAGES = 131_072
PAGE_BYTES = 320
# Of a prompt, so many pages are looked at: hashing them takes about a millisecond.
MAX_PROMPT_PAGES = 512
_KEY_BYTES = 16


class Choice(StrEnum):
    """Why a replica was chosen. overloaded: one that holds a longer prefix had too much to do."""

    PREFIX = "prefix"
    BALANCED = "balanced"
    OVERLOADED = "overloaded"


@dataclass(slots=True)
class Ticket:
    """A request on its way to the replica it was chosen for; counts as its load until `close`."""

    replica_id: str
    choice: Choice
    num_tokens: int
    _replica: _Replica

    def close(self) -> None:
        """A replica has it, or none will. Safe to call twice."""
        self._replica.pending_tokens -= self.num_tokens
        self._replica.pending_requests -= bool(self.num_tokens)
        self.num_tokens = 0


@dataclass(slots=True)
class _Replica:
    """bit: of this replica in the table of pages.  model, identity: None until it has said so."""

    bit: int
    load: Load
    pending_tokens: int = 0
    pending_requests: int = 0
    model: str | None = None
    identity: str | None = None

    @property
    def share(self) -> float:
        return self.load.plus(self.pending_tokens, self.pending_requests).share

    @property
    def has_room(self) -> bool:
        return self.load.requests + self.pending_requests < self.load.max_requests


class RoutingTable:
    """The replicas of one deployment as an ingress knows them.

    model: that requests are made for; replicas that say they serve another one do not fit.  idle: the load of one that
    has not spoken yet.  slack: by how much the load of a replica that holds all of a prefix, a share as in Load.share,
    may be above the least.  max_pages: the bound of the table.
    """

    def __init__(self, model: str, idle: Load, *, slack: float, max_pages: int = MAX_PAGES) -> None:
        self._model = model
        self._idle = idle
        self._slack = slack
        self._max_pages = max_pages
        self._replicas: dict[str, _Replica] = {}
        self._holders: OrderedDict[bytes, int] = OrderedDict()

    @property
    def num_pages(self) -> int:
        """Pages in the table."""
        return len(self._holders)

    def update(self, replica_ids: Collection[str]) -> None:
        """These replicas run now; what is known of others is forgotten."""
        if self._replicas.keys() == set(replica_ids):
            return
        gone = 0
        for replica_id in self._replicas.keys() - set(replica_ids):
            gone |= 1 << self._replicas.pop(replica_id).bit
        if gone:
            self._holders = OrderedDict((key, left) for key, bits in self._holders.items() if (left := bits & ~gone))
        taken = {replica.bit for replica in self._replicas.values()}
        free = (bit for bit in range(len(replica_ids)) if bit not in taken)
        for replica_id in sorted(set(replica_ids) - self._replicas.keys()):
            self._replicas[replica_id] = _Replica(next(free), self._idle)

    def heard_load(self, load: Load) -> None:
        """A replica told what it has to do."""
        if (replica := self._replicas.get(load.replica_id)) is not None:
            replica.load = load

    def heard_identity(self, replica_id: str, model: str, identity: str) -> None:
        """A replica told what it runs."""
        if (replica := self._replicas.get(replica_id)) is not None:
            replica.model, replica.identity = model, identity

    def fits(self, identity: str | None = None) -> list[str]:
        """Replicas that may take a request for the model, in order of their names; also those that have not said what
        they run. identity: of the replica that gave the request its tokens so far, if any did."""
        return [
            replica_id
            for replica_id, replica in sorted(self._replicas.items())
            if replica.model in (None, self._model) and (identity is None or replica.identity in (None, identity))
        ]

    def full(self, replica_ids: Collection[str]) -> list[Load]:
        """The loads of these when each holds as many requests as it takes; none when one has room or is not known."""
        replicas = [self._replicas.get(replica_id) for replica_id in replica_ids]
        loads = [replica.load for replica in replicas if replica is not None and not replica.has_room]
        return loads if len(loads) == len(replicas) else []

    @property
    def has_replicas(self) -> bool:
        """Whether Serve runs any, fit or not."""
        return bool(self._replicas)

    def choose(self, token_ids: Sequence[int], keys: Sequence[bytes], candidates: Iterable[str]) -> Ticket | None:
        """Choose one of `candidates` (replica ids, of `fits`) for a request, and count it as its load.

        keys: page_keys(token_ids). None when no candidate runs.
        """
        replicas = {name: self._replicas[name] for name in candidates if name in self._replicas}
        if not replicas:
            return None
        held = self._num_held(keys, replicas)
        shares = {name: replica.share for name, replica in replicas.items()}
        with_room = [name for name, replica in replicas.items() if replica.has_room] or list(replicas)
        least = min(shares[name] for name in with_room)
        eligible = [
            name for name in with_room if held[name] and shares[name] <= least + self._slack * held[name] / len(keys)
        ]
        order = {name: _order(name, token_ids, keys) for name in replicas}
        best = min(eligible or with_room, key=lambda name: (-held[name] * bool(eligible), shares[name], order[name]))
        if not any(held.values()):
            choice = Choice.BALANCED
        else:
            choice = Choice.PREFIX if held[best] == max(held.values()) else Choice.OVERLOADED
        replica = replicas[best]
        self._record(keys, 1 << replica.bit)
        replica.pending_tokens += len(token_ids)
        replica.pending_requests += 1
        return Ticket(best, choice, len(token_ids), replica)

    def _num_held(self, keys: Sequence[bytes], replicas: dict[str, _Replica]) -> dict[str, int]:
        """How many pages of the prefix each replica holds."""
        held = dict.fromkeys(replicas, 0)
        left = {name: 1 << replica.bit for name, replica in replicas.items()}
        for key in keys:
            bits = self._holders.get(key, 0)
            left = {name: bit for name, bit in left.items() if bits & bit}
            if not left:
                break
            for name in left:
                held[name] += 1
        return held

    def _record(self, keys: Sequence[bytes], bit: int) -> None:
        # The tail first: a chain whose head is evicted before it cannot be found.
        for key in reversed(keys):
            self._holders[key] = self._holders.get(key, 0) | bit
            self._holders.move_to_end(key)
        while len(self._holders) > self._max_pages:
            self._holders.popitem(last=False)


def page_keys(token_ids: Sequence[int]) -> list[bytes]:
    """Keys of the full pages that a prefix cache may find for this prompt, each over everything before it too."""
    # One token at least is computed, so the page that holds the last one is not looked up.
    num_pages = min((len(token_ids) - 1) // PAGE_SIZE, MAX_PROMPT_PAGES)
    keys: list[bytes] = []
    parent = b""
    for index in range(num_pages):
        parent = hash_page(parent, token_ids[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
        keys.append(parent[:_KEY_BYTES])
    return keys


def _order(replica_id: str, token_ids: Sequence[int], keys: Sequence[bytes]) -> bytes:
    """Rendezvous hashing: prompts that begin alike prefer the same replica, others are spread evenly."""
    start = keys[0] if keys else array("I", token_ids[:PAGE_SIZE]).tobytes()
    return hashlib.blake2b(start, key=hashlib.blake2b(replica_id.encode(), digest_size=32).digest()).digest()
