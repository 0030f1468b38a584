"""Groups the requests that leave together by the replica that each is to go to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.autoscaling import idle_load
from service.messages import Description, Load
from service.model_identity import model_identity
from service.routing import RoutingTable, Ticket, page_keys
from service.running_replicas import running
from service.series import IngressSeries
from service.settings import ServiceSettings
from service.token_stream import TokenStream

# Of a replica that has not spoken yet, only the limits of its settings are known.
UNKNOWN_KV_TOKENS = 2**62


@dataclass(slots=True)
class Departure:
    """Streams for one submit.

    target: the replica to name to Serve; None: Serve chooses.  identity: under which the streams began; None: they have
    no tokens yet.
    """

    target: str | None
    identity: str | None
    streams: list[TokenStream] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def attempt_ids(self) -> list[str]:
        """Of the streams."""
        return [stream.attempt_id for stream in self.streams]


class ReplicaChooser:
    """The routing table of an ingress, kept up to date. All calls on its event loop.

    handle: a Serve DeploymentHandle whose router is a TargetRouter.
    """

    def __init__(self, settings: ServiceSettings, series: IngressSeries, handle: Any) -> None:
        self.model = model_identity(settings)
        self._series = series
        self._handle = handle
        self._num_asked = 0
        self._by_prefix = settings.prefix_routing
        self._num_keys = None if settings.enable_prefix_caching else 0
        self._table = RoutingTable(
            self.model, idle_load(settings, "", UNKNOWN_KV_TOKENS), slack=settings.prefix_routing_slack
        )

    def heard(self, load: Load | None) -> None:
        """A replica told what it has to do."""
        if load is not None:
            self._table.heard_load(load)

    def described(self, description: Description) -> bool:
        """A replica told what it runs; whether it may serve this ingress."""
        self._table.update(running(self._handle))
        self._table.heard_identity(description.replica_id, description.model, description.identity)
        return description.model == self.model

    def full(self) -> list[Load]:
        """What the replicas that may serve this ingress have told, when by that none of them takes one more request."""
        self._table.update(running(self._handle))
        return self._table.full(self._table.fits())

    def candidate(self) -> str | None:
        """A replica that may serve this ingress, each in turn; None when all may, or none is known."""
        replica_ids = running(self._handle)
        self._table.update(replica_ids)
        fits = self._table.fits()
        if not fits or len(fits) == len(replica_ids):
            return None
        self._num_asked += 1
        return fits[self._num_asked % len(fits)]

    def assign(self, streams: Sequence[TokenStream]) -> tuple[list[Departure], list[TokenStream]]:
        """Which streams leave together, and those that no replica that runs may take."""
        self._table.update(running(self._handle))
        departures: dict[tuple[str | None, str | None], Departure] = {}
        unfit: list[TokenStream] = []
        keys: dict[int, list[bytes]] = {}
        for stream in streams:
            identity = stream.identity if stream.token_ids else None
            fits = self._table.fits(identity)
            if not fits and self._table.has_replicas:
                unfit.append(stream)
                continue
            ticket = self._ticket(stream, fits, keys)
            target = None if ticket is None else ticket.replica_id
            departure = departures.setdefault((target, identity), Departure(target, identity))
            departure.streams.append(stream)
            if ticket is not None:
                departure.tickets.append(ticket)
        return list(departures.values()), unfit

    def _ticket(self, stream: TokenStream, fits: list[str], known: dict[int, list[bytes]]) -> Ticket | None:
        if not self._by_prefix:
            return None
        prompt = stream.request.prompt_token_ids
        token_ids = [*prompt, *stream.token_ids] if stream.token_ids else prompt
        keys = page_keys(token_ids) if stream.token_ids else known.get(id(prompt))
        if keys is None:
            # Choices of one request share their prompt.
            keys = known[id(prompt)] = page_keys(prompt)
        ticket = self._table.choose(token_ids, keys[: self._num_keys], fits)
        if ticket is not None:
            self._series.count_routed(ticket.choice)
        return ticket
