"""What Prometheus rules are made of, and the YAML file that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# What `runbook_url` starts with: a path of the checkout. Where the runbook has an address, replace it.
RUNBOOK = "deploy/RUNBOOK.md"
_HEADER = "# Made by `make generate` from deploy/prometheus/rules.py: change that."


@dataclass(frozen=True, slots=True)
class Recording:
    """A rule that keeps the value of an expression. name: level:metric:operation.  unit: of the value."""

    name: str
    expr: str
    unit: str


@dataclass(frozen=True, slots=True)
class Alert:
    """Fires while `value` compares as `comparison` says and `guard` holds, once that lasted `lasting`.

    guard: what follows the comparison, from `and` or `unless` on; empty: nothing.  unit: of `value`.
    """

    name: str
    severity: str
    value: str
    comparison: str
    unit: str
    lasting: str
    summary: str
    description: str
    guard: str = ""

    @property
    def expr(self) -> str:
        return f"{self.value} {self.comparison}" + (f"\n{self.guard}" if self.guard else "")


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that run one after the other: a later one sees what an earlier one recorded."""

    name: str
    rules: tuple[Recording | Alert, ...]


def to_yaml(groups: Sequence[Group]) -> str:
    """A rule file. Expressions are blocks, other texts quoted as JSON, which YAML reads too."""
    return "\n".join([_HEADER, "groups:", *(line for group in groups for line in _group(group))]) + "\n"


def _group(group: Group) -> Iterator[str]:
    yield f"  - name: {group.name}"
    yield "    rules:"
    for rule in group.rules:
        yield from _recording(rule) if isinstance(rule, Recording) else _alert(rule)


def _recording(rule: Recording) -> Iterator[str]:
    yield f"      - record: {rule.name}"
    yield from _expr(rule.expr)


def _alert(rule: Alert) -> Iterator[str]:
    yield f"      - alert: {rule.name}"
    yield from _expr(rule.expr)
    yield f"        for: {rule.lasting}"
    yield "        labels:"
    yield f"          severity: {rule.severity}"
    yield "        annotations:"
    yield f"          summary: {json.dumps(rule.summary)}"
    yield f"          description: {json.dumps(rule.description)}"
    yield f"          runbook_url: {json.dumps(f'{RUNBOOK}#{rule.name.lower()}')}"


def _expr(expr: str) -> Iterator[str]:
    yield "        expr: |-"
    for line in expr.splitlines():
        yield f"          {line}"
