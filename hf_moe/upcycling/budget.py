"""Numbers a token, dealt out over the layers: each goes where it lowers the damage most.

Letters: P rotary width, C latent width.
"""

import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to build a layer: cached numbers a token, rotary pairs and latent width; and the damage predicted."""

    numbers: int
    pairs: int
    latent: int
    damage: float


def frontier(candidates: list[Candidate]) -> list[Candidate]:
    """Those on the lower convex hull of damage over numbers, smallest first."""
    best: dict[int, Candidate] = {}
    for candidate in candidates:
        if candidate.numbers not in best or candidate.damage < best[candidate.numbers].damage:
            best[candidate.numbers] = candidate
    hull: list[Candidate] = []
    for _, point in sorted(best.items()):
        if hull and point.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(first: Candidate, second: Candidate) -> float:
    return (second.damage - first.damage) / (second.numbers - first.numbers)


def allocate(layers: list[list[Candidate]], total: int) -> list[Candidate]:
    """One candidate for each layer, at most `total` numbers in all: steps along the frontiers, steepest first.

    Args:
        layers: any candidates of each layer, with damages in one unit.
    Raises:
        ValueError: the smallest candidates are above the total.
    Source: greedy choice on convex hulls, as in the rate allocation of image coders.
    """
    hulls = [frontier(candidates) for candidates in layers]
    at = [0] * len(hulls)
    used = sum(hull[0].numbers for hull in hulls)
    if used > total:
        raise ValueError(f"{total} numbers a token for all layers are below {used}, the least that can be built")
    steps = [(_slope(hull[0], hull[1]), layer) for layer, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, layer = heapq.heappop(steps)
        hull, i = hulls[layer], at[layer]
        if used + hull[i + 1].numbers - hull[i].numbers > total:
            continue
        used += hull[i + 1].numbers - hull[i].numbers
        at[layer] = i + 1
        if i + 2 < len(hull):
            heapq.heappush(steps, (_slope(hull[i + 1], hull[i + 2]), layer))
    chosen = [hull[i] for hull, i in zip(hulls, at, strict=True)]
    return _fill(chosen, layers, total - used)


def _fill(chosen: list[Candidate], layers: list[list[Candidate]], spare: int) -> list[Candidate]:
    """Spend what a step was too large for: a little more latent where it helps most."""
    for layer in sorted(range(len(chosen)), key=lambda layer: -chosen[layer].damage):
        more = [c for c in layers[layer] if 0 <= c.numbers - chosen[layer].numbers <= spare]
        best = min(more, key=lambda c: c.damage, default=chosen[layer])
        if best.damage < chosen[layer].damage:
            spare -= best.numbers - chosen[layer].numbers
            chosen[layer] = best
    return chosen


def uniform(layers: list[list[Candidate]], numbers: int) -> list[Candidate]:
    """The pairs and latent numbers, the same in every layer and at most `numbers`, with the least damage in sum."""
    tables = [{(c.pairs, c.latent): c for c in candidates} for candidates in layers]
    shapes = [shape for shape, c in tables[0].items() if c.numbers <= numbers and all(shape in t for t in tables)]
    if not shapes:
        least = min(c.numbers for c in layers[0])
        raise ValueError(f"{numbers} numbers a token and layer are below {least}, the least that can be built")
    best = min(shapes, key=lambda shape: sum(table[shape].damage for table in tables))
    return [table[best] for table in tables]
