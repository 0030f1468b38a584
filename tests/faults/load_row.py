"""What a service did under more load than it can take, as a row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.open_loop import Outcome, percentile


@dataclass(slots=True)
class LoadRow:
    """One load against one service.

    capacity: requests a second of a closed loop.  offered, accepted, refused: requests.  broken: accepted, not whole.
    refused_*_ms: from the time a request was due to its 429.  ttft_*_ms, itl_*_ms: of accepted ones, time to the first
    token and between two, those sent in the first and in the second half.  health_*_ms: GET /health meanwhile, which no
    engine sees.  rss_mb: growth of every process in the second half.  pages, requests, tasks: left over once it
    was idle again.
    """

    load: str
    service: str
    seconds: float = 0.0
    capacity: float = 0.0
    offered: int = 0
    accepted: int = 0
    refused: int = 0
    broken: int = 0
    refused_p50_ms: float = 0.0
    refused_p99_ms: float = 0.0
    ttft_p50_ms: str = ""
    ttft_p99_ms: str = ""
    itl_p50_ms: str = ""
    itl_p99_ms: str = ""
    health_p50_ms: float = 0.0
    health_p99_ms: float = 0.0
    rss_mb: str = ""
    pages: int = 0
    requests: int = 0
    tasks: int = 0
    outcome: str = "unfinished"

    def enter(self, outcomes: Sequence[Outcome], *, seconds: float) -> None:
        """Count and time what the clients saw."""
        accepted = [outcome for outcome in outcomes if outcome.status == 200]
        refused = [outcome for outcome in outcomes if outcome.status == 429]
        self.seconds, self.offered = seconds, len(outcomes)
        self.accepted, self.refused = len(accepted), len(refused)
        whole = [outcome for outcome in accepted if outcome.is_whole and outcome.num_tokens == outcome.wanted_tokens]
        self.broken = len(accepted) - len(whole)
        waits_s = [outcome.answered_s - outcome.sent_s for outcome in refused]
        self.refused_p50_ms, self.refused_p99_ms = (1000 * percentile(waits_s, share) for share in (0.5, 0.99))
        middle_s = outcomes[0].sent_s + seconds / 2
        halves = [[o for o in whole if (o.sent_s >= middle_s) == later] for later in (False, True)]
        firsts_s = [[outcome.ttft_s for outcome in half] for half in halves]
        pauses_s = [[pause_s for outcome in half for pause_s in outcome.pauses_s] for half in halves]
        self.ttft_p50_ms, self.ttft_p99_ms = _both(firsts_s, 0.5), _both(firsts_s, 0.99)
        self.itl_p50_ms, self.itl_p99_ms = _both(pauses_s, 0.5), _both(pauses_s, 0.99)


def _both(halves_s: Sequence[Sequence[float]], share: float) -> str:
    return " / ".join(f"{1000 * percentile(half, share):.0f}" for half in halves_s)
