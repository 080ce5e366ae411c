"""Replicas that perturb by their own gradients (m-sharpness)."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import quadratics
import quick_compile
import references

import mtl_jax

DEVICES = 8
NAMES = quadratics.NAMES
PRESENT = range(2)  # The last task has no labels anywhere.
RADII = {'rho': 0.3, 'rho_heads': 0.6}


def make(seed):
  """What each replica has of the tasks: its own quadratics, at one point.

  Replica 0 has no labels of the first task, whose gradient there is zero.
  """
  first = quadratics.Quadratics.random(seed=seed)
  found = []
  for device in range(DEVICES):
    own = quadratics.Quadratics.random(seed=100 * seed + device)
    if device == 0:
      own = dataclasses.replace(
        own, A=own.A * (np.arange(3) > 0)[:, None, None]
      )
    found.append(
      dataclasses.replace(own, shared=first.shared, heads=first.heads)
    )
  return found


# Of the batch itself, and of the further ones that `modo` asks for.
BATCHES = make(1), make(2), make(3)
PARAMS = BATCHES[0][0].params

# What is perturbed and aggregated how, and the aggregator in NumPy.
CASES = {
  'linear': (mtl_jax.linear, {}, lambda J: references.linear(J, None)[0]),
  'mgda': (mtl_jax.mgda, {}, lambda J: references.mgda('none')(J, None)[0]),
  'imtl_g, direct': (
    mtl_jax.imtl_g,
    {'combine': 'direct'},
    lambda J: references.imtl_g(J, None)[0],
  ),
  'mgda, joint asam': (
    mtl_jax.mgda,
    {'norm': 'joint', 'adaptive': True},
    lambda J: references.mgda('none')(J, None)[0],
  ),
}


def update(
  params,
  batches,
  *,
  aggregator,
  options,
  perturbation='per_device',
  active=(True, True, False),
):
  """The update of one replica, from its (A, c) of each of the batches."""

  def grads(batch, task_params):
    shared, heads = quadratics.vectors(task_params, NAMES, jnp)
    x = jnp.concatenate([shared, heads], axis=1)
    A, c = (leaf[0] for leaf in batch)
    g = jnp.einsum('tij,tj->ti', A, x - c, precision='highest')
    # Whatever the absent task has to say, nobody must hear it.
    g = jnp.where(jnp.arange(3)[:, None] < len(PRESENT), g, jnp.nan)
    return quadratics.tree(g[:, :6], g[:, 6:])

  stacked = params | {
    'shared': jax.tree.map(lambda p: jnp.stack([p] * 3), params['shared'])
  }
  tx = mtl_jax.flat_minima(
    aggregator, NAMES, **RADII, **options, perturbation=perturbation
  )
  extra = batches[1:][: tx.extra_batches]
  return tx.update(
    grads(batches[0], stacked),
    tx.init(params),
    params,
    grad_fn=functools.partial(grads, batches[0]),
    extra_grads=tuple(grads(batch, stacked) for batch in extra),
    extra_grad_fn=lambda own: tuple(grads(batch, own) for batch in extra),
    losses=jnp.ones(3),
    active=active and jnp.array(active),
  )[0]


def updates_of(names, params, batches, axis_name='data'):
  found = {
    name: update(
      params, batches, aggregator=factory(axis_name=axis_name), options=options
    )
    for name, (factory, options, _) in CASES.items()
    if name in names
  }
  if 'modo' in names:
    modo = mtl_jax.modo(gamma=0.5, axis_name=axis_name)
    found['modo'] = update(params, batches, aggregator=modo, options={})
  return found


def data(batches=BATCHES):
  as_jax = lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32)
  return [
    (as_jax(*(q.A for q in batch)), as_jax(*(q.c for q in batch)))
    for batch in batches
  ]


def mapped(fn, *, check_vma=False, devices=DEVICES):
  mesh = jax.make_mesh(
    (devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  return quick_compile.jit(
    jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=P(),
      check_vma=check_vma,
    )
  )


PLACES = {
  'shard_map': (*CASES, 'modo'),
  'shard_map with check_vma': (*CASES, 'modo'),
  # Slow to compile.
  'pmap': ('imtl_g, direct', 'modo'),
}
PLACES_AND_CASES = [
  (place, name)
  for place, names in PLACES.items()
  for name in names
  if name in CASES
]


@functools.cache
def results(place):
  fn = functools.partial(updates_of, PLACES[place])
  if place == 'pmap':
    apart = jax.tree.map(lambda x: x[:, None], data())
    found = jax.pmap(fn, axis_name='data', in_axes=(None, 0))(PARAMS, apart)
    return jax.tree.map(lambda x: np.asarray(x[0]), found)
  check_vma = place == 'shard_map with check_vma'
  found = mapped(fn, check_vma=check_vma)(PARAMS, data())
  return jax.tree.map(np.asarray, found)


def gradients_by_hand(batch=0, **perturbation):
  """Means over replicas of loss and SAM gradients, each [2, 9]."""
  g, s = [], []
  for first, own in zip(BATCHES[0], BATCHES[batch], strict=True):
    first, own = first.take(PRESENT), own.take(PRESENT)
    at = np.concatenate([np.tile(first.shared, (2, 1)), first.heads], axis=1)
    # Without labels there is no direction (0 / 0) and no perturbation.
    with np.errstate(invalid='ignore'):
      moved = first.perturbed(**RADII, **perturbation)
    moved = np.where(np.isnan(moved), at, moved)
    g.append(own.gradient(at))
    s.append(own.gradient(moved))
  return np.mean(g, axis=0), np.mean(s, axis=0)


def assert_update(found, shared, heads):
  actual_shared, actual_heads = quadratics.vectors(found)
  np.testing.assert_allclose(actual_shared, shared, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(actual_heads[:2], heads, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(actual_heads[2], 0)


@pytest.mark.parametrize('place, name', PLACES_AND_CASES)
def test_update_is_that_of_means_after_each_replicas_own_perturbation(
  place, name
):
  _, options, aggregate = CASES[name]
  perturbation = {k: v for k, v in options.items() if k != 'combine'}
  g, s = gradients_by_hand(**perturbation)
  if options.get('combine') == 'direct':
    shared = aggregate(s[:, :6])
  else:
    shared = aggregate(g[:, :6]) + aggregate((s - g)[:, :6])
  assert_update(results(place)[name], shared, s[:, 6:])


@pytest.mark.parametrize('place', PLACES)
def test_further_batches_are_evaluated_at_each_replicas_own_perturbation(
  place,
):
  pairs = [gradients_by_hand(batch) for batch in range(3)]
  shared = 0
  for part in ([g for g, _ in pairs], [s - g for g, s in pairs]):
    first, *extra = (jnp.asarray(x[:, :6], jnp.float32) for x in part)
    tx = mtl_jax.modo(gamma=0.5, num_tasks=2)
    more, _ = quick_compile.jit(tx.update)(
      first, tx.init(jnp.zeros(6)), extra_grads=tuple(extra)
    )
    shared += more
  assert_update(results(place)['modo'], shared, pairs[0][1][:, 6:])


IMTL_G = {'aggregator': mtl_jax.imtl_g(axis_name='data'), 'options': {}}


def both(params, batches):
  return [
    update(params, batches, **IMTL_G, perturbation=perturbation)
    for perturbation in ('global', 'per_device')
  ]


def test_the_perturbation_of_replicas_is_the_global_one_for_equal_data_only():
  run = mapped(both)
  same = [[batch[3]] * DEVICES for batch in BATCHES]
  for a, b in zip(*map(jax.tree.leaves, run(PARAMS, data(same))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  whole, own = run(PARAMS, data())
  difference = np.subtract(*(quadratics.vectors(t)[0] for t in (whole, own)))
  assert np.linalg.norm(difference) > 0.05


def test_one_replica_perturbs_by_the_gradients_of_the_whole_batch():
  alone = [[batch[3]] for batch in BATCHES]
  found = mapped(both, devices=1)(PARAMS, data(alone))
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def exchanges(program):
  """Numbers exchanged, and how many exchanges have to wait for one another.

  Args:
    program: compiled.

  Returns:
    the number of float32 all-reduced, and the length of the longest chain of
    all-reduces of which each needs the one before.
  """
  text = program.as_text().split('\nENTRY ')[1]
  numbers, depth = 0, {}
  for line in text.splitlines()[1:]:
    found = re.match(r'\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*)', line)
    if found is None:
      continue
    name, shape, operation, rest = found.groups()
    before = [depth[x] for x in re.findall(r'%[\w.-]+', rest) if x in depth]
    depth[name] = max(before, default=0)
    if operation == 'all-reduce':
      depth[name] += 1
      for dims in re.findall(r'f32\[([\d,]*)\]', shape):
        numbers += int(np.prod([int(d) for d in dims.split(',') if d] or [1]))
  return numbers, max(depth.values())


@pytest.mark.parametrize('combine', ['separate', 'direct'])
def test_own_perturbations_leave_one_exchange_of_what_is_aggregated(combine):
  aggregator = mtl_jax.linear(axis_name='data')

  def program(perturbation):
    run = functools.partial(
      update,
      aggregator=aggregator,
      options={'combine': combine},
      perturbation=perturbation,
      active=None,
    )
    return mapped(run).lower(PARAMS, data()).compile()

  shared, heads, both_passes = 3 * 6, 3 * 3, 2 * (3 * 6 + 3 * 3)
  assert exchanges(program('global')) == (both_passes, 2)
  # Loss gradients of heads are of no use after the perturbation.
  passes = 1 if combine == 'direct' else 2
  assert exchanges(program('per_device')) == (passes * shared + heads, 1)


@pytest.mark.parametrize('combine', ['separate', 'direct'])
def test_gradients_that_are_sums_already_are_refused(combine):
  def run(params, x):
    loss_fn = lambda params, x: {'a': jnp.mean((x @ params) ** 2)}
    at, at_each = mtl_jax.task_grad(loss_fn, ('a',))
    tx = mtl_jax.flat_minima(
      mtl_jax.linear(axis_name='data'),
      ('a',),
      combine=combine,
      perturbation='per_device',
    )
    return tx.update(
      at(params, x)[1],
      tx.init(params),
      params,
      grad_fn=lambda own: at_each(own, x)[1],
    )[0]

  with pytest.raises(ValueError, match="does not vary over axis_name='data'"):
    mapped(run, check_vma=True)(jnp.ones(2), jnp.ones((DEVICES, 2)))


def test_a_perturbation_per_device_needs_devices():
  with pytest.raises(ValueError, match='needs an aggregator made with axis_na'):
    mtl_jax.flat_minima(mtl_jax.linear(), ('a', 'b'), perturbation='per_device')


def test_another_perturbation_is_an_error():
  with pytest.raises(ValueError, match=r"perturbation must be .*'local'"):
    mtl_jax.flat_minima(
      mtl_jax.linear(axis_name='data'), ('a', 'b'), perturbation='local'
    )
