"""Many problems of one shape in one program."""

import jax
import jax.numpy as jnp
import numpy as np

# Fewer are filled up and more are run in turns: a shape has one program.
SIZE = 32


def batched(solve):
  """The function `[(arguments of solve)] -> [what it returns]`.

  Floats go in as float32 and come out as float64 NumPy arrays.
  """
  program = jax.jit(jax.vmap(solve))

  def of_all(problems):
    found = []
    for start in range(0, len(problems), SIZE):
      turn = problems[start : start + SIZE]
      filled = [*turn, *[turn[-1]] * (SIZE - len(turn))]
      columns = [_short(np.stack(x)) for x in zip(*filled, strict=True)]
      together = jax.tree.map(_long, program(*columns))
      found += [
        jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(turn))
      ]
    return found

  return of_all


def _short(x):
  return x.astype(np.float32) if x.dtype == np.float64 else x


def _long(x):
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return np.asarray(x, np.float64 if floating else x.dtype)
