"""Diagnostics of the aggregators in an optimizer's state."""

from typing import Any

import jax

from mtl_jax.transforms.contract import variables


def _shows(node: Any) -> bool:
  return callable(getattr(node, 'diagnostics', None))


def diagnostics(opt_state: Any) -> dict[str, jax.Array]:
  """Finds the aggregators in a state and reads their diagnostics.

  Args:
    opt_state: state of a joint update, or of any optax transformation, such as
      a chain; also as `flax.nnx.Optimizer` holds it.

  Returns:
    A flat dictionary of diagnostics from the last update. From an aggregator
    made with `num_tasks`:

    * `'task_weights'` [T]: coefficients of the update in the task gradients;
    * `'gram'` [T, T]: inner products of the task gradients;
    * `'gradient_norms'` [T]: their lengths;
    * `'conflict'`: share of pairs of tasks with a negative inner product;
    * `'mean_cosine'`: cosine of the update with the mean gradient;
    * `'residual'`: relative residual of the solver, if there is one.

    From `weighted_update` `'task_weights'`. From a bilevel weighting's state
    `'task_weights'`, `'residual'` and its
    further quantities: `'hypergradient'` (`auto_lambda`), `'objective_weights'`
    (`moml`), `'valid_weights'` and `'train_weights'` (`forum`). From
    `skip_nonfinite` `'skipped'`, the number of skipped updates.

    `flat_minima` shows these twice, as `'loss/...'` and `'flat/...'`. The
    dictionary is empty if there are none. If a state holds several aggregators,
    each name is preceded by the path in the state.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> tx = optax.chain(mtl_jax.linear(num_tasks=2), optax.sgd(0.1))
    >>> state = tx.init(jnp.zeros(2))
    >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> _, state = tx.update(task_grads, state)
    >>> shown = mtl_jax.diagnostics(state)
    >>> print(shown['task_weights'], shown['conflict'])
    [0.5 0.5] 1.0
  """
  found = [
    (path, node)
    for path, node in jax.tree_util.tree_leaves_with_path(
      variables.unwrapped(opt_state), is_leaf=_shows
    )
    if _shows(node)
  ]
  if len(found) == 1:
    return found[0][1].diagnostics()
  return {
    f'{jax.tree_util.keystr(path, simple=True, separator="/")}/{name}': value
    for path, node in found
    for name, value in node.diagnostics().items()
  }
