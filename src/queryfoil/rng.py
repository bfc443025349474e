"""Random draws as a pure function of (seed, image id, step, draw): no stream, no global generator.

Chunking, sharding, resuming and dropping finished rows therefore cannot change a draw. The bits come
from an integer hash (the finalizer of splitmix64; Steele, Lea and Flood, 2014), computed for all rows
at once and the same on every device. `step` and `draw` only name the draw: an attack uses its
iteration and a number of its own for each thing it draws.
"""

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed 64-bit integer
_DEFENSE = 1 << 40  # draws of defenses start here, far from those of attacks


def _mix(h: Tensor) -> Tensor:
    """Scramble 64-bit integers, one to one: every bit of the input reaches every bit of the output."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        h = (h ^ ((h >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return h ^ ((h >> 31) & ((1 << 33) - 1))


def bits(seed: int, ids: Tensor, step: int | Tensor, draw: int, size: int = 1) -> Tensor:
    """64 random bits, (N, size) int64, for each id of (N,) int64; `step` is one number or (N,).

    >>> a = bits(0, torch.tensor([3, 4]), step=7, draw=0, size=2)
    >>> torch.equal(a[1:], bits(0, torch.tensor([4]), step=7, draw=0, size=2))
    True
    """
    h = _mix(ids + _GOLDEN)
    for word in (seed, step, draw):
        h = _mix((h ^ word) + _GOLDEN)
    return _mix(h[:, None] + torch.arange(1, size + 1, device=ids.device) * _GOLDEN)


def uniform(seed: int, ids: Tensor, step: int | Tensor, draw: int, size: int = 1) -> Tensor:
    """Uniform in [0, 1): (N, size) float64 with 53 random bits."""
    return ((bits(seed, ids, step, draw, size) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def integers(seed: int, ids: Tensor, step: int | Tensor, draw: int, high: int, size: int = 1) -> Tensor:
    """Uniform integers in 0..high-1: (N, size) int64."""
    return (uniform(seed, ids, step, draw, size) * high).long()


def signs(seed: int, ids: Tensor, step: int | Tensor, draw: int, size: int = 1) -> Tensor:
    """-1 or +1 with equal probability: (N, size) float32."""
    return (bits(seed, ids, step, draw, size) >> 63).float() * 2 + 1


def normal(seed: int, ids: Tensor, step: int | Tensor, draw: int, size: int = 1) -> Tensor:
    """Standard normal: (N, size) float32, two from each 64 bits (Box and Muller, 1958)."""
    h = bits(seed, ids, step, draw, (size + 1) // 2)
    radius = (((h >> 32) & 0xFFFFFFFF).float() + 1).mul_(2.0**-32).log_().mul_(-2).clamp_min_(0).sqrt_()
    angle = (h & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :size]


def permuted(seed: int, ids: Tensor, step: int | Tensor, draw: int, index: Tensor, size: int) -> Tensor:
    """The number at place `index` (N,) of a random order of 0..size-1, which each (seed, id, step, draw) has.

    A Feistel network on a rectangle that holds 0..size-1, walked until it comes back into these (Black and
    Rogaway, 2002): no order is ever held in memory. (N,) int64.

    >>> places = torch.arange(5)
    >>> sorted(permuted(0, torch.full((5,), 7), 0, 0, places, size=5).tolist())
    [0, 1, 2, 3, 4]
    """
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    step = torch.as_tensor(step, device=ids.device).expand(len(ids))
    chosen = index.clone()
    todo = torch.arange(len(ids), device=ids.device)
    while len(todo):
        row, column = chosen[todo] // width, chosen[todo] % width
        keys = bits(seed, ids[todo], step[todo], draw, 8)  # one for each half round
        for left, right in zip(keys[:, ::2].T, keys[:, 1::2].T, strict=True):
            row = (row + _mix(left ^ column).remainder(height)) % height
            column = (column + _mix(right ^ row).remainder(width)) % width
        chosen[todo] = row * width + column
        todo = todo[chosen[todo] >= size]
    return chosen


_rows: ContextVar[tuple[int, Tensor, Tensor, Iterator[int]] | None] = ContextVar("rows", default=None)
_fresh = torch.Generator()  # of noise in a service
_fresh.seed()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh.seed)  # workers must not share their noise


@contextmanager
def rows(seed: int, ids: Tensor, queries: Tensor) -> Iterator[None]:
    """Within this block, randomized defenses draw for images `ids` (N,) at their query number `queries` (N,).

    The oracle opens it around every call of a model, so that noise is fresh at each query of an image
    and yet does not depend on the batch.
    """
    with _drawing(seed, ids, queries, _DEFENSE):
        yield


def noise_like(x: Tensor) -> Tensor:
    """Standard normal noise in the shape of x (N, ...), for a randomized defense.

    Inside `rows`, a function of seed, id and query; elsewhere (in a service) fresh from the system's entropy.
    """
    context = _rows.get()
    if context is None:
        return torch.randn(x.shape, generator=_fresh).to(x)
    seed, ids, queries, draws = context
    if len(ids) != len(x):
        raise ValueError(f"expected a batch of {len(ids)} rows, as the oracle sent it, but got {len(x)}")
    return normal(seed, ids, queries, next(draws), x[0].numel()).view(x.shape).to(x)


def by_query(n: int) -> list[tuple[Tensor, AbstractContextManager[None]]]:
    """The rows of a batch of `n` that are at the same query number, and a block in which to draw for them.

    For noise that all images share: within the block, `shared_noise_like` is a function of seed and query. Outside
    `rows`, all rows are one group.
    """
    context = _rows.get()
    if context is None:
        return [(torch.arange(n), nullcontext())]
    seed, ids, queries, draws = context
    if len(ids) != n:
        raise ValueError(f"expected a batch of {len(ids)} rows, as the oracle sent it, but got {n}")
    first = next(draws) << 20  # each call its own draws, the same for every group
    groups = [(queries == query).nonzero().squeeze(1) for query in sorted(set(queries.tolist()))]
    return [(index, _drawing(seed, ids[index], queries[index], first)) for index in groups]


@contextmanager
def _drawing(seed: int, ids: Tensor, queries: Tensor, first: int) -> Iterator[None]:
    token = _rows.set((seed, ids, queries, itertools.count(first)))
    try:
        yield
    finally:
        _rows.reset(token)


def shared_noise_like(weight: Tensor) -> Tensor:
    """Standard normal noise in the shape of a weight, the same for all images; ask within a block of `by_query`."""
    context = _rows.get()
    if context is None:
        return torch.randn(weight.shape, generator=_fresh).to(weight)
    seed, ids, queries, draws = context
    if bool((queries != queries[0]).any()):
        raise ValueError("expected images at one query number for noise that they share; ask within rng.by_query")
    shared = torch.full_like(ids[:1], -1)  # no image has this id
    return normal(seed, shared, queries[:1], next(draws), weight.numel()).view(weight.shape).to(weight)
