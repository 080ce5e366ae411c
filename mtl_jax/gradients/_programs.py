"""The program of a loss function and the equations for each task's loss.

The function is traced once. Tracing or transposing all T losses for each task
would take time that grows as the square of T. It would also compute with the
losses of absent tasks, whose derivatives need not be finite.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import operator
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


class Group(NamedTuple):
  """The equations that the same losses need.

  Attributes:
    losses: which ones; None for all of them, or for none.
    part: the equations.
    out: those of its results that losses are differentiated through.
  """

  losses: list[int] | None
  part: Part
  out: list[Any]

  def any_of(self, flags: jax.Array) -> jax.Array | None:
    """Whether any of the losses has its flag [T] set; None if they are all."""
    if self.losses is None:
      return None
    return functools.reduce(operator.or_, [flags[i] for i in self.losses])


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
    owned: Collection[int] = (),
  ) -> Any:
    """All losses and aux; their derivatives skip absent tasks.

    Args:
      leaves: the flattened arguments.
      active: bool [T].
      owned: places of arguments that one loss alone reads. What reaches them
        comes from that loss, and they are left as they are.

    Returns:
      The result of the function.
    """
    known = self._known(leaves)
    exempt = {self._jaxpr.invars[k] for k in owned}

    def guarded(x, present):
      if present is None or x in exempt or not _smooth(x):
        return known[x]
      if not _varying(present) <= _varying(known[x]):
        # The equations were traced for a value that all replicas share.
        return known[x]
      # The value is the same either way; the derivative is not.
      return jnp.where(present, known[x], jax.lax.stop_gradient(known[x]))

    for group in self._groups:
      present = group.any_of(active)
      values = group.part.run(*(guarded(x, present) for x in group.part.inputs))
      known.update(zip(group.part.results, values, strict=True))
    return self._value(known)

  def pull_back(self, leaves: Sequence[Any]) -> PulledBack:
    """All losses, and the gradient of a weighted sum of them.

    A loss whose weight is exactly 0 has no part in the gradient, even if its
    derivatives are not finite. Equations for the same losses are pulled back
    together, and the result is dropped if all those losses have weight 0.

    Args:
      leaves: the flattened arguments.

    Returns:
      The value and its pull-back.
    """
    known = self._known(leaves)
    steps = []
    for group in self._groups:
      into = list(filter(_smooth, group.part.inputs))

      def run(*values, group=group, into=into):
        env = {**known, **dict(zip(into, values, strict=True))}
        made = group.part.run(*(env[x] for x in group.part.inputs))
        found = dict(zip(group.part.results, made, strict=True))
        return [found[x] for x in group.out], made

      _, own, made = jax.vjp(run, *(known[x] for x in into), has_aux=True)
      known.update(zip(group.part.results, made, strict=True))
      steps.append((group, into, own))

    def pull(weights):
      zero = lambda x: jnp.zeros_like(known[x])
      totals: dict[Any, jax.Array] = {}

      def add(x, cotangent):
        totals[x] = totals[x] + cotangent if x in totals else cotangent

      used = weights != 0
      for i, loss in enumerate(self._losses):
        if not _fixed(loss):
          weight = jnp.where(used[i], weights[i], 0).astype(loss.aval.dtype)
          # Zeros vary over the mapped axes that the loss does.
          if self.separable:
            add(loss, zero(loss) + weight.reshape(loss.aval.shape))
          else:
            add(loss, zero(loss).at[i].set(weight))
      # From the last to the first, in the order of a derivative of the whole.
      for group, into, own in reversed(steps):
        present = group.any_of(used)
        cotangents = own(
          [totals.pop(x) if x in totals else zero(x) for x in group.out]
        )
        for x, cotangent in zip(into, cotangents, strict=True):
          if present is not None:
            cotangent = jnp.where(present, cotangent, 0)
          add(x, cotangent)
      return [totals[x] if x in totals else zero(x) for x in self._jaxpr.invars]

    return PulledBack(self._value(known), pull)

  def _known(self, leaves):
    given = dict(zip(self._jaxpr.invars, leaves, strict=True))
    return {**self._constants, **given}

  def _value(self, known):
    leaves = [x.val if _fixed(x) else known[x] for x in self._jaxpr.outvars]
    return jax.tree.unflatten(self._structure, leaves)

  @functools.cached_property
  def _groups(self) -> list[Group]:
    """Equations by the losses that need them, in an order to run them in."""
    # The losses that need a variable, as the bits of a number.
    needed: dict[Any, int] = {}
    for i, loss in enumerate(self._losses):
      if not _fixed(loss):
        needed[loss] = needed.get(loss, 0) | 1 << i
    by_losses: dict[int, list[Any]] = {}
    made_by: dict[Any, int] = {}
    for equation in reversed(self._jaxpr.eqns):
      bits = 0
      for x in equation.outvars:
        bits |= needed.get(x, 0)
      for x in equation.invars if bits else ():
        if not _fixed(x):
          needed[x] = needed.get(x, 0) | bits
      by_losses.setdefault(bits, []).append(equation)
      made_by.update(dict.fromkeys(equation.outvars, bits))
    losses = {x for x in self._losses if not _fixed(x)}
    # What one group of equations makes for another one, with a derivative.
    passed_on = {
      x
      for bits, equations in by_losses.items()
      for equation in equations
      for x in equation.invars
      if bits and not _fixed(x) and made_by.get(x, bits) != bits
    }
    wanted = losses | passed_on
    wanted |= {x for x in self._jaxpr.outvars if not _fixed(x)}
    wanted |= {
      x
      for equation in by_losses.get(0, ())
      for x in equation.invars
      if not _fixed(x)
    }

    def group(bits):
      part = _part(self._jaxpr, self._constants, by_losses[bits][::-1], wanted)
      smooth = [
        x for x in part.results if x in losses | passed_on and _smooth(x)
      ]
      every = bits == (1 << len(self._losses)) - 1
      places = [i for i in range(len(self._losses)) if bits >> i & 1]
      return Group(None if every or not bits else places, part, smooth)

    # What more losses need comes first: the needs of an equation are those of
    # all that use its results.
    order = sorted(by_losses, key=int.bit_count, reverse=True)
    return [group(bits) for bits in order]

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


def _varying(x: Any) -> frozenset[Any]:
  """The mapped axes over which a value varies, as far as its type says."""
  return jax.typeof(x).manual_axis_type.varying


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
