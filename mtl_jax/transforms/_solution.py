"""What a map from a Gram matrix to weights gives."""

from typing import Any
from typing import NamedTuple

import jax


class Solution(NamedTuple):
  """Weights and what comes with them.

  Attributes:
    weights: [T].
    residual: scalar, how far the weights are from the solver's optimality
      conditions, relative to the size of their terms; None in closed form.
    memory: what is remembered for the next update; None without memory.
  """

  weights: jax.Array
  residual: jax.Array | None = None
  memory: Any = None
