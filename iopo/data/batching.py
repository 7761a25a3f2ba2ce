"""Which examples make which step, rank and micro-batch: pure functions of (seed, epoch, step).

An epoch is one random order of all examples, cut into steps of `global_batch_quads`; its last step
holds the rest. The loss is divided by the number of quads that a step really holds. Which ones it
holds depends on neither ranks, layout nor packing, so the position of a run is one integer.

Within a step the quads go to the ranks longest first, each to the rank with the fewest tokens so
far (LPT), and then into micro-batches of whole quads. All ranks have the same number of
micro-batches, because their forward and backward passes are collective: a rank with too few quads
gets None for the missing ones, and must run them with a gradient of zero.

"Quad" stands for example throughout: pairs and sft rows are batched in the same way.
Letters: N examples of the data set.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from iopo.data.example import Example
from iopo.data.token_cache import Examples

DATA_ORDER = 0x0D0E  # name of this stream of random numbers, beside the seed
WINDOW_QUADS = 1024  # quads that a pass over the data set shares out at once

MicroBatch = tuple[int, ...] | None


@dataclass(frozen=True)
class Batching:
    """How examples become steps and micro-batches.

    Exactly one of micro_batch_quads (quads per forward and rank) and tokens_per_microbatch (most
    tokens that a forward processes in the layout, "shared" or "plain") is given. A quad longer than
    the token budget runs alone. seed: of the data order only.
    Raises ValueError for ranks that do not divide global_batch_quads.
    """

    global_batch_quads: int
    ranks: int
    seed: int
    layout: str = "shared"
    micro_batch_quads: int | None = None
    tokens_per_microbatch: int | None = None

    def __post_init__(self) -> None:
        assert (self.micro_batch_quads is None) != (self.tokens_per_microbatch is None)
        if self.global_batch_quads % self.ranks:
            below = self.global_batch_quads // self.ranks * self.ranks
            near = [str(n) for n in (below, below + self.ranks) if n]
            raise ValueError(
                f"global_batch_quads is {self.global_batch_quads}, which {self.ranks} ranks do not "
                f"divide: set it to {' or '.join(near)}, or change the number of processes"
            )


def tokens(example: Example, layout: str) -> int:
    """Tokens that the example costs alone: shared sum(P) + sum(R), that is 2P + 4R of a quad;
    plain members times the longest member."""
    if layout == "plain":
        members = member_tokens(example)
        return len(members) * max(members)
    assert layout == "shared", layout
    return sum(map(len, example.prompts)) + sum(len(y) for ys in example.responses for y in ys)


def member_tokens(example: Example) -> list[int]:
    """Tokens of each member alone: its response and its own copy of the prompt."""
    return [len(prompt) + len(response) for prompt, response in example.members()]


def token_counts(examples: Sequence[Example], layout: str) -> np.ndarray:
    """`tokens` of each example, int64 [N]."""
    if layout == "plain":
        prompts_NM, responses_NM = member_counts(examples)
        return prompts_NM.shape[1] * (prompts_NM + responses_NM).max(1)
    assert layout == "shared", layout
    return part_counts(examples).sum(1)


def member_counts(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompt and of the response of each member, int64 [N, M] each."""
    lengths_NK, starts = _lengths(examples)
    of_prompt = [len(responses) for responses in examples[0].responses]
    prompts_NM = np.repeat(lengths_NK[:, starts], of_prompt, axis=1)
    return prompts_NM, np.delete(lengths_NK, starts, axis=1)


def part_counts(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each prompt and its responses together, int64 [N, prompts]."""
    lengths_NK, starts = _lengths(examples)
    return np.add.reduceat(lengths_NK, starts, axis=1)


def _lengths(examples: Sequence[Example]) -> tuple[np.ndarray, list[int]]:
    """Tokens of the segments of each example, int64 [N, K], and the columns of the prompts. All
    examples are of one kind."""
    if isinstance(examples, Examples):
        lengths_NK = examples.lengths()
    else:
        found = [[*map(len, example.segments())] for example in examples]
        lengths_NK = np.array(found, dtype=np.int64)
    *starts, _ = accumulate((1 + len(ys) for ys in examples[0].responses), initial=0)
    return lengths_NK, starts


def microbatch_tokens(tokens_N: np.ndarray, members: Sequence[int], layout: str) -> int:
    """Tokens that a micro-batch of the examples `members` processes (plain: padding included)."""
    costs = tokens_N[list(members)]
    return int(costs.max()) * len(costs) if layout == "plain" else int(costs.sum())


def plan_steps(quads: int, batching: Batching, epochs: int, max_steps: int | None = None) -> int:
    """Steps of a run of `epochs` passes over `quads` examples, at most max_steps."""
    steps = -(-quads // batching.global_batch_quads) * epochs
    return steps if max_steps is None else min(steps, max_steps)


@lru_cache(maxsize=2)
def order_of_epoch(quads: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all examples in this epoch: a permutation, int64 [N]."""
    return np.random.default_rng([seed, DATA_ORDER, epoch]).permutation(quads)


def quads_of_step(quads: int, batching: Batching, step: int) -> np.ndarray:
    """Indices of the examples of `step` (from 0, counted over all epochs), int64."""
    per_epoch = -(-quads // batching.global_batch_quads)
    epoch, within = divmod(step, per_epoch)
    start = within * batching.global_batch_quads
    return order_of_epoch(quads, batching.seed, epoch)[start : start + batching.global_batch_quads]


def micro_batches(tokens_N: np.ndarray, batching: Batching, step: int) -> list[list[MicroBatch]]:
    """What each rank processes in `step`: indices into the data set per micro-batch, longest quads
    first. None is a micro-batch of other ranks in which this one has nothing."""
    return _shared_out(tokens_N, quads_of_step(len(tokens_N), batching, step), batching)


def pass_micro_batches(tokens_N: np.ndarray, batching: Batching, rank: int) -> list[MicroBatch]:
    """What `rank` processes in one pass over the data set in file order, every example once over
    all ranks: for evaluation and for filling a cache. Knows no steps and no seed."""
    result: list[MicroBatch] = []
    for start in range(0, len(tokens_N), WINDOW_QUADS):
        window = np.arange(start, min(start + WINDOW_QUADS, len(tokens_N)))
        result += _shared_out(tokens_N, window, batching)[rank]
    return result


def _shared_out(
    tokens_N: np.ndarray, quads: np.ndarray, batching: Batching
) -> list[list[MicroBatch]]:
    """Micro-batches of every rank, equally many."""
    order, layout = _longest_first(tokens_N, quads), batching.layout
    size, budget = batching.micro_batch_quads, batching.tokens_per_microbatch
    # quads per rank: equal counts make equally many micro-batches of `size`
    capacity = len(quads) if size is None else -(-len(quads) // batching.ranks)
    shares = _balanced(tokens_N, order, batching.ranks, capacity)
    if size is not None:
        per_rank = [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
    else:
        assert budget is not None
        per_rank = [first_fit(tokens_N, share, budget, layout) for share in shares]
        most = max(map(len, per_rank))
        per_rank = [_into(tokens_N, bins, most, budget, layout) for bins in per_rank]
    count = max(map(len, per_rank))
    return [[*map(tuple, bins), *[None] * (count - len(bins))] for bins in per_rank]


def _longest_first(tokens_N: np.ndarray, quads: Iterable[int]) -> list[int]:
    """By length, ties by index, so that the result does not depend on the order given."""
    return sorted(map(int, quads), key=lambda quad: (-tokens_N[quad], quad))


def _balanced(
    tokens_N: np.ndarray, longest_first: Sequence[int], bins: int, capacity: int
) -> list[list[int]]:
    """LPT: each quad into the bin with the fewest tokens among those with fewer than `capacity`."""
    shares: list[list[int]] = [[] for _ in range(bins)]
    load = [0] * bins
    for quad in longest_first:
        free = [number for number in range(bins) if len(shares[number]) < capacity]
        lightest = min(free, key=lambda number: (load[number], number))
        shares[lightest].append(quad)
        load[lightest] += int(tokens_N[quad])
    return shares


def first_fit(
    tokens_N: np.ndarray, longest_first: Sequence[int], budget: int, layout: str
) -> list[list[int]]:
    """First-fit decreasing: each quad into the first micro-batch it fits in. A quad above the
    budget gets one of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for quad in longest_first:
        cost = int(tokens_N[quad])
        for number, free in enumerate(room):
            # plain: the first quad of a micro-batch is its longest and sets the width of all rows
            needed = int(tokens_N[bins[number][0]]) if layout == "plain" else cost
            if needed <= free:
                bins[number].append(quad)
                room[number] -= needed
                break
        else:
            bins.append([quad])
            room.append(budget - cost)
    return bins


def _into(
    tokens_N: np.ndarray, bins: list[list[int]], count: int, budget: int, layout: str
) -> list[list[int]]:
    """The quads of `bins` in `count` micro-batches, or in as many as there are quads.

    Micro-batches of equal size keep the ranks together and need the least memory, so they are
    balanced where the budget allows it. In the plain layout that would add padding; there, and
    where balancing overflows the budget, the largest ones are halved.
    """
    quads = _longest_first(tokens_N, [quad for members in bins for quad in members])
    count = min(count, len(quads))
    if layout != "plain":
        even = _balanced(tokens_N, quads, count, len(quads))
        if all(len(m) == 1 or microbatch_tokens(tokens_N, m, layout) <= budget for m in even):
            return even
    bins = list(bins)
    while len(bins) < count:
        splittable = [members for members in bins if len(members) > 1]
        largest = max(splittable, key=lambda m: microbatch_tokens(tokens_N, m, layout))
        half = len(largest) // 2
        bins[bins.index(largest)] = largest[:half]
        bins.append(largest[half:])
    return bins
