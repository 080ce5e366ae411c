"""The losses of a problem under a model, in the form for joint updates."""

import jax

from mtl_jax import gradients
from mtl_jax import losses
from mtl_jax import models
from mtl_jax import types
from mtl_jax.train import step_metrics


def task_losses(
  problem: types.Problem, predictions: types.Predictions, batch: types.Batch
) -> dict[str, jax.Array]:
  """Mean loss of each task over its present labels, {task: scalar}."""
  return {
    task.name: losses.masked_loss(
      task.loss,
      predictions[task.name],
      batch['labels'][task.name],
      batch['mask'][task.name],
    )
    for task in problem.tasks
  }


def objective(
  problem: types.Problem, model: types.Model, *, axis_name: str | None = None
) -> gradients.Objective:
  """The losses of a problem as functions of a model's parameters.

  Args:
    problem: the problem.
    model: the model.
    axis_name: the mapped axis of replicas, which draw their own dropout masks.

  Returns:
    An objective whose functions take `(params, ..., batch, model_state, key)`.
    Their aux averages the model's state and adds up sums of metrics.
  """

  def own(key):
    if axis_name is None:
      return key
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name))

  def found(predictions, batch, model_state=()):
    aux = gradients.Aux(
      mean=model_state,
      sum=step_metrics.metric_sums(problem, predictions, batch),
    )
    return task_losses(problem, predictions, batch), aux

  def loss_fn(params, batch, model_state, key):
    predictions, model_state = model.apply(
      params, model_state, batch, train=True, key=own(key)
    )
    return found(predictions, batch, model_state)

  def features_fn(params, batch, model_state, key):
    features, model_state = model.features(
      params, model_state, batch, train=True, key=own(key)
    )
    return features, gradients.Aux(mean=model_state)

  def head_loss_fn(params, features, batch, model_state, key):
    del model_state, key
    return found(model.heads(params, features), batch)

  def dense_loss_fn(params, dense, batch, model_state, key):
    with models.intercept_dense(dense, params['shared']):
      return loss_fn(params, batch, model_state, key)

  if model.features is None:
    return gradients.Objective(loss_fn)
  return gradients.Objective(loss_fn, features_fn, head_loss_fn, dense_loss_fn)
