"""The program of a loss function and the equations for each task's loss.

The function is traced once. Tracing or transposing all T losses for each task
would take time that grows as the square of T. It would also compute with the
losses of absent tasks, whose derivatives need not be finite.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import Literal
import jax.numpy as jnp

# Operations that make an array of losses, with each loss an operand.
_STACKS = ('stack', 'concatenate')
# Calls of compiled functions.
_CALLS = ('jit', 'pjit')


class Part(NamedTuple):
  """Some equations of a program, as a function.

  Attributes:
    inputs: the variables that they read but do not compute.
    results: the variables that they compute for others.
    run: `(*values of inputs) -> values of results`, a list.
  """

  inputs: list[Any]
  results: list[Any]
  run: Callable[..., list[Any]]


class Loss(NamedTuple):
  """One loss as a function of the arguments that it reads.

  Attributes:
    places: the positions of those arguments among all flattened arguments.
    run: `(*leaves at those places) -> loss`, a scalar.
  """

  places: list[int]
  run: Callable[..., jax.Array]


class PulledBack(NamedTuple):
  """All losses at some arguments, and the gradient of a weighted sum.

  Attributes:
    value: the result of the function: losses and aux.
    pull: `weights [T] -> gradients`, leaves like the flattened arguments.
  """

  value: Any
  pull: Callable[[jax.Array], list[jax.Array]]


def if_present(x: jax.Array, present: jax.Array) -> jax.Array:
  """X, without a derivative unless `present`."""
  return jnp.where(present, x, jax.lax.stop_gradient(x))


@jax.custom_vjp
def if_present_unbatched(x: jax.Array, present: jax.Array) -> jax.Array:
  """The same in reverse mode, and not batched where `present` alone is."""
  del present
  return x


if_present_unbatched.defvjp(
  lambda x, present: (x, present),
  lambda present, cotangent: (jnp.where(present, cotangent, 0), None),
)


class Program:
  """The equations of a function that returns one loss a task.

  Attributes:
    losses: shapes and dtypes of the losses, as the function returns them.
    separable: whether each task's loss is a separate result, as in a dictionary
      of losses or in an array that was stacked from them.
  """

  def __init__(self, fn: Callable[..., Any], number: int, *args: Any):
    """Traces the function.

    Args:
      fn: `(*args) -> (losses, aux)`; losses are a list of T scalars or [T].
      number: T.
      *args: trees of arrays.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    self.losses = shapes[0]
    size = len(jax.tree.leaves(self.losses))
    while (call := _shared_call(closed.jaxpr, size)) is not None:
      # The losses are compiled together, so their equations are inside.
      opened = functools.partial(_with_call_opened, closed, call)
      closed = jax.make_jaxpr(opened)(*jax.tree.leaves(args))
    self._jaxpr, self._structure = closed.jaxpr, jax.tree.structure(shapes)
    self._constants = dict(
      zip(closed.jaxpr.constvars, closed.consts, strict=True)
    )
    self._made_by = {
      x: k for k, e in enumerate(closed.jaxpr.eqns) for x in e.outvars
    }
    losses = self._by_task(closed.jaxpr.outvars[:size], number)
    self.separable = losses is not None
    self._losses = losses or closed.jaxpr.outvars[:1] * number

  def _by_task(self, losses, number):
    """The variable of each task's loss; None if they have no separate ones."""
    if isinstance(self.losses, list):
      return losses
    k = None if _fixed(losses[0]) else self._made_by.get(losses[0])
    if k is None or self._jaxpr.eqns[k].primitive.name not in _STACKS:
      return None
    rows = self._jaxpr.eqns[k].invars
    whole = len(rows) == number and all(x.aval.size == 1 for x in rows)
    return list(rows) if whole else None

  def loss(self, i: int) -> Loss:
    """Loss i as a separate function."""
    result = self._losses[i]
    inputs = self._jaxpr.invars
    if _fixed(result):
      return Loss([], lambda: jnp.asarray(result.val).reshape(()))
    if result in self._constants:
      return Loss([], lambda: self._constants[result].reshape(()))
    if result not in self._made_by:
      return Loss([inputs.index(result)], lambda x: x.reshape(()))
    part = _part(self._jaxpr, self._constants, self._needed(result), {result})
    place = {x: k for k, x in enumerate(inputs)}

    def run(*leaves):
      (loss,) = part.run(*leaves)
      return loss.reshape(()) if self.separable else loss[i]

    return Loss([place[x] for x in part.inputs], run)

  def values(
    self,
    leaves: Sequence[Any],
    active: jax.Array,
    guard: Callable[[jax.Array, jax.Array], jax.Array] = if_present,
  ) -> Any:
    """All losses and aux; their derivatives skip absent tasks.

    Args:
      leaves: the flattened arguments.
      active: bool [T].
      guard: `(x, present) -> x`, without a derivative unless `present`.

    Returns:
      The result of the function.
    """
    known = {
      **self._constants,
      **dict(zip(self._jaxpr.invars, leaves, strict=True)),
    }
    trunk, own, rest = self._parts

    def run(part, present=True):
      values = part.run(
        *(
          guard(known[x], present)
          if present is not True and _smooth(x)
          else known[x]
          for x in part.inputs
        )
      )
      known.update(zip(part.results, values, strict=True))

    run(trunk)
    for i, part in enumerate(own):
      run(part, active[i])
    run(rest)
    return self._value(known)

  def pull_back(self, leaves: Sequence[Any]) -> PulledBack:
    """All losses, and the gradient of a weighted sum of them.

    A loss whose weight is exactly 0 has no part in the gradient, even if its
    derivatives are not finite. The equations that only its task needs are
    pulled back separately, and their results are dropped.

    Args:
      leaves: the flattened arguments.

    Returns:
      The value and its pull-back.
    """
    invars = self._jaxpr.invars
    known = {**self._constants, **dict(zip(invars, leaves, strict=True))}
    trunk, own, rest = self._parts

    def linearized(part, out):
      """The part's pull-back from `out`, which also computes its results."""
      into = list(filter(_smooth, part.inputs))

      def run(*values):
        env = {**known, **dict(zip(into, values, strict=True))}
        made = part.run(*(env[x] for x in part.inputs))
        found = dict(zip(part.results, made, strict=True))
        return [found[x] for x in out], made

      _, pull, made = jax.vjp(run, *(known[x] for x in into), has_aux=True)
      known.update(zip(part.results, made, strict=True))
      return lambda cotangents: zip(into, pull(cotangents), strict=True)

    crossing = list(filter(_smooth, trunk.results))
    of_trunk = linearized(trunk, crossing)
    of_own = [
      linearized(part, [loss] if loss in part.results else [])
      for part, loss in zip(own, self._losses, strict=True)
    ]
    known.update(
      zip(rest.results, rest.run(*(known[x] for x in rest.inputs)), strict=True)
    )

    def pull(weights):
      totals: dict[Any, jax.Array] = {}

      def add(cotangents):
        for x, cotangent in cotangents:
          totals[x] = totals[x] + cotangent if x in totals else cotangent

      # From the last to the first, in the order of a derivative of the whole.
      for i in reversed(range(len(own))):
        loss = self._losses[i]
        if _fixed(loss):
          continue
        used = weights[i] != 0
        weight = jnp.where(used, weights[i], 0).astype(loss.aval.dtype)
        # They vary over the mapped axes that the loss does.
        zeros = jnp.zeros_like(known[loss])
        if self.separable:
          weight = zeros + weight.reshape(loss.aval.shape)
        else:
          weight = zeros.at[i].set(weight)
        if loss in own[i].results:
          add((x, jnp.where(used, c, 0)) for x, c in of_own[i]([weight]))
        else:  # Other losses need it too.
          add([(loss, weight)])
      zero = lambda x: jnp.zeros_like(known[x])
      add(
        of_trunk([totals.pop(x) if x in totals else zero(x) for x in crossing])
      )
      return [totals[x] if x in totals else zero(x) for x in invars]

    return PulledBack(self._value(known), pull)

  def _value(self, known):
    leaves = [x.val if _fixed(x) else known[x] for x in self._jaxpr.outvars]
    return jax.tree.unflatten(self._structure, leaves)

  @functools.cached_property
  def _parts(self) -> tuple[Part, list[Part], Part]:
    """Equations for several losses, for one loss each, and for no loss."""
    equations = self._jaxpr.eqns
    # The losses that need a variable, as the bits of a number.
    needed: dict[Any, int] = {}
    for i, loss in enumerate(self._losses):
      if not _fixed(loss):
        needed[loss] = needed.get(loss, 0) | 1 << i
    by_tasks: dict[int, list[Any]] = {}
    for equation in reversed(equations):
      tasks = 0
      for x in equation.outvars:
        tasks |= needed.get(x, 0)
      for x in equation.invars if tasks else ():
        if not _fixed(x):
          needed[x] = needed.get(x, 0) | tasks
      one = tasks.bit_count() < 2
      by_tasks.setdefault(tasks if one else -1, []).append(equation)
    results = {x for x in self._jaxpr.outvars if not _fixed(x)}
    results |= {x for x in self._losses if not _fixed(x)}
    read = {
      tasks: {x for e in found for x in e.invars if not _fixed(x)}
      for tasks, found in by_tasks.items()
    }

    def part(tasks):
      others = (x for other, x in read.items() if other != tasks)
      wanted = results.union(*others)
      return _part(
        self._jaxpr, self._constants, by_tasks.get(tasks, [])[::-1], wanted
      )

    own = [part(1 << i) for i in range(len(self._losses))]
    return part(-1), own, part(0)

  def _needed(self, result):
    """The equations that a result needs, in order.

    Only those are visited, so that T walks take as long as one.
    """
    found, todo = set(), [result]
    while todo:
      k = self._made_by.get(todo.pop())
      if k is not None and k not in found:
        found.add(k)
        todo += [x for x in self._jaxpr.eqns[k].invars if not _fixed(x)]
    return [self._jaxpr.eqns[k] for k in sorted(found)]


def _fixed(x: Any) -> bool:
  """Whether it is a number in the program instead of a variable."""
  return isinstance(x, Literal)


def _smooth(x: Any) -> bool:
  """Whether it can have derivatives."""
  return jnp.issubdtype(x.aval.dtype, jnp.inexact)


def _part(
  jaxpr: Any,
  constants: Mapping[Any, Any],
  equations: Sequence[Any],
  wanted: Iterable[Any],
) -> Part:
  """Equations as a function that computes the wanted variables it can."""
  read = dict.fromkeys(x for e in equations for x in e.invars if not _fixed(x))
  made = dict.fromkeys(x for e in equations for x in e.outvars)
  wanted = set(wanted)
  results = [x for x in made if x in wanted]
  own = [x for x in read if x in constants]
  inputs = [x for x in read if x not in made and x not in constants]
  jaxpr = jaxpr.replace(
    constvars=own, invars=inputs, outvars=results, eqns=list(equations)
  )
  closed = ClosedJaxpr(jaxpr, [constants[x] for x in own])
  return Part(inputs, results, jaxpr_as_fun(closed))


def _shared_call(jaxpr: Any, size: int) -> int | None:
  """The place of a call to a compiled function with several losses, if any.

  Args:
    jaxpr: the equations.
    size: the number of first results that are losses, or one array of them.
  """
  losses = {x for x in jaxpr.outvars[:size] if not _fixed(x)}
  for place, equation in enumerate(jaxpr.eqns):
    if equation.primitive.name in _CALLS:
      made = losses.intersection(equation.outvars)
      if len(made) > 1 or any(x.aval.size > 1 for x in made):
        return place
  return None


def _with_call_opened(
  closed: ClosedJaxpr, place: int, *leaves: Any
) -> list[Any]:
  """Evaluates a program with the equations of a call in its place."""
  jaxpr = closed.jaxpr
  known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  known.update(zip(jaxpr.invars, leaves, strict=True))
  call = jaxpr.eqns[place]
  read = lambda x: x.val if _fixed(x) else known[x]

  def run(equations):
    part = _part(
      jaxpr, {}, equations, (x for e in equations for x in e.outvars)
    )
    values = part.run(*map(read, part.inputs))
    known.update(zip(part.results, values, strict=True))

  run(jaxpr.eqns[:place])
  inside = jaxpr_as_fun(call.params['jaxpr'])(*map(read, call.invars))
  known.update(zip(call.outvars, inside, strict=True))
  run(jaxpr.eqns[place + 1 :])
  return list(map(read, jaxpr.outvars))
