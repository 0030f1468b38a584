"""The audit's guard: while reused selections overlap too little with fresh ones, every sparse layer selects for itself.

It sees what rank 0 reports of each audit, in the order of the steps, and nothing else: no clock, no randomness. Its
decision leaves with every StepPlan, so that the ranks of a group change over at the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.config import EngineConfig
from engine.types import LayerOverlap, StepPlan

log = logging.getLogger(__name__)


def fallback_plan(config: EngineConfig, plan: str) -> str | None:
    """The letters of `plan` with every S an F; None where the guard is off or no layer reuses."""
    return plan.replace("S", "F") if config.audit_overlap_floor is not None and "S" in plan else None


def mean_overlap(overlaps: Sequence[LayerOverlap]) -> float | None:
    """Of one audit, over every (layer, token, index head) that had a choice; None when none had."""
    count = sum(each.count for each in overlaps)
    return sum(each.overlap_sum for each in overlaps) / count if count else None


class IndexGuard:
    """Two states: the plan runs, or (`active`) its fallback does.

    Trips when `trip_after` audits in a row are below `floor`; audits without a choice are no evidence and leave the
    row as it is. Recovers when `recover_after` audits in a row are at `floor + margin` or above; there an audit without
    a choice counts as 1, since sharing is exact for such steps. Audits of steps that were planned in the other state
    do not count.

    plan, fallback: one letter per layer.
    """

    def __init__(
        self, plan: str, fallback: str, *, floor: float, margin: float, trip_after: int, recover_after: int
    ) -> None:
        self._plan, self._fallback = plan, fallback
        self._floor = floor
        self._margin = margin
        self._trip_after = trip_after
        self._recover_after = recover_after
        self._row: list[float] = []  # the audits that speak for a change, in a row
        self.active = False
        self.num_trips = 0

    @classmethod
    def of(cls, config: EngineConfig, plan: str) -> IndexGuard | None:
        """The guard that the settings ask for, if they do and some layer reuses."""
        fallback = fallback_plan(config, plan)
        if fallback is None or config.audit_overlap_floor is None:
            return None
        return cls(
            plan,
            fallback,
            floor=config.audit_overlap_floor,
            margin=config.audit_overlap_margin,
            trip_after=config.audit_trip_after,
            recover_after=config.audit_recover_after,
        )

    @property
    def plan(self) -> str:
        """The letters by which the next step runs."""
        return self._fallback if self.active else self._plan

    def observe(self, step: StepPlan, overlaps: Sequence[LayerOverlap]) -> bool:
        """Take in the result of a step; whether the plan of the next one changes."""
        if not step.audit or step.fallback != self.active:
            return False
        mean = mean_overlap(overlaps)
        if self.active:
            mean = 1.0 if mean is None else mean
            return self._count(mean, speaks=mean >= self._floor + self._margin, needed=self._recover_after, step=step)
        return mean is not None and self._count(mean, speaks=mean < self._floor, needed=self._trip_after, step=step)

    def _count(self, mean: float, *, speaks: bool, needed: int, step: StepPlan) -> bool:
        if not speaks:
            self._row.clear()
            return False
        self._row.append(mean)
        if len(self._row) < needed:
            return False
        shown = ", ".join(f"{each:.3f}" for each in self._row)
        self._row.clear()
        self.active = not self.active
        if self.active:
            self.num_trips += 1
            log.warning(
                "index guard tripped at step %d: overlap %s, below audit_overlap_floor=%g in %d audits in a row; "
                "every sparse layer selects for itself now: plan %s in place of %s",
                step.step_id, shown, self._floor, needed, self.plan, self._plan,
            )  # fmt: skip
        else:
            log.warning(
                "index guard recovered at step %d: overlap %s, at or above %g (audit_overlap_floor + "
                "audit_overlap_margin) in %d audits in a row; plan %s again",
                step.step_id, shown, self._floor + self._margin, needed, self.plan,
            )  # fmt: skip
        return True
