"""The nouns of the project: batch, task, problem, model.

Everything here is a plain container of arrays or of pure functions. The order
of tasks is always `Problem.task_names`, never the order of a dictionary.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import numpy as np

Array = jax.Array | np.ndarray

# Parameters: {'shared': tree, 'heads': {task: tree}}.
Params = Any

# The state that a model carries from step to step besides parameters, such as
# BatchNorm's running statistics. An empty dictionary without any.
ModelState = Any

# Gradients of T tasks: laid out as Params, shared leaves [T, *shape], head
# leaves [*shape] with the gradient of the head's own task.
TaskGrads = Any

# {'image': [B, H, W, C], 'labels': {task: [B, ...]}, 'mask': {task: [B, ...]}}
# where a mask is 1.0 for a present label and 0.0 for a missing one. Shapes are
# static: a missing label is a mask of zeros.
Batch = Mapping[str, Any]

# {task: prediction [B, ...]}
Predictions = Mapping[str, Any]


class Source(Protocol):
  """Examples by random access, such as a split of a dataset."""

  def __len__(self) -> int:
    """Number of examples."""

  def __getitems__(self, indices: np.ndarray) -> Batch:
    """The examples at `indices` [B] as one batch of NumPy arrays."""


@dataclasses.dataclass(frozen=True)
class Metric:
  """A measure of how well a task is solved, over a whole split.

  Attributes:
    name: its name in logs and tables, such as `'accuracy'`.
    accumulate: `(prediction, label, mask) -> tree`; sums that add up over
      batches and devices. Pure and jittable.
    finish: `tree -> scalar`; the metric from the sums over the split.
    higher_is_better: whether a larger value is a better one.
  """

  name: str
  accumulate: Callable[[Any, Any, Any], Any]
  finish: Callable[[Any], Any]
  higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
  """One task: the size of its head, its loss and its metrics.

  Attributes:
    name: the key of the task in batches, parameters and logs.
    num_outputs: width of the task's head.
    loss: `(prediction [B, ...], label [B, ...]) -> [B, ...]`; the loss of each
      example (or pixel), averaged over present labels by the caller.
    metrics: the task's metrics. Tables are sorted by the first.
  """

  name: str
  num_outputs: int
  loss: Callable[[Any, Any], jax.Array]
  metrics: tuple[Metric, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
  """A benchmark: its tasks, its data and its baselines.

  Attributes:
    name: name of the problem.
    tasks: the tasks, in the order of every task axis.
    image_shape: (height, width, channels) of an input.
    load: `(split, **options) -> Source`; the data of a split.
    prepare: `(**options) -> None`; writes the files that `load` reads, if they
      are missing. One process calls it while the others wait. None if nothing
      has to be prepared.
    preprocess: `batch -> batch`; pure, run inside `jit` before the model, such
      as the scaling of bytes to floats.
    baselines: single-task scores, `{'task/metric': value}`, for delta_m.
    baselines_source: where `baselines` come from.
  """

  name: str
  tasks: tuple[Task, ...]
  image_shape: tuple[int, int, int]
  load: Callable[..., Source]
  preprocess: Callable[[Batch], Batch]
  prepare: Callable[..., None] | None = None
  baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
  baselines_source: str = ''

  def __post_init__(self):
    names = self.task_names
    if not names or len(set(names)) != len(names):
      raise ValueError(
        f'tasks must have distinct names and be one at least, got {names}'
      )

  @property
  def task_names(self) -> tuple[str, ...]:
    """The names, in the order of every task axis."""
    return tuple(task.name for task in self.tasks)


class Model(NamedTuple):
  """A model as a pair of pure functions.

  Attributes:
    init: `(key, batch) -> (params, model_state)`.
    apply: `(params, model_state, batch, *, train, key) -> (predictions,
      model_state)`. With `train=False` the state comes back unchanged and `key`
      is not needed.
    features: like `apply`, up to where heads begin: `-> (features,
      model_state)`. None for a model whose tasks share no features.
    heads: `(params, features) -> predictions`. If both are given, `apply`
      equals `heads` after `features`.
  """

  init: Callable[..., tuple[Params, ModelState]]
  apply: Callable[..., tuple[Predictions, ModelState]]
  features: Callable[..., tuple[Any, ModelState]] | None = None
  heads: Callable[[Params, Any], Predictions] | None = None
