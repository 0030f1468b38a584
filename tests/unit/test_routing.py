"""The rule by which an ingress chooses engine replicas, without any: loads and prompts in, replicas out."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import pytest

from engine.config import PAGE_SIZE
from engine.pages import hash_page
from service.messages import Load
from service.routing import MAX_PROMPT_PAGES, PAGE_BYTES, Choice, RoutingTable, Ticket, page_keys

MODEL = "model"
SLACK = 0.25


def load(replica_id: str, tokens: int = 0, requests: int = 0) -> Load:
    return Load(replica_id, tokens, requests, full_tokens=10_000, full_requests=8, max_requests=12)


def table(*replica_ids: str, slack: float = SLACK, max_pages: int = 1000) -> RoutingTable:
    made = RoutingTable(MODEL, load(""), slack=slack, max_pages=max_pages)
    made.update(replica_ids)
    return made


def choose(routing: RoutingTable, token_ids: Sequence[int]) -> Ticket:
    ticket = routing.choose(token_ids, page_keys(token_ids), routing.fits())
    assert ticket is not None
    return ticket


def prompt(start: int, num_pages: float = 3) -> list[int]:
    return [(start * 1000 + i) % 50_000 for i in range(int(num_pages * PAGE_SIZE))]


def test_keys_are_those_of_the_prefix_cache_but_for_its_root() -> None:
    tokens = prompt(1, 2.5)
    first = hash_page(b"", tokens[:PAGE_SIZE])
    assert page_keys(tokens) == [first[:16], hash_page(first, tokens[PAGE_SIZE : 2 * PAGE_SIZE])[:16]]
    assert len(page_keys(prompt(1, 2))) == 1, "the last token is always computed, and its page with it"
    assert page_keys([1]) == []
    assert len(page_keys([1] * (MAX_PROMPT_PAGES + 9) * PAGE_SIZE)) == MAX_PROMPT_PAGES


def test_a_shared_prefix_goes_where_it_is_held() -> None:
    routing = table("a", "b", "c")
    first = choose(routing, prompt(1))
    assert first.choice is Choice.BALANCED
    first.close()
    for question in range(20):
        ticket = choose(routing, prompt(1, 2) + prompt(100 + question, 1.5))
        assert (ticket.replica_id, ticket.choice) == (first.replica_id, Choice.PREFIX)
        ticket.close()


def test_the_longest_prefix_wins() -> None:
    routing = table("a", "b")
    short = choose(routing, prompt(1, 1.5))
    other = "b" if short.replica_id == "a" else "a"
    routing.heard_load(load(short.replica_id, requests=8))
    long = choose(routing, prompt(1, 4))
    assert (long.replica_id, long.choice) == (other, Choice.OVERLOADED)
    for each in (short, long):
        each.close()
    routing.heard_load(load(short.replica_id))
    assert choose(routing, prompt(1, 4)).replica_id == other


@pytest.mark.parametrize("busy", [load("a", tokens=2_501), load("a", requests=3)])
def test_an_overloaded_holder_is_passed_over(busy: Load) -> None:
    routing = table("a")
    choose(routing, prompt(1)).close()
    routing.update(["a", "b"])
    assert choose(routing, prompt(1)).replica_id == "a"
    routing = table("a")
    choose(routing, prompt(1)).close()
    routing.update(["a", "b"])
    routing.heard_load(busy)
    ticket = choose(routing, prompt(1))
    assert (ticket.replica_id, ticket.choice) == ("b", Choice.OVERLOADED)
    ticket.close()
    # Both hold it now: the least loaded of them.
    assert choose(routing, prompt(1)).replica_id == "b"


@pytest.mark.parametrize(("num_held", "choice"), [(10, Choice.PREFIX), (5, Choice.PREFIX), (4, Choice.OVERLOADED)])
def test_a_small_part_of_the_prefix_is_worth_less_imbalance(num_held: int, choice: Choice) -> None:
    routing = table("a")
    whole = prompt(1, 10.5)
    choose(routing, [*whole[: num_held * PAGE_SIZE], 5]).close()
    routing.update(["a", "b"])
    routing.heard_load(load("a", requests=1))
    assert choose(routing, whole).choice is choice


def test_what_is_on_its_way_counts_until_a_replica_reports_it() -> None:
    routing = table("a", "b")
    tickets = [choose(routing, [number, 2, 3]) for number in range(8)]
    assert Counter(ticket.replica_id for ticket in tickets) == {"a": 4, "b": 4}
    for ticket in tickets:
        ticket.close()
        ticket.close()
    routing.heard_load(load("a", requests=4))
    assert {choose(routing, [number, 2, 3]).replica_id for number in range(4)} == {"b"}


def test_a_full_queue_is_avoided_while_another_has_room() -> None:
    routing = table("a", "b", slack=100.0)
    holder = choose(routing, prompt(1))
    holder.close()
    other = "b" if holder.replica_id == "a" else "a"
    routing.heard_load(load(holder.replica_id, requests=12))
    assert choose(routing, prompt(1)).replica_id == other
    routing.heard_load(load(other, requests=20))
    assert choose(routing, prompt(1)).replica_id == holder.replica_id, "all are full: the least loaded"


def test_full_when_none_has_room() -> None:
    routing = table("a", "b")
    assert routing.full(["a", "b"]) == [], "what has not spoken is idle"
    routing.heard_load(load("a", requests=12))
    assert routing.full(["a", "b"]) == routing.full([]) == routing.full(["a", "gone"]) == []
    routing.heard_load(load("b", requests=13))
    assert routing.full(["a", "b"]) == [load("a", requests=12), load("b", requests=13)]
    routing.heard_load(load("b", requests=11))
    assert routing.full(["a", "b"]) == []
    ticket = routing.choose([1], [], ["b"])
    assert ticket is not None and routing.full(["a", "b"]), "the last place is taken"
    ticket.close()
    assert routing.full(["a", "b"]) == []


def test_ingresses_agree_without_talking_to_each_other() -> None:
    one, two = table("a", "b", "c"), table("c", "a", "b")
    chosen = []
    for number in range(60):
        tickets = [choose(routing, prompt(number)) for routing in (one, two)]
        assert tickets[0].replica_id == tickets[1].replica_id
        chosen.append(tickets[0].replica_id)
        for ticket in tickets:
            ticket.close()
    assert min(Counter(chosen).values()) > 8, "new prefixes are spread over idle replicas"


def test_only_replicas_of_the_same_model_and_identity_fit() -> None:
    routing = table("old", "new", "silent")
    routing.heard_identity("old", MODEL, "plan 1")
    routing.heard_identity("new", MODEL, "plan 2")
    assert routing.fits() == ["new", "old", "silent"]
    assert routing.fits("plan 1") == ["old", "silent"]
    routing.heard_identity("silent", "another model", "plan 1")
    assert routing.fits() == ["new", "old"]
    assert routing.fits("plan 3") == []
    assert routing.choose([1], [], []) is None and routing.has_replicas
    routing.heard_load(load("unknown"))
    routing.heard_identity("unknown", MODEL, "plan 1")
    assert routing.fits("plan 1") == ["old"]


def test_what_a_lost_replica_held_is_forgotten() -> None:
    routing = table("a")
    choose(routing, prompt(1)).close()
    assert routing.num_pages == 2
    routing.update([])
    assert routing.num_pages == 0 and not routing.has_replicas
    routing.update(["b", "c"])
    assert choose(routing, prompt(1)).choice is Choice.BALANCED


def test_the_table_is_bounded_and_forgets_the_oldest_tails() -> None:
    routing = table("a", "b", max_pages=6)
    for number in range(50):
        choose(routing, prompt(number, 4.5)).close()
    assert routing.num_pages == 6
    held = choose(routing, prompt(48, 4.5))
    assert held.choice is Choice.PREFIX, "of the last prompt but one the head is left"


def test_the_table_takes_no_more_bytes_than_it_says() -> None:
    num_pages = 50_000
    routing = table("a", "b", max_pages=num_pages)
    tracemalloc.start()
    for number in range(num_pages // 400 + 40):
        keys = [(number * 400 + i).to_bytes(16, "big") for i in range(400)]
        ticket = routing.choose([number], keys, routing.fits())
        assert ticket is not None
        ticket.close()
    keys.clear()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert routing.num_pages == num_pages
    assert taken < num_pages * PAGE_BYTES


def test_skewed_load_does_not_pile_up() -> None:
    """Nine of ten requests share one prefix, and each takes its time: none goes where there is more than the slack."""
    chance = random.Random(1)
    routing = table("a", "b", "c")
    running: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    chosen: Counter[str] = Counter()
    for step in range(600):
        common = prompt(1, 2) if chance.random() < 0.9 else prompt(chance.randrange(2, 40), 2)
        ticket = choose(routing, [*common, *prompt(1000 + step, 0.5)])
        counts = {name: len(ends) for name, ends in running.items()}
        assert counts[ticket.replica_id] <= min(counts.values()) + SLACK * 8
        running[ticket.replica_id].append(step + 12)
        chosen[ticket.replica_id] += 1
        ticket.close()
        for name, ends in running.items():
            ends[:] = [end for end in ends if end > step]
            routing.heard_load(load(name, tokens=300 * len(ends), requests=len(ends)))
    assert min(chosen.values()) > 600 / 6
