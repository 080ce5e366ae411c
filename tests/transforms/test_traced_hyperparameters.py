"""Numbers of every factory may be traced; what sets shapes is named."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile

import mtl_jax

ROWS = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)
LOSSES = jnp.array([0.5, 1.5, 2.5])
EXTRA = (jnp.asarray(ROWS[::-1]), jnp.asarray(2 * ROWS))
WEIGHTS = (0.2, 0.3, 0.5)
# The numbers of each factory, all of which are traced at once.
AGGREGATORS = {
  'aligned_mtl': {'preference': WEIGHTS},
  'cagrad': {'c': 0.4},
  'cagrad of no radius': {'c': 0.0},
  'con_fig': {'preference': WEIGHTS},
  'conicgrad': {'angle': 30.0},
  'cr_mogm': {'decay': 0.5},
  'db_mtl': {'beta': 0.5, 'beta_decay': 0.5},
  'dualproj': {'preference': WEIGHTS},
  'excess_mtl': {'step_size': 0.1},
  'fairgrad': {'alpha': 2.0},
  'graddrop': {'leak': WEIGHTS, 'seed': 3},
  'gradnorm': {'alpha': 0.5, 'learning_rate': 0.1},
  'gradvac': {'beta': 0.5, 'seed': 3},
  'linear': {'weights': WEIGHTS},
  'moco': {
    'beta': 0.5,
    'beta_decay': 0.4,
    'gamma': 0.3,
    'gamma_decay': 0.2,
    'rho': 0.1,
  },
  'modo': {'gamma': 0.3, 'rho': 0.1},
  'pcgrad': {'seed': 3},
  'random_weights': {'seed': 3},
  'sdmgrad': {
    'lambda_': 0.3,
    'preference': WEIGHTS,
    'learning_rate': 0.2,
    'momentum': 0.4,
  },
  'upgrad': {'preference': WEIGHTS},
}
WEIGHTINGS = {
  'famo': {'gamma': 0.01, 'learning_rate': 0.1, 'min_losses': 0.1},
  'static_weights': {'weights': WEIGHTS},
  'dwa': {'temperature': 3.0},
  'dtp': {'gamma': 0.5, 'alpha': 0.3},
  'uncertainty': {'learning_rate': 0.1, 'initial': 0.2},
  'imtl_l': {'learning_rate': 0.1},
  'cosmos': {'lambda_': 0.3, 'preference': WEIGHTS},
  'pbi': {'theta': 0.3, 'preference': WEIGHTS, 'ideal': 0.1},
  'rlw': {'seed': 3},
  'scheduled_weights': {'schedules': WEIGHTS},
  'stch': {'mu': 0.5, 'preference': WEIGHTS, 'ideal': 0.1},
  'stch of log losses': {'objectives': 'log_losses', 'nadir': WEIGHTS},
}
STATIC = {'dwa': {'steps_per_epoch': 1}}


def _factory(name, rows):
  factory = getattr(mtl_jax, name.split()[0])
  static = STATIC.get(name, {})
  if rows is AGGREGATORS:
    return lambda **numbers: factory(num_tasks=3, **static, **numbers)
  return lambda **numbers: mtl_jax.weighted(
    factory(**static, **numbers), num_tasks=3
  )


CASES = [
  pytest.param(_factory(name, rows), numbers, id=name)
  for rows in (AGGREGATORS, WEIGHTINGS)
  for name, numbers in rows.items()
]


@pytest.mark.parametrize(('factory', 'numbers'), CASES)
def test_a_traced_number_gives_what_the_number_gives(factory, numbers):
  def updates(**numbers):
    tx = factory(**numbers)
    extra = (
      {'extra_grads': EXTRA[: tx.extra_batches]} if tx.extra_batches else {}
    )
    state = tx.init(jnp.zeros(4))
    for _ in range(2):
      found, state = tx.update(jnp.asarray(ROWS), state, losses=LOSSES, **extra)
    return found

  names = {k: v for k, v in numbers.items() if isinstance(v, str)}
  traced = {k: v for k, v in numbers.items() if k not in names}
  found = quick_compile.jit(lambda traced: updates(**traced, **names))(traced)
  expected = quick_compile.jit(lambda: updates(**numbers))()
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


def test_no_factory_is_missing_here():
  known = {name.split()[0] for name in (*AGGREGATORS, *WEIGHTINGS)}
  # Those without a number, those whose numbers are counts, and wrappers.
  known |= {'imtl_g', 'krum', 'mgda', 'nash_mtl', 'trimmed_mean'}
  known |= {'equal_weights', 'gls', 'si', 'first_then'}
  modules = (mtl_jax.transforms.aggregators, mtl_jax.transforms.weightings)
  factories = {
    name
    for module in modules
    for name in module.__all__
    if inspect.isfunction(getattr(mtl_jax, name))
  }
  assert factories <= known


def test_numbers_of_wrappers_and_bilevel_weightings_may_be_traced():
  params = jnp.zeros(4)

  def losses(params, batch):
    return 0.5 * jnp.sum((params[None] - batch) ** 2, axis=1)

  def run(rho, eps, initial, beta):
    tx = mtl_jax.flat_minima(
      mtl_jax.linear(), ('a', 'b', 'c'), rho, rho_heads=rho, eps=eps
    )
    updates, _ = tx.update(
      jnp.asarray(ROWS), tx.init(params), params, grad_fn=lambda own: own
    )
    weights = [
      weighting.update(
        losses,
        params,
        jnp.asarray(ROWS),
        EXTRA[0],
        weighting.init(3, params),
        learning_rate=0.1,
      )[0]
      for weighting in (
        mtl_jax.auto_lambda(initial=initial),
        mtl_jax.forum(rho=rho, beta=beta, inner_steps=1),
      )
    ]
    return updates, weights

  numbers = (0.1, 1e-6, 0.2, 0.5)
  found = quick_compile.jit(run)(*numbers)
  expected = quick_compile.jit(lambda: run(*numbers))()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    found,
    expected,
  )


@pytest.mark.parametrize(
  ('argument', 'factory'),
  [
    ('num_byzantine', lambda n: mtl_jax.krum(n)),
    ('num_selected', lambda n: mtl_jax.krum(1, n)),
    ('trim', lambda n: mtl_jax.trimmed_mean(n)),
    ('num_tasks', lambda n: mtl_jax.cagrad(num_tasks=n)),
    ('warmup', lambda n: mtl_jax.excess_mtl(warmup=n)),
    ('inner_steps', lambda n: mtl_jax.sdmgrad(inner_steps=n)),
    ('inner_steps', lambda n: mtl_jax.forum(inner_steps=n)),
    ('steps_per_epoch', lambda n: mtl_jax.dwa(n)),
    ('k', lambda n: mtl_jax.every(n, mtl_jax.mgda())),
    (
      'max_consecutive',
      lambda n: mtl_jax.skip_nonfinite(optax.identity(), n),
    ),
  ],
)
def test_a_traced_count_is_refused_by_name(argument, factory):
  with pytest.raises(ValueError, match=f'^{argument} must be a Python integer'):
    jax.eval_shape(lambda n: factory(n) and None, jnp.array(1))


def test_a_schedule_of_a_number_is_injected():
  tx = optax.inject_hyperparams(mtl_jax.cagrad)(
    c=optax.linear_schedule(0.0, 0.8, 2)
  )
  state = tx.init(jnp.zeros(4))
  for c in (0.0, 0.4, 0.8):
    found, state = tx.update(jnp.asarray(ROWS), state, jnp.zeros(4))
    plain = mtl_jax.cagrad(c)
    expected, _ = plain.update(jnp.asarray(ROWS), plain.init(jnp.zeros(4)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
