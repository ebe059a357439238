"""Work of another thread beside this one: reading and hashing beside encoding, writing beside the next encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Each item with `function` of it, in their order, where another thread works on the next one meanwhile.

    At most two results exist that were not asked for. `items` is iterated by the caller's thread. What `function`
    raises is raised in the item's place; whoever stops early waits for the one that is under way.
    """
    with ThreadPoolExecutor(1) as pool:
        before: tuple[Item, Future[Result]] | None = None
        for item in items:
            under_way = item, pool.submit(function, item)
            if before is not None:
                yield before[0], before[1].result()
            before = under_way
        if before is not None:
            yield before[0], before[1].result()
