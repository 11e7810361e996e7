"""The collector after start-up: what stays is not looked at again, what is garbage by then is gone."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from tx.utils.garbage import collect_seldom


class Node:
    """An object that can be part of a cycle."""

    def __init__(self) -> None:
        self.other: Node | None = None


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """The collector of the test process is as before."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def a_cycle() -> weakref.ref[Node]:
    first, second = Node(), Node()
    first.other, second.other = second, first
    return weakref.ref(first)


def test_a_full_collection_no_longer_looks_at_what_was_there():
    stays = [Node() for _ in range(10_000)]
    collect_seldom()
    assert not any(isinstance(held, Node) for held in gc.get_objects())
    assert gc.get_freeze_count() >= len(stays)


def test_garbage_goes_before_and_afterwards():
    before = a_cycle()
    collect_seldom()
    assert before() is None
    after = a_cycle()
    gc.collect()
    assert after() is None


def test_collections_are_rarer():
    usual = gc.get_threshold()
    collect_seldom()
    assert all(now > then for now, then in zip(gc.get_threshold(), usual, strict=True))
