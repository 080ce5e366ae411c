"""Losses of classification tasks."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Cross-entropy of a softmax with integer labels.

  A label outside 0 ... C - 1 has the loss NaN, which makes the fault visible,
  and no gradient. If it marks a missing label, `masked_mean` and `masked_loss`
  skip it.

  Args:
    logits: unnormalized log-probabilities [B, ..., C].
    label: classes [B, ...], integers.

  Returns:
    The loss of each example [B, ...], in nats.

  Raises:
    TypeError: if `label` does not hold integers.
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> from mtl_jax import losses
    >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> [f'{x:.4f}' for x in losses.cross_entropy(logits, jnp.array([1, 0]))]
    ['0.2877', '0.6931']
  """
  if not jnp.issubdtype(label.dtype, jnp.integer):
    raise TypeError(f'label must hold integers, got {label.dtype}')
  if logits.ndim < 1 or logits.shape[:-1] != label.shape:
    raise ValueError(
      f'logits must be label.shape + (classes,), got logits {logits.shape} and'
      f' label {label.shape}'
    )
  known = (label >= 0) & (label < logits.shape[-1])
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.where(known, label, 0)
  )
  return jnp.where(known, loss, jnp.nan)
