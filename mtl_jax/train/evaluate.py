"""The evaluation of a model on a split, batch by batch."""

from collections.abc import Callable
from typing import Any

from mtl_jax import types
from mtl_jax.train import step_metrics


def make_eval_step(
  problem: types.Problem, model: types.Model
) -> Callable[..., Any]:
  """Makes the evaluation of one batch.

  Args:
    problem: the problem.
    model: the model.

  Returns:
    A pure function `(params, model_state, batch) -> sums`; a tree of arrays to
    be added up over a split's batches and passed to `finish_eval`.
  """
  with_loss = step_metrics.with_loss(problem)

  def step(params, model_state, batch):
    batch = problem.preprocess(batch)
    predictions, _ = model.apply(params, model_state, batch, train=False)
    return step_metrics.metric_sums(with_loss, predictions, batch)

  return step


def finish_eval(problem: types.Problem, sums: Any) -> dict[str, float]:
  """The metrics of a split from its sums.

  Args:
    problem: the problem.
    sums: results of the evaluation step, added up over all batches.

  Returns:
    `{'<task>/loss': mean loss, '<task>/<metric>': value}`; NaN for a task
    without a label in the split.
  """
  values = step_metrics.finish(step_metrics.with_loss(problem), sums)
  return {name: float(value) for name, value in values.items()}
