"""Make data: quads, pairs and rows for SFT, and the programs that check, show and export them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

BLOCK_ROWS = 2000
T = TypeVar("T")
R = TypeVar("R")


def require(recipe: Any, name: str, ok: bool, expected: str) -> None:
    """Raise ValueError with the key, its value and what is expected, unless ok."""
    if not ok:
        raise ValueError(f"recipe.{name} is {getattr(recipe, name)!r}; expected {expected}")


def in_blocks(
    work: Callable[[int, list[T]], R], items: Iterable[T], *, first: int = 0, here: bool = False
) -> Iterator[R]:
    """work(number, block) for each block of items, in order, whatever the number of cores.

    first: the number of the first block. here: in this process; one block alone always is. A few
    blocks a core are held at once. work: a function of a module, or a partial of one.
    """
    left = iter(items)
    blocks = enumerate(iter(lambda: list(islice(left, BLOCK_ROWS)), []), first)
    head = list(islice(blocks, 2))
    cores = len(os.sched_getaffinity(0))
    if here or cores == 1 or len(head) < 2:
        for number, block in chain(head, blocks):
            yield work(number, block)
        return
    # spawn, not fork: libraries of this process (Parquet's, the hub's) run threads
    pool = ProcessPoolExecutor(cores, mp_context=get_context("spawn"))
    try:
        waiting: deque[Future[R]] = deque()
        for number, block in chain(head, blocks):
            waiting.append(pool.submit(work, number, block))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
