# SPDX-License-Identifier: Apache-2.0
"""-ln p of target tokens from activations, in chunks of positions: the logits [B, T, V] never exist.

Positions that count are sorted to the front, and a loop runs over as many chunks as there are such positions, which
may differ from batch to batch in one compiled program. Gradients of a chunk are computed while its logits are at hand,
so the backward pass only scales them; what is not asked for (the gradient of a frozen head) is not computed. What the
head is, is `_head.py`; the losses are `_cross_entropy.py`. Axis letters: A groups, P positions of a group, C positions
of a chunk, D width, V ids, N blocks of the table with E rows each, r rank.

    one chunk     for each block:  logits[n] = cap(h @ table[n].T)      running maximum and sum
                  for each block:  slope = softmax - onehot             dh += slope @ table[n], dtable[n] += slope.T @ h

A head that is not trained is read once (`_frozen_chunk`): no logits are kept, and their gradient is a running sum.
On a CPU the table is read in blocks: float32 copies of a bfloat16 table are of a block, and slopes stay in the cache.
Elsewhere it is one block. Groups are there for arrays whose rows are spread over devices: positions are sorted inside
of a group, so that nothing but sums crosses from one device to another.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal

from gemma.gm.losses._head import Head
from gemma.gm.nn._layers import common_dtype
from gemma.gm.nn._packed import Packed
from gemma.gm.typing import Array, DType, Float

# Positions of a chunk: with a trained head their logits are kept, at 262144 ids 268 MB for 256. More of them read the
# table less often, fewer waste less on the last chunk, which is always computed whole.
CHUNK_CPU = 256
CHUNK = 512  # on other platforms

_BLOCK_ROWS = 4096  # of the table on a CPU, at most: 10 MB of float32 at a width of 640, 4 MB of logits
_FEWEST_ROWS = 1024  # a vocabulary without such a divisor is one block


@flax.struct.dataclass
class _Wanted:
    """Of what gradients are asked for, known while tracing."""

    hidden: bool = flax.struct.field(pytree_node=False, default=False)
    table: bool = flax.struct.field(pytree_node=False, default=False)
    a: bool = flax.struct.field(pytree_node=False, default=False)
    b: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def head(self) -> bool:
        return self.table or self.a or self.b


_NOTHING = _Wanted()


class _Grads(NamedTuple):
    """float32 gradients, each None where it was not asked for; those of the head have the groups as first axis."""

    hidden: Array | None = None  # [A, P, D]
    table: Array | None = None  # [A, N, E, D]
    a: Array | None = None  # [A, N, E, r]
    b: Array | None = None  # [A, r, D]


def default_chunk() -> int:
    """Positions of a chunk on this platform."""
    return CHUNK_CPU if jax.default_backend() == "cpu" else CHUNK


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def nll_sum(head: Head, hidden: Array, targets: Array, weights: Array, chunk: int) -> Float[Array, ""]:
    """sum(weights * -ln p(target)); weights are constants. Gradients of activations and head in one pass.

    Args:
      head: of the model.
      hidden: [A, P, D].
      targets: int32 [A, P].
      weights: float32 [A, P]; where 0, a position is left out.
      chunk: positions of a group whose logits exist at the same time.
    """
    return jnp.sum(_pass(head, hidden, targets, weights, chunk, _NOTHING)[0] * weights)


def _sum_forwards(*args):
    head, hidden, targets, weights, chunk, wanted = _opened(*args)
    nll, grads = _pass(head, hidden, targets, weights, chunk, wanted)
    return jnp.sum(nll * weights), (grads, _like(head), _like(hidden))


def _sum_backwards(chunk, kept, upstream):
    grads, head, hidden = kept
    return (*_scaled(grads, upstream, head, hidden), None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def nll_each(head: Head, hidden: Array, targets: Array, weights: Array, chunk: int) -> Float[Array, "A P"]:
    """-ln p(target) of each position, 0 where it does not count. Arguments as in `nll_sum`; weights are 0 or 1.

    Only the backward pass knows how much each position counts, so a head that is trained is run once more there.
    """
    return _pass(head, hidden, targets, weights, chunk, _NOTHING)[0]


def _each_forwards(*args):
    head, hidden, targets, weights, chunk, wanted = _opened(*args)
    nll, grads = _pass(head, hidden, targets, weights, chunk, _Wanted(hidden=wanted.hidden))
    again = (head, hidden, targets, weights) if wanted.head else None
    return nll, (grads, again, wanted.replace(hidden=False), _like(head), _like(hidden))


def _each_backwards(chunk, kept, upstream):
    grads, again, wanted, head_like, hidden_like = kept
    scale = upstream[..., None]
    grads = grads._replace(hidden=None if grads.hidden is None else grads.hidden * scale)
    if again is not None:
        head, hidden, targets, weights = again
        of_head = _pass(head, hidden, targets, weights * upstream, chunk, wanted)[1]
        grads = of_head._replace(hidden=grads.hidden)
    return (*_scaled(grads, None, head_like, hidden_like), None, None)


nll_sum.defvjp(_sum_forwards, _sum_backwards, symbolic_zeros=True)
nll_each.defvjp(_each_forwards, _each_backwards, symbolic_zeros=True)


def _opened(head, hidden, targets, weights, chunk):
    """The arguments of a forward rule as values, and what of them has a gradient."""

    def values(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)

    flags = {
        name: not isinstance(leaf, Packed) and leaf is not None and bool(leaf.perturbed)
        for name, leaf in (("hidden", hidden), ("table", head.table), ("a", head.a), ("b", head.b))
    }
    return *(values(tree) for tree in (head, hidden, targets, weights)), chunk, _Wanted(**flags)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, CustomVJPPrimal)


@flax.struct.dataclass
class _Like:
    """Shapes and dtypes of a tree, for the backward pass."""

    tree: Any = flax.struct.field(pytree_node=False)


def _like(tree: Any) -> _Like:
    if isinstance(tree, Head):
        leaves = (None if isinstance(tree.table, Packed) else tree.table, tree.a, tree.b)
        return _Like((*(None if x is None else (x.shape, x.dtype) for x in leaves), tree.scale, tree.cap))
    return _Like((tree.shape, tree.dtype))


def _scaled(grads: _Grads, upstream: Array | None, head: _Like, hidden: _Like) -> tuple[Head | None, Array | None]:
    """Gradients times the loss's own, summed over groups, in the shapes and dtypes of what they belong to."""

    def done(grad: Array | None, like: tuple | None, grouped: bool) -> Array | None:
        if grad is None:
            return None
        grad = grad if upstream is None else grad * upstream
        return (jnp.sum(grad, axis=0) if grouped else grad).reshape(like[0]).astype(like[1])

    table, a, b, scale, cap = head.tree
    of_head = Head(done(grads.table, table, True), done(grads.a, a, True), done(grads.b, b, True), scale, cap)
    return of_head, done(grads.hidden, hidden.tree, False)


# ---- one pass --------------------------------------------------------------------------------------------------------


def _pass(
    head: Head, hidden: Array, targets: Array, weights: Array, chunk: int, wanted: _Wanted
) -> tuple[Float[Array, "A P"], _Grads]:
    """nll [A, P], and the gradients of sum(weights * nll)."""
    groups, length, _ = hidden.shape
    size = min(chunk, length)
    rounds = -(-length // size)
    keep = weights != 0
    order = jnp.argsort(~keep, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)  # where each position went
    counts = jnp.sum(keep, axis=1, dtype=jnp.int32)

    def sorted_(values: Array) -> Array:
        index = order if values.ndim == 2 else order[..., None]
        values = jnp.take_along_axis(values, index, axis=1)
        return jnp.pad(values, ((0, 0), (0, rounds * size - length), *((0, 0),) * (values.ndim - 2)))

    used = sorted_(keep)
    w, t = sorted_(weights.astype(jnp.float32)), jnp.where(used, sorted_(targets), 0)
    h = jnp.where(used[..., None], sorted_(hidden), 0)  # what is left out may be NaN
    blocks = _blocks(head)

    def body(i: Array, state: tuple[Array, _Grads]) -> tuple[Array, _Grads]:
        nll, grads = state
        part = [lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for x in (h, t, w)]
        found, grads = _chunk(blocks, *part, grads, wanted, i * size)
        return lax.dynamic_update_slice_in_dim(nll, found, i * size, axis=1), grads

    state = jnp.zeros((groups, rounds * size), jnp.float32), _zeros(blocks, h, wanted)
    nll, grads = lax.fori_loop(0, -(-jnp.max(counts) // size), body, state)
    nll = jnp.where(keep, jnp.take_along_axis(nll, back, axis=1), 0)
    if grads.hidden is not None:
        grads = grads._replace(hidden=jnp.take_along_axis(grads.hidden, back[..., None], axis=1))
    return nll, grads


def _zeros(blocks: _Blocks, h: Array, wanted: _Wanted) -> _Grads:
    def of(wanted: bool, leaf: Array | None) -> Array | None:
        return jnp.zeros((h.shape[0], *leaf.shape), jnp.float32) if wanted else None

    hidden = jnp.zeros(h.shape, jnp.float32) if wanted.hidden else None
    return _Grads(hidden, of(wanted.table, blocks.table), of(wanted.a, blocks.a), of(wanted.b, blocks.b))


class _Blocks(NamedTuple):
    """A head whose table is cut into blocks of rows."""

    table: Array | Packed  # [N, E, D], or [V, D] packed
    a: Array | None  # [N, E, r]
    b: Array | None  # [r, D]
    scale: float
    cap: float | None
    rows: int  # E
    count: int  # N

    def rows_of(self, ids: Array) -> Array:
        """float32 [A, C, D]: the rows of some ids."""
        if isinstance(self.table, Packed):
            return self.table.take(ids).astype(jnp.float32)
        return self.table[ids // self.rows, ids % self.rows].astype(jnp.float32)

    def one(self, n: Array) -> tuple[Array | Packed, Array | None]:
        """The rows of one block, of the table and of the adapter."""
        table = self.table if isinstance(self.table, Packed) else self.table[n]
        return table, None if self.a is None else self.a[n]


def _blocks(head: Head) -> _Blocks:
    vocab = head.table.shape[0]
    rows = vocab
    if jax.default_backend() == "cpu" and not isinstance(head.table, Packed):
        rows = _largest_divisor(vocab)
    count = vocab // rows
    table = head.table if isinstance(head.table, Packed) else head.table.reshape(count, rows, -1)
    a = None if head.a is None else head.a.reshape(count, rows, -1)
    return _Blocks(table, a, head.b, head.scale, head.cap, rows, count)


def _largest_divisor(vocab: int) -> int:
    """Rows of a block: the largest divisor of the vocabulary that is not above `_BLOCK_ROWS`."""
    if vocab <= _BLOCK_ROWS:
        return vocab
    found = next(rows for rows in range(_BLOCK_ROWS, 0, -1) if vocab % rows == 0)
    return found if found >= _FEWEST_ROWS else vocab


def _chunk(
    blocks: _Blocks, h: Array, t: Array, w: Array, grads: _Grads, wanted: _Wanted, start: Array
) -> tuple[Float[Array, "A C"], _Grads]:
    """nll of one chunk, and gradients with its part added; `start` is where the chunk stands."""
    if blocks.b is None and not wanted.table:
        nll, dh = _frozen_chunk(blocks, h, t, w, wanted.hidden)
        if wanted.hidden:
            grads = grads._replace(hidden=lax.dynamic_update_slice_in_dim(grads.hidden, dh, start, axis=1))
        return nll, grads
    low = None if blocks.b is None else _onto(h, blocks.b)  # [A, C, r]

    def forwards(state: tuple[Array, Array], n: Array):
        high, total = state
        logits = _logits(blocks, *blocks.one(n), h, low)
        higher = jnp.maximum(high, jnp.max(logits, axis=-1))
        total = total * jnp.exp(high - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
        return (higher, total), logits

    state = jnp.full(t.shape, -jnp.inf, jnp.float32), jnp.zeros(t.shape, jnp.float32)
    (high, total), logits = lax.scan(forwards, state, jnp.arange(blocks.count))
    norm = high + jnp.log(total)
    group, place = jnp.arange(t.shape[0])[:, None], jnp.arange(t.shape[1])[None, :]
    known = jnp.where((t >= 0) & (t < blocks.rows * blocks.count), t, 0)
    target = logits[known // blocks.rows, group, place, known % blocks.rows]
    nll = jnp.where(known == t, norm - target, jnp.nan)  # a label outside of the vocabulary must not go unnoticed
    if wanted == _NOTHING:
        return nll, grads

    def backwards(n: Array, state: tuple[Array, Array | None, _Grads]):
        dh, dlow, grads = state
        table, a = blocks.one(n)
        part = lax.dynamic_index_in_dim(logits, n, keepdims=False)
        hit = (jnp.arange(blocks.rows) + n * blocks.rows)[None, None, :] == t[..., None]
        slope = (jnp.exp(part - norm[..., None]) - hit.astype(jnp.float32)) * w[..., None]
        if blocks.cap is not None:
            slope = slope * (1 - jnp.square(part / blocks.cap))
        if wanted.hidden:
            dh = dh + _back(slope, table, h)
        if low is not None:
            dlow = dlow + _back(slope, a, low) * blocks.scale
        if wanted.table:
            grads = grads._replace(table=_add_at(grads.table, n, _outer(slope, h, table)))
        if wanted.a:
            grads = grads._replace(a=_add_at(grads.a, n, _outer(slope, low, a) * blocks.scale))
        return dh, dlow, grads

    state = jnp.zeros(h.shape, jnp.float32), None if low is None else jnp.zeros(low.shape, jnp.float32), grads
    dh, dlow, grads = lax.fori_loop(0, blocks.count, backwards, state)
    if wanted.hidden:
        dh = dh if low is None else dh + _back(dlow, blocks.b, h)
        grads = grads._replace(hidden=lax.dynamic_update_slice_in_dim(grads.hidden, dh, start, axis=1))
    return nll, grads if not wanted.b else grads._replace(b=grads.b + _outer(dlow, h, blocks.b))


def _frozen_chunk(blocks: _Blocks, h: Array, t: Array, w: Array, slopes: bool) -> tuple[Array, Array | None]:
    """nll [A, C] of one chunk, and its gradient [A, C, D], in one reading of a head that is not trained.

    The gradient is that of attention with the table as keys and values: a running sum of softmax @ table, rescaled
    whenever the maximum rises. No logits are kept.
    """

    def body(state: tuple[Array, Array, Array | None], n: Array):
        high, total, mean = state
        logits = _logits(blocks, *blocks.one(n), h, None)
        higher = jnp.maximum(high, jnp.max(logits, axis=-1))
        powers, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(high - higher)
        total = total * shrink + jnp.sum(powers, axis=-1)
        if mean is not None:
            mean = mean * shrink[..., None] + _back(powers * _bend(logits, blocks.cap), blocks.one(n)[0], h)
        return (higher, total, mean), None

    start = jnp.full(t.shape, -jnp.inf, jnp.float32), jnp.zeros(t.shape, jnp.float32)
    state = (*start, jnp.zeros(h.shape, jnp.float32) if slopes else None)
    (high, total, mean), _ = lax.scan(body, state, jnp.arange(blocks.count))
    known = jnp.where((t >= 0) & (t < blocks.rows * blocks.count), t, 0)
    rows = blocks.rows_of(known)
    target = jnp.sum(h.astype(jnp.float32) * rows, axis=-1)
    if blocks.cap is not None:
        target = jnp.tanh(target / blocks.cap) * blocks.cap
    nll = jnp.where(known == t, high + jnp.log(total) - target, jnp.nan)  # as in `_chunk`
    if mean is None:
        return nll, None
    return nll, (mean / total[..., None] - rows * _bend(target, blocks.cap)[..., None]) * w[..., None]


def _bend(logits: Array, cap: float | None) -> Array | float:
    """The slope of the soft-cap at capped logits."""
    return jnp.ones((), jnp.float32) if cap is None else 1 - jnp.square(logits / cap)


def _add_at(total: Array, n: Array, part: Array) -> Array:
    """[A, N, E, D] with [A, E, D] added to one block."""
    held = lax.dynamic_index_in_dim(total, n, axis=1, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, held + part, n, axis=1)


# ---- products with rows of a weight ----------------------------------------------------------------------------------


def _logits(blocks: _Blocks, table: Array | Packed, a: Array | None, h: Array, low: Array | None) -> Array:
    """float32 [A, C, E], capped."""
    logits = _onto(h, table)
    if low is not None:
        logits = logits + _onto(low, a) * blocks.scale
    return logits if blocks.cap is None else jnp.tanh(logits / blocks.cap) * blocks.cap


def _onto(x: Array, w: Array | Packed) -> Array:
    """x [A, C, D] times the transpose of w [E, D], float32."""
    if isinstance(w, Packed):
        return w.einsum("...D,ED->...E", x, accumulate=jnp.float32)
    dtype = _met(x, w)
    return _einsum("acd,ed->ace", x.astype(dtype), w.astype(dtype))


def _back(slope: Array, w: Array | Packed, x: Array) -> Array:
    """slope [A, C, E] times w [E, D], float32: the gradient of x in `_onto`."""
    if isinstance(w, Packed):
        return jax.vjp(lambda x: _onto(x, w), jnp.zeros(x.shape, jnp.float32))[1](slope)[0]
    dtype = _met(x, w)
    return _einsum("ace,ed->acd", slope.astype(dtype), w.astype(dtype))


def _outer(slope: Array, x: Array, w: Array) -> Array:
    """The transpose of slope [A, C, E] times x [A, C, D], float32 [A, E, D]: the gradient of w in `_onto`."""
    dtype = _met(x, w)
    return _einsum("ace,acd->aed", slope.astype(dtype), x.astype(dtype))


def _einsum(eqn: str, x: Array, y: Array) -> Array:
    return jnp.einsum(eqn, x, y, preferred_element_type=jnp.float32)


def _met(x: Array, w: Array) -> DType:
    """In which activations and a weight are multiplied. A CPU has no product of narrow floats worth the name."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else common_dtype(x, w)
