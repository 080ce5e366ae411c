"""What a user passes by mistake is named in an error, with the mend."""

import jax.numpy as jnp
import optax
import pytest

import mtl_jax

NAMES = ('a', 'b')
PARAMS = {
  'shared': jnp.zeros(3),
  'heads': {'a': jnp.zeros((2, 1)), 'b': jnp.zeros(4)},
}
GRADS = {
  'shared': jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]),
  'heads': {'a': jnp.ones((2, 1)), 'b': jnp.ones(4)},
}
WRAPPERS = {
  'shared_only': lambda x: mtl_jax.shared_only(x, NAMES),
  'flat_minima': lambda x: mtl_jax.flat_minima(x, NAMES),
  'per_group': lambda x: mtl_jax.per_group(x, 'leaf'),
  'every': lambda x: mtl_jax.every(2, x),
  'cr_mogm': mtl_jax.cr_mogm,
  'combiner': lambda x: mtl_jax.flat_minima(
    mtl_jax.linear(), NAMES, combine='second', combiner=x
  ),
  'gram_update': lambda x: mtl_jax.gram_update(x, NAMES),
}
wrappers = pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)


@wrappers
def test_what_is_no_aggregator_is_refused_where_it_is_wrapped(wrap):
  for value, mend in (
    (optax.sgd(0.1), r'aggregator.*optax\.chain\('),
    (optax.identity(), r'aggregator.*optax\.chain\('),
    (
      optax.chain(mtl_jax.cagrad(), optax.adam(0.1)),
      r'aggregator.*optax\.chain\(',
    ),
    (mtl_jax.gls(), r'aggregator.*weighted\('),
    (mtl_jax.famo(), r'aggregator.*weighted\('),
    (mtl_jax.moml(), 'aggregator.*weighted loss'),
    (mtl_jax.cagrad, r'aggregator.*call it, as in cagrad\(\)'),
    ('cagrad', 'aggregator.*got str'),
  ):
    with pytest.raises(TypeError, match=mend):
      wrap(value)


@pytest.mark.parametrize('wrapper', ['shared_only', 'flat_minima', 'per_group'])
def test_flat_minima_is_outermost(wrapper):
  flat = mtl_jax.flat_minima(mtl_jax.cagrad(), NAMES)
  with pytest.raises(ValueError, match=f'leave {wrapper} out'):
    WRAPPERS[wrapper](flat)


@pytest.mark.parametrize('params', [PARAMS, None], ids=['params', 'no params'])
def test_heads_without_shared_only_are_named_with_the_mend(params):
  tx = optax.chain(mtl_jax.cagrad(), optax.adam(0.1))
  with pytest.raises(ValueError, match='wrap the aggregator, as in shared_on'):
    tx.update(GRADS, tx.init(PARAMS), params)


LOSSES = {'b': jnp.array(3.0), 'a': 2.0}
ACTIVE = {'b': False, 'a': jnp.array(True)}


@pytest.mark.parametrize('wrap', ['shared_only', 'flat_minima'])
def test_losses_and_active_by_name_are_put_in_the_order_of_the_tasks(wrap):
  tx = WRAPPERS[wrap](mtl_jax.weighted(mtl_jax.si()))
  state = tx.init(PARAMS)
  extra = {'grad_fn': lambda task_params: GRADS}
  by_name, _ = tx.update(
    GRADS, state, PARAMS, losses=LOSSES, active=ACTIVE, **extra
  )
  # Task a alone is there, with the weight 1 / 2.
  assert by_name['shared'].tolist() == [0.5, 1, 1.5]
  for argument in ('losses', 'active'):
    given = {'losses': LOSSES, 'active': ACTIVE, argument: {'a': 1.0}}
    with pytest.raises(ValueError, match=f"{argument} must have.*'a', 'b'"):
      tx.update(GRADS, state, PARAMS, **given, **extra)


def test_dictionaries_are_refused_by_name_where_tasks_have_no_names():
  tx = mtl_jax.db_mtl(num_tasks=2)
  grads, params, losses = jnp.eye(2), jnp.zeros(2), jnp.ones(2)
  weighting = mtl_jax.si()
  famo = mtl_jax.famo()
  calls = {
    'losses': (
      lambda: tx.update(grads, tx.init(params), losses=LOSSES),
      lambda: weighting.update(LOSSES, ()),
      lambda: famo.after_step(LOSSES, famo.init(2)),
    ),
    'active': (
      lambda: tx.update(grads, tx.init(params), losses=losses, active=ACTIVE),
      lambda: weighting.update(losses, (), active=ACTIVE),
    ),
  }
  for argument, of_argument in calls.items():
    for call in of_argument:
      with pytest.raises(TypeError, match=rf'{argument} must.*jnp\.stack'):
        call()
