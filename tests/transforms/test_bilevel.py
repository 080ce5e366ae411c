"""Weightings that learn from a validation batch."""

import functools

import batches
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile
import references
from scipy import optimize

import mtl_jax
from mtl_jax.transforms.solvers import constrained

NAN = float('nan')
TASKS, DIMENSIONS = 3, 4
RATE = 0.05
KINDS = {
  'auto_lambda': mtl_jax.auto_lambda,
  'moml': mtl_jax.moml,
  'forum': mtl_jax.forum,
}
ALL = list(KINDS)


def quadratics(seed, tasks=TASKS):
  """Half squared distances, each in a metric of its own."""
  rng = np.random.default_rng(seed)
  roots = rng.standard_normal((tasks, DIMENSIONS, DIMENSIONS))
  # Targets far apart, so that no gradient is nearly zero.
  return {
    'A': np.einsum('tij,tkj->tik', roots, roots) / 4 + 0.3 * np.eye(DIMENSIONS),
    'c': 2 * rng.standard_normal((tasks, DIMENSIONS)),
  }


def loss_fn(params, batch):
  errors = params['w'][None] - batch['c']
  return 0.5 * jnp.einsum('ti,tij,tj->t', errors, batch['A'], errors)


def losses_of(w, batch):
  errors = w - batch['c']
  return 0.5 * np.einsum('ti,tij,tj->t', errors, batch['A'], errors)


def grads_of(w, batch):
  return np.einsum('tij,tj->ti', batch['A'], w - batch['c'])


def params_of(w, dtype=jnp.float32):
  return {'w': jnp.asarray(w, dtype)}


def floats(batch, dtype=jnp.float32):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), batch)


def compiled(weighting, losses=loss_fn, rate=RATE, **options):
  """The update, jitted: `(params, train, valid, state, active=None)`."""

  def update(params, train, valid, state, active=None):
    return weighting.update(
      losses, params, train, valid, state, learning_rate=rate, active=active
    )

  return jax.jit(update, **options)


@functools.cache
def compiled_default(kind):
  """A weighting as its users have it, and its update for all tests."""
  weighting = KINDS[kind]()
  return weighting, compiled(weighting)


class Adam:
  """Kingma and Ba 2015, Algorithm 1."""

  def __init__(self, rate):
    self.rate, self.m, self.v, self.t = rate, 0.0, 0.0, 0

  def __call__(self, values, gradient):
    self.t += 1
    self.m = 0.9 * self.m + 0.1 * gradient
    self.v = 0.999 * self.v + 0.001 * gradient**2
    m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
    return values - self.rate * m / (np.sqrt(v) + 1e-8)


class Sgd:
  """Does not forget, as Adam does, how large a derivative is."""

  def __init__(self, rate):
    self.rate = rate

  def __call__(self, values, gradient):
    return values - self.rate * gradient


OPTIMIZERS = {'adam': (optax.adam, Adam), 'sgd': (optax.sgd, Sgd)}


def softmax(x):
  powers = np.exp(x - x.max())
  return powers / powers.sum()


def softmax_jacobian(x):
  shares = softmax(x)
  return np.diag(shares) - np.outer(shares, shares)


class AutoLambda:
  """Liu et al. 2022: the derivative of the meta-loss through one step."""

  def __init__(self, tasks, primary=None, optimizer=None):
    self.lambdas = np.full(tasks, 0.1)
    self.primary = list(range(tasks)) if primary is None else list(primary)
    self.optimizer = optimizer

  def __call__(self, w, train, valid):
    G = grads_of(w, train)
    ahead = w - RATE * self.lambdas @ G
    meta = grads_of(ahead, valid)[self.primary].sum(axis=0)
    self.lambdas = self.optimizer(self.lambdas, -RATE * G @ meta)
    return self.lambdas


class Moml:
  """Ye et al. 2021: MGDA over the hypergradients of one step."""

  def __init__(self, tasks, normalization='none', optimizer=None):
    self.logits = np.full(tasks, 1 / tasks)
    self.normalization = normalization
    self.optimizer = optimizer

  def __call__(self, w, train, valid):
    G = grads_of(w, train)
    ahead = w - RATE * softmax(self.logits) @ G
    H = -RATE * grads_of(ahead, valid) @ G.T @ softmax_jacobian(self.logits)
    divisors = {
      'none': np.ones(len(H)),
      'l2': np.linalg.norm(H, axis=1),
      'loss': losses_of(ahead, valid),
    }[self.normalization]
    gamma = references.least_norm_weights(H / divisors[:, None])
    self.logits = self.optimizer(self.logits, gamma @ H)
    return softmax(self.logits)


def direction(F, q, rho):
  """Ye et al. 2024: min_d max_k F_k d + |d|^2 / 2, q d <= -rho |q|^2.

  The primal problem in (d, worst); its multipliers are read off d afterwards,
  which is a combination of independent rows.
  """
  size = F.shape[1]
  start = np.append(-rho * q, 0.0)
  start[-1] = (F @ start[:-1]).max()
  found = optimize.minimize(
    lambda x: x[-1] + 0.5 * x[:-1] @ x[:-1],
    start,
    jac=lambda x: np.append(x[:-1], 1.0),
    constraints=[
      {
        'type': 'ineq',
        'fun': lambda x: x[-1] - F @ x[:-1],
        'jac': lambda x: np.c_[-F, np.ones(len(F))],
      },
      {
        'type': 'ineq',
        'fun': lambda x: -q @ x[:-1] - rho * q @ q,
        'jac': lambda x: np.append(-q, 0.0)[None],
      },
    ],
    method='SLSQP',
    options={'maxiter': 1000, 'ftol': 1e-15},
  )
  d = found.x[:size]
  multipliers, *_ = np.linalg.lstsq(-np.c_[F.T, q], d, rcond=None)
  return d, multipliers[:-1]


class Forum:
  """Ye et al. 2024, Algorithm 1, on the variables (logits, parameters)."""

  def __init__(
    self, tasks, rho=0.1, steps=5, normalization='none', optimizer=None
  ):
    self.logits = np.full(tasks, 1 / tasks)
    self.rho, self.steps, self.normalization = rho, steps, normalization
    self.average, self.k, self.optimizer = np.zeros(tasks), 0, optimizer

  def __call__(self, w, train, valid):
    tasks, shares = len(self.logits), softmax(self.logits)
    inner = w
    for _ in range(self.steps):
      inner = inner - RATE * shares @ grads_of(inner, train)
    gap = losses_of(w, train) - losses_of(inner, train)
    q = np.concatenate(
      [softmax_jacobian(self.logits) @ gap, shares @ grads_of(w, train)]
    )
    V = grads_of(w, valid)
    lengths = np.ones(tasks)
    if self.normalization == 'l2':
      lengths = np.linalg.norm(V, axis=1)
    F = np.c_[np.zeros((tasks, tasks)), V / lengths[:, None]]
    _, multipliers = direction(F, q, self.rho)
    self.k += 1
    self.average += self.k**-0.75 * (multipliers - self.average)
    nu = max(self.rho - q @ (self.average @ F) / (q @ q), 0)
    self.d = -(self.average @ F + nu * q)
    self.logits = self.optimizer(self.logits, -self.d[:tasks])
    return self.average / lengths + nu * shares


CASES = {
  'auto_lambda': (mtl_jax.auto_lambda, AutoLambda, {}),
  'auto_lambda primary': (
    mtl_jax.auto_lambda,
    AutoLambda,
    {'primary': (2, 0)},
  ),
  'moml': (mtl_jax.moml, Moml, {}),
  'moml l2': (mtl_jax.moml, Moml, {'normalization': 'l2'}),
  'moml loss': (mtl_jax.moml, Moml, {'normalization': 'loss'}),
  'forum': (mtl_jax.forum, Forum, {}),
  'forum l2': (mtl_jax.forum, Forum, {'normalization': 'l2'}),
  # So large that the constraint is never met by itself.
  'forum rho': (mtl_jax.forum, Forum, {'rho': 1.5}),
}


@pytest.mark.parametrize(
  ('case', 'optimizer'),
  [
    *((case, 'sgd') for case in CASES),
    *((kind, 'adam') for kind in ALL),
  ],
)
def test_three_steps_of_training_are_those_of_the_paper(case, optimizer):
  factory, reference, arguments = CASES[case]
  ours, theirs = OPTIMIZERS[optimizer]
  # A rate of the weights at which three steps are more than rounding.
  weighting = factory(optimizer=ours(0.03), **arguments)
  reference = reference(TASKS, optimizer=theirs(0.03), **arguments)
  train, valid = quadratics(11), quadratics(21)
  w = np.random.default_rng(1).standard_normal(DIMENSIONS)
  expected = w.copy()
  update = compiled(weighting, donate_argnums=3)
  state = weighting.init(TASKS, params_of(w))
  for _ in range(3):
    old = state
    weights, state = update(params_of(w), floats(train), floats(valid), old)
    # It can be donated again and again.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old[0]))
    right = reference(expected, train, valid)
    np.testing.assert_allclose(weights, right, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(state.task_weights, weights)
    shown = mtl_jax.diagnostics(state)
    np.testing.assert_array_equal(shown['task_weights'], weights)
    w = w - 0.02 * np.asarray(weights, np.float64) @ grads_of(w, train)
    expected = expected - 0.02 * right @ grads_of(expected, train)
  assert update._cache_size() == 1


@pytest.mark.parametrize(
  ('kind', 'extra', 'start', 'rate'),
  [
    ('auto_lambda', {}, 0.1, 1e-4),
    ('moml', {}, 1 / TASKS, 1e-3),
    ('forum', {'rho': 3.0}, 1 / TASKS, 1e-3),
  ],
)
def test_weights_begin_and_learn_as_in_the_authors_code(
  kind, extra, start, rate
):
  weighting = KINDS[kind](**extra)
  params = params_of(np.ones(DIMENSIONS))
  both = floats(quadratics(10)), floats(quadratics(20))
  before = weighting.init(TASKS, params)
  np.testing.assert_allclose(before[0], start, rtol=1e-6)
  _, after = compiled(weighting)(params, *both, before)
  # The first step of Adam is as long as its rate, whatever the derivative.
  np.testing.assert_allclose(np.abs(after[0] - before[0]), rate, rtol=1e-2)


def network_losses(params, batch):
  """Two tasks on a small network that is nowhere linear."""
  hidden = jnp.tanh(batch['x'] @ params['shared'])
  outputs = jnp.stack([hidden @ head for head in params['heads']])
  return jnp.mean(jnp.cosh(outputs - batch['y']), axis=1)


def network():
  rng = np.random.default_rng(3)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  params = {'shared': draw(5, 6), 'heads': [draw(6), draw(6), draw(6)]}
  halves = [{'x': draw(8, 5), 'y': draw(3, 8)} for _ in range(2)]
  return params, *halves


@pytest.mark.parametrize('primary', [None, (0,), (1, 2)])
def test_hypergradient_of_auto_lambda_is_exact(primary):
  with jax.enable_x64(True):
    params, train, valid = network()
    weighting = mtl_jax.auto_lambda(primary=primary, initial=0.3)
    update = compiled(weighting, network_losses, 0.05)
    _, state = update(params, train, valid, weighting.init(3, params))
    counted = np.arange(3) if primary is None else np.array(primary)

    @jax.jit
    def meta_loss(lambdas):
      grads = jax.grad(lambda p: lambdas @ network_losses(p, train))(params)
      ahead = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
      return network_losses(ahead, valid)[counted].sum()

    lambdas, step = np.full(3, 0.3), 1e-5
    differences = [
      (meta_loss(lambdas + step * e) - meta_loss(lambdas - step * e)) / 2 / step
      for e in np.eye(3)
    ]
    np.testing.assert_allclose(state.hypergradient, differences, rtol=1e-7)


def test_moml_moves_along_the_derivative_of_its_look_ahead():
  # The weighted sum of validation losses falls as its slope says, and so does
  # each of them: the direction is one of common descent.
  with jax.enable_x64(True):
    params, train, valid = network()
    weighting = mtl_jax.moml(optimizer=optax.sgd(1.0))
    start = weighting.init(3, params)
    update = compiled(weighting, network_losses, 0.05)
    _, state = update(params, train, valid, start)

    @jax.jit
    def valid_losses(logits):
      shares = jax.nn.softmax(logits)
      grads = jax.grad(lambda p: shares @ network_losses(p, train))(params)
      ahead = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
      return network_losses(ahead, valid)

    move, step = state.logits - start.logits, 1e-4
    slopes = (
      valid_losses(start.logits + step * move)
      - valid_losses(start.logits - step * move)
    ) / (2 * step)
    square = move @ move
    assert square > 1e-8
    np.testing.assert_allclose(
      state.objective_weights @ slopes, -square, rtol=1e-6
    )
    assert np.all(slopes <= -square * (1 - 1e-4))


# The constraint is met by itself, or it is not.
@pytest.mark.parametrize(
  ('tasks', 'rho'),
  [(3, 0.01), (3, 0.5), (3, 3.0), (1, 0.5), (2, 0.5), (6, 0.5)],
)
def test_forum_direction_solves_the_problem_of_the_paper(tasks, rho):
  weighting = mtl_jax.forum(rho=rho, inner_steps=1, optimizer=optax.sgd(1.0))
  update = compiled(weighting)
  for seed in range(4):
    train, valid = quadratics(30 + seed, tasks), quadratics(40 + seed, tasks)
    w = np.random.default_rng(seed).standard_normal(DIMENSIONS)
    start = weighting.init(tasks, params_of(w))
    weights, state = update(params_of(w), floats(train), floats(valid), start)
    shares = np.full(tasks, 1 / tasks)
    train_grad = shares @ grads_of(w, train)
    gap = losses_of(w, train) - losses_of(w - RATE * train_grad, train)
    q = np.append(softmax_jacobian(shares) @ gap, train_grad)
    V = grads_of(w, valid)
    right, _ = direction(np.c_[np.zeros((tasks, tasks)), V], q, rho)
    moved = np.append(
      state.logits - start.logits,
      -np.asarray(state.valid_weights) @ V
      - np.asarray(state.train_weights) @ grads_of(w, train),
    )
    np.testing.assert_allclose(
      moved, right, atol=2e-4 * np.linalg.norm(right), rtol=1e-3
    )
    assert q @ moved <= -rho * (q @ q) * (1 - 1e-4)
    np.testing.assert_allclose(
      weights, state.valid_weights + state.train_weights
    )
    assert float(state.residual) < 1e-4


def test_forum_is_right_for_gradients_of_very_different_lengths():
  weighting = mtl_jax.forum(rho=0.5, inner_steps=1)
  params = params_of(np.zeros(DIMENSIONS))
  update, start = compiled(weighting), weighting.init(TASKS, params)
  for scales in ((1, 1e-3, 1e3), (1e-4, 1, 1), (0, 1, 1)):
    train, valid = quadratics(50), quadratics(60)
    valid['A'] = valid['A'] * np.array(scales)[:, None, None]
    _, state = update(params, floats(train), floats(valid), start)
    assert float(state.residual) < 1e-4, scales
    assert np.all(np.isfinite(state.task_weights)), scales
    np.testing.assert_allclose(jnp.sum(state.valid_weights), 1, rtol=1e-5)


_LEAST_WORST = batches.batched(
  lambda gram, inner, square: constrained.least_worst(
    gram, constrained.Constraint(inner, square, 0.1), jnp.ones(40, bool)
  )
)


@pytest.mark.parametrize('towards', [-1, 0, 1])
def test_forum_finds_its_direction_for_many_tasks(towards):
  # With q opposed to the mean of the tasks closing the gap undoes their gain.
  rng = np.random.default_rng(0)
  problems = []
  for _ in range(30):
    lengths = 10.0 ** rng.uniform(-2, 2, (40, 1))
    J = lengths * rng.standard_normal((40, 60))
    q = towards * J.mean(axis=0) + (not towards) * rng.standard_normal(60)
    problems.append((J, q))
  solutions = _LEAST_WORST([(J @ J.T, J @ q, q @ q) for J, q in problems])
  for (J, q), found in zip(problems, solutions, strict=True):
    assert found.residual < 1e-4
    # The residual is right: no other task gains less along the direction.
    w = found.weights
    d = w @ J + max(0.1 - q @ (w @ J) / (q @ q), 0) * q
    terms = w @ np.linalg.norm(J, axis=1) + np.linalg.norm(d - w @ J)
    shortfall = (w @ J @ d - J @ d) / np.linalg.norm(J, axis=1)
    assert shortfall.max() < 1e-3 * terms


def test_forum_averages_multipliers_by_beta():
  train, valid = floats(quadratics(10)), floats(quadratics(20))
  params = params_of(np.ones(DIMENSIONS))

  def run(beta, state):
    update = compiled(mtl_jax.forum(beta=beta))
    return update(params, train, valid, state)[1].multipliers

  state = mtl_jax.forum().init(TASKS, params)
  newest, mixed = run(1.0, state), run(0.25, state)
  np.testing.assert_allclose(
    mixed, 0.25 * newest + 0.75 * state.multipliers, rtol=1e-5
  )
  schedule = lambda count: jnp.where(count < 1, 0.25, 1.0)
  np.testing.assert_allclose(run(schedule, state), mixed, rtol=1e-5)
  later = state._replace(count=state.count + 1)
  np.testing.assert_allclose(run(schedule, later), newest, rtol=1e-5)


def _masked(params, batch):
  """The losses; what stands for an absent task has a finite gradient."""
  safe = jax.tree.map(
    lambda x: jnp.where(
      batch['there'].reshape((-1,) + (1,) * (x.ndim - 1)), x, 0
    ),
    {'A': batch['A'], 'c': batch['c']},
  )
  return jnp.where(batch['there'], loss_fn(params, safe), batch['instead'])


@functools.cache
def _absent(kind):
  """The weighting, and its update with and without a task to leave out."""
  # With so large a rho the constraint, and with it the logits, always move.
  extra = {'rho': 3.0} if kind == 'forum' else {}
  weighting = KINDS[kind](optimizer=optax.adam(0.03), **extra)
  return weighting, compiled(weighting, _masked), compiled(weighting)


@pytest.mark.parametrize('kind', ALL)
@pytest.mark.parametrize('absent', [0, 1, 2])
def test_absent_task_is_as_if_it_were_not_there(kind, absent):
  for instead in (NAN, float('inf'), 7.0):
    _assert_absent(kind, absent, instead)


def _assert_absent(kind, absent, instead):
  weighting, masked, plain = _absent(kind)
  there = np.arange(TASKS) != absent
  params = params_of(np.ones(DIMENSIONS))
  extra = {'there': jnp.asarray(there), 'instead': jnp.float32(instead)}
  # All are there at first, so that the optimizer has momentum for each.
  _, state = plain(
    params,
    floats(quadratics(1)),
    floats(quadratics(2)),
    weighting.init(TASKS, params),
  )
  other = jax.tree.map(
    lambda x: x[there] if x.shape == there.shape else x, state
  )
  for seed in range(3):
    batches = quadratics(10 + seed), quadratics(20 + seed)
    expected, other = plain(
      params,
      *[floats({k: x[there] for k, x in batch.items()}) for batch in batches],
      other,
    )
    for batch in batches:
      batch['A'][absent], batch['c'][absent] = NAN, NAN
    before = state
    weights, state = masked(
      params,
      *[floats(batch) | extra for batch in batches],
      before,
      active=jnp.asarray(there),
    )
    np.testing.assert_allclose(weights[there], expected, rtol=1e-4, atol=1e-5)
    assert weights[absent] == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    for old, new in (
      (before[0], state[0]),
      (before.opt_state[0].mu, state.opt_state[0].mu),
      (before.opt_state[0].nu, state.opt_state[0].nu),
    ):
      assert old[absent] == new[absent]
      # Two opposed hypergradients move nothing.
      assert kind == 'moml' or np.all(old[there] != new[there])
    if kind == 'forum':
      # The others divide the rest of the simplex among themselves.
      assert before.multipliers[absent] == state.multipliers[absent]
      np.testing.assert_allclose(jnp.sum(state.multipliers), 1, rtol=1e-6)


@pytest.mark.parametrize('kind', ALL)
def test_no_active_task_changes_nothing(kind):
  weighting, run = compiled_default(kind)
  params = params_of(np.ones(DIMENSIONS))
  train, valid = floats(quadratics(10)), floats(quadratics(20))
  update = functools.partial(run, params, train, valid)
  _, before = update(weighting.init(TASKS, params), jnp.ones(TASKS, bool))
  weights, after = update(before, jnp.zeros(TASKS, bool))
  np.testing.assert_array_equal(weights, 0)
  for name in ('lambdas', 'logits', 'multipliers', 'count', 'opt_state'):
    if hasattr(before, name) and name in before._fields:
      jax.tree.map(
        np.testing.assert_array_equal,
        getattr(after, name),
        getattr(before, name),
      )
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))


@pytest.mark.parametrize('kind', ALL)
def test_zero_gradients_change_no_weight(kind):
  weighting = KINDS[kind]()
  params = {'w': jnp.zeros(DIMENSIONS)}
  update = compiled(weighting, lambda *args: loss_fn(*args) * 0 + 1)
  for tasks in (1, 3):
    batch, state = floats(quadratics(10, tasks)), weighting.init(tasks, params)
    weights, after = update(params, batch, batch, state)
    np.testing.assert_array_equal(after[0], state[0])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    np.testing.assert_allclose(weights, weights[0])


def _types(tree):
  shapes = jax.tree.map(jax.typeof, tree)
  return jax.tree.structure(shapes), [
    (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(shapes)
  ]


@pytest.mark.parametrize('kind', ALL)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'float64'])
def test_state_keeps_structure_shape_and_dtype(kind, dtype):
  with jax.enable_x64(dtype == 'float64'):
    weighting = KINDS[kind]()
    params = params_of(np.ones(DIMENSIONS), dtype)
    state = weighting.init(TASKS, params)
    wide = jnp.promote_types(dtype, jnp.float32)
    for rate, active in (
      (0.1, None),
      (jnp.asarray(0.1, jnp.float32), jnp.array([True, False, True])),
    ):
      weights, after = jax.eval_shape(
        lambda *args, rate=rate, active=active: weighting.update(
          loss_fn, *args, learning_rate=rate, active=active
        ),
        params,
        floats(quadratics(10), dtype),
        floats(quadratics(20), dtype),
        state,
      )
      assert (weights.shape, weights.dtype) == ((TASKS,), wide)
      assert _types(after) == _types(state)


def test_eager_updates_are_the_jitted_ones():
  weighting, update = compiled_default('auto_lambda')
  params = params_of(np.ones(DIMENSIONS))
  state = eager = weighting.init(TASKS, params)
  for seed in range(2):
    both = floats(quadratics(10 + seed)), floats(quadratics(20 + seed))
    weights, state = update(params, *both, state)
    expected, eager = weighting.update(
      loss_fn, params, *both, eager, learning_rate=RATE
    )
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ALL)
def test_another_learning_rate_does_not_compile_again(kind):
  weighting = KINDS[kind]()
  params, batch = params_of(np.ones(DIMENSIONS)), floats(quadratics(10))
  traces = []

  def update(state, rate):
    traces.append(None)
    return weighting.update(
      loss_fn, params, batch, batch, state, learning_rate=rate
    )

  run, state = jax.jit(update), weighting.init(TASKS, params)
  for rate in (0.1, 0.05):
    _, state = run(state, rate)
  assert len(traces) == 1


def test_helping_task_gains_weight_and_harming_task_loses_it():
  # The second task pulls where the first one does, the third one away.
  batch = {
    'A': np.stack([np.eye(DIMENSIONS)] * 3),
    'c': np.stack([np.eye(DIMENSIONS)[0] * x for x in (3.0, 4.0, -3.0)]),
  }
  batch = floats(batch)
  params = params_of(np.zeros(DIMENSIONS))
  for kind, extra in (('auto_lambda', {'primary': (0,)}), ('moml', {})):
    weighting = KINDS[kind](**extra)
    # MOML has no primary task: all losses count, so that the third is left out
    # of the validation batch by making its loss there the first one's.
    valid = batch | {'c': batch['c'].at[2].set(batch['c'][0])}
    update, state = compiled(weighting), weighting.init(3, params)
    for _ in range(20):
      weights, state = update(params, batch, valid, state)
    first = 0.1 if kind == 'auto_lambda' else 1 / 3
    assert weights[1] > first > weights[2], kind
    assert weights[1] >= weights[0], kind


def test_cost_of_auto_lambda_does_not_grow_with_tasks():
  def flops(tasks):
    weighting = mtl_jax.auto_lambda()
    shared = jnp.zeros((64, 64))
    heads = jnp.zeros((tasks, 64))

    def losses(params, x):
      hidden = jnp.tanh(jnp.tanh(x @ params[0]) @ params[0])
      return jnp.mean((hidden @ params[1].T) ** 2, axis=0)

    update = jax.jit(
      lambda params, x, state: weighting.update(
        losses, params, x, x, state, learning_rate=0.1
      )
    )
    params = (shared, heads)
    args = params, jnp.zeros((128, 64)), weighting.init(tasks, params)
    return (
      update.lower(*args)
      .compile(quick_compile.DEFAULTS)
      .cost_analysis()['flops']
    )

  assert flops(8) < 1.15 * flops(2)


@pytest.mark.parametrize('kind', ALL)
def test_losses_and_active_must_have_one_entry_a_task(kind):
  weighting = KINDS[kind]()
  params = params_of(np.ones(DIMENSIONS))
  batch = floats(quadratics(10))
  state = weighting.init(TASKS, params)
  with pytest.raises(ValueError, match=r'losses must have shape \(3,\)'):
    weighting.update(
      lambda params, batch: loss_fn(params, batch)[:2],
      params,
      batch,
      batch,
      state,
      learning_rate=RATE,
    )
  with pytest.raises(ValueError, match=r'active must have shape \(3,\)'):
    weighting.update(
      loss_fn,
      params,
      batch,
      batch,
      state,
      learning_rate=RATE,
      active=jnp.ones(2, bool),
    )


WRONG = {
  'auto_lambda': [
    ('primary', ()),
    ('primary', (0, -1)),
    ('primary', (1, 1)),
    ('primary', (0.5,)),
    ('primary', 0),
    ('initial', 0.0),
    ('initial', NAN),
    ('optimizer', 0.1),
  ],
  'moml': [('normalization', 'loss+'), ('optimizer', 'adam')],
  'forum': [
    ('rho', 0.0),
    ('rho', float('inf')),
    ('inner_steps', 0),
    ('normalization', 'loss'),
    ('beta', 1.5),
    ('beta', NAN),
    ('optimizer', 0.1),
  ],
}


@pytest.mark.parametrize('kind', ALL)
def test_factory_names_argument_and_value_it_refuses(kind):
  for argument, value in WRONG[kind]:
    with pytest.raises((ValueError, TypeError)) as error:
      KINDS[kind](**{argument: value})
    message = str(error.value)
    assert argument in message and str(value) in message, (argument, value)


def test_init_refuses_tasks_that_do_not_exist():
  params = params_of(np.ones(DIMENSIONS))
  with pytest.raises(ValueError, match=r'primary is \(0, 2\).* 2 tasks'):
    mtl_jax.auto_lambda(primary=(0, 2)).init(2, params)
  for kind in ALL:
    with pytest.raises(ValueError, match=r'num_tasks must .* 1, got 0'):
      KINDS[kind]().init(0, params)


@pytest.mark.parametrize('kind', ALL)
def test_a_batch_that_is_not_finite_leaves_nothing_in_what_is_learnt(kind):
  weighting, update = compiled_default(kind)
  params = params_of(np.ones(DIMENSIONS))
  good = {'train': floats(quadratics(0)), 'valid': floats(quadratics(1))}
  _, before = update(params, *good.values(), weighting.init(TASKS, params))
  learnt = lambda state: {
    name: value
    for name, value in state._asdict().items()
    if name in ('lambdas', 'logits', 'multipliers', 'count', 'opt_state')
  }
  for half in good:
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), good[half])
    _, after = update(params, *{**good, half: bad}.values(), before)
    # What does not depend on the task that is not finite may be learnt.
    for leaf in jax.tree.leaves(learnt(after)):
      assert np.all(np.isfinite(leaf)), half
    _, alone = update(params, *good.values(), after)
    for leaf in jax.tree.leaves(alone):
      assert np.all(np.isfinite(leaf)), half
  all_bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good)
  _, after = update(params, *all_bad.values(), before)
  jax.tree.map(np.testing.assert_array_equal, learnt(after), learnt(before))
