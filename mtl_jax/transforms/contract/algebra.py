"""Inner products and weighted sums of stacks of task gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import meshes

# How many numbers of a row are multiplied at once; into how many partial sums a
# row is added up, for so few products of rows; how many rows are added at once.
_PIECE = 2**12
_PARTIAL_SUMS = 2**14
_FEW_PRODUCTS = 9
_ROWS_A_PASS = 8


def on_cpu() -> bool:
  """Whether to use the forms that XLA's CPU backend computes in place.

  That backend copies the whole stack for a product that contracts several axes,
  for a multiplication or a mask before a reduction, and for a write over a
  loop's result. The forms used instead take rows one by one or reshape. On
  other backends these would be slower or would gather a sharded stack, and XLA
  fuses the plain forms there.
  """
  return jax.default_backend() == 'cpu'


def wide(dtype: Any) -> Any:
  """The dtype in which norms and inner products are computed."""
  return jnp.promote_types(dtype, jnp.float32)


def cross(
  first: Any,
  second: Any,
  shape: tuple[int, int],
  axes: aggregation.Axes | None = None,
) -> jax.Array:
  """Inner products of two stacks of gradients.

  Args:
    first: tree of leaves [M, *shape]; the result without any leaf is zero.
    second: tree of leaves [N, *shape].
    shape: (M, N).
    axes: where parameters are sharded, if they are.

  Returns:
    [M, N], whose entry (i, j) is for row i in `first` and row j in `second`;
    float32 at least.
  """

  def products(first, second):
    total = jnp.zeros(shape, jnp.float32)
    for a, b in zip(first, second, strict=True):
      if on_cpu():
        rows = [jnp.reshape(x, (x.shape[0], -1)) for x in (a, b)]
        total = total + _product_by_pieces(*rows)
      else:
        total = total + _product(a, b)
    return total

  total = meshes.with_automatic_axes(
    products,
    jax.sharding.PartitionSpec(),
    jax.tree.leaves(first),
    jax.tree.leaves(second),
  )
  return total if axes is None else axes.sum_shards(total)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Inner products of all rows, contracting all axes but the first."""
  rest = tuple(range(1, a.ndim))
  dtype = wide(jnp.promote_types(a.dtype, b.dtype))
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    ((rest, rest), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
  )


def _product_by_pieces(a: jax.Array, b: jax.Array) -> jax.Array:
  """`_product` of matrices whose rows may be long.

  In some programs XLA's CPU backend adds up a row one number after the other:
  squared norms of 4 million numbers came out 0.6 % too small in float32. Sums
  within a piece, and then over the pieces, lose almost nothing.
  """
  if a.shape[0] * b.shape[0] <= _FEW_PRODUCTS:
    return _product_by_columns(a, b)
  pieces = a.shape[1] // _PIECE
  if pieces < 2:
    return _product(a, b)

  def add(i, total):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * _PIECE, _PIECE, 1)
    return total + _product(cut(a), cut(b))

  # Starts from a product, whose type is right inside shard_map too.
  total = _product(a[:, pieces * _PIECE :], b[:, pieces * _PIECE :])
  return jax.lax.fori_loop(0, pieces, add, total)


def _product_by_columns(a: jax.Array, b: jax.Array) -> jax.Array:
  """`_product` for few rows, in one pass over memory with many sums at once."""
  pieces = a.shape[1] // _PARTIAL_SUMS
  if pieces < 2:
    return _product(a, b)
  split = pieces * _PARTIAL_SUMS
  dtype = wide(jnp.promote_types(a.dtype, b.dtype))
  first, second = (
    x[:, :split].astype(dtype).reshape(-1, pieces, _PARTIAL_SUMS)
    for x in (a, b)
  )
  sums = jnp.sum(first[:, None] * second[None], axis=2)
  return jnp.sum(sums, axis=-1) + _product(a[:, split:], b[:, split:])


def gram(
  task_grads: Any, num_tasks: int, axes: aggregation.Axes | None = None
) -> jax.Array:
  """Gram matrix [T, T] of task gradients; see `cross`."""
  return cross(task_grads, task_grads, (num_tasks, num_tasks), axes)


def with_rows(
  vector: Any, task_grads: Any, num_tasks: int, axes: aggregation.Axes
) -> tuple[jax.Array, jax.Array]:
  """Inner products of one gradient with a stack, and its squared norm.

  Args:
    vector: tree of leaves [*shape].
    task_grads: tree of leaves [T, *shape].
    num_tasks: T.
    axes: where parameters are sharded, if they are.

  Returns:
    inner products [T] and the squared norm, float32 at least.
  """
  one = jax.tree.map(lambda x: x[None], vector)
  inner = cross(one, task_grads, (1, num_tasks), axes)
  return inner[0], cross(one, one, (1, 1), axes)[0, 0]


def row(weights: jax.Array, leaf: jax.Array) -> jax.Array:
  """`weights` [T] in a shape that multiplies the rows of `leaf` [T, ...]."""
  return weights.reshape(weights.shape + (1,) * (leaf.ndim - 1))


def _sum_of_rows(
  weights: jax.Array, leaf: jax.Array, active: jax.Array | None, dtype: Any
) -> jax.Array:
  """The weighted sum of rows, so many of them in one pass over memory."""
  size = weights.shape[0]
  weights = jnp.asarray(weights)

  def weighed(k):
    one = leaf[k] if active is None else jnp.where(active[k], leaf[k], 0)
    return weights[k] * one.astype(dtype)

  def add(i, total):
    # From one expression for many rows XLA makes a second stack.
    for k in range(_ROWS_A_PASS):
      total = total + weighed(first + i * _ROWS_A_PASS + k)
    return total

  # As many rows as leave whole passes, and at least one to start from.
  first = (size - 1) % _ROWS_A_PASS + 1
  total = sum(map(weighed, range(first)))
  return jax.lax.fori_loop(0, (size - first) // _ROWS_A_PASS, add, total)


def weighted_sum(
  weights: jax.Array,
  task_grads: Any,
  active: jax.Array | None = None,
  *,
  keep_wide: bool = False,
) -> Any:
  """Sum of task gradients.

  Args:
    weights: [T].
    task_grads: tree of leaves [T, *shape].
    active: bool [T], the rows to add up; all by default. The others may hold
      anything.
    keep_wide: whether to keep the sum in the dtype of the summation.

  Returns:
    Tree of leaves [*shape], summed in float32 at least, in the leaves' dtype.
  """

  def combine(weights, leaf, active):
    # Loops index it, which NumPy's arrays do not know.
    leaf = jnp.asarray(leaf)
    dtype = wide(leaf.dtype)
    if on_cpu():
      total = _sum_of_rows(weights, leaf, active, dtype)
    else:
      rows = keep_active(active, leaf).astype(dtype)
      total = jnp.sum(row(weights, leaf) * rows, axis=0)
    return total if keep_wide else total.astype(leaf.dtype)

  return jax.tree.map(
    lambda leaf: meshes.with_automatic_axes(
      combine, lambda: meshes.row_spec(leaf), weights, leaf, active
    ),
    task_grads,
  )


def keep_active(active: jax.Array | None, task_grads: Any) -> Any:
  """The stack with zeros in the rows of absent tasks."""
  if active is None:
    return task_grads
  # A product with 0 would let an absent task's NaN through.
  return jax.tree.map(
    lambda leaf: jnp.where(row(active, leaf), leaf, 0), task_grads
  )
