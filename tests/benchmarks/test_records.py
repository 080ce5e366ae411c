"""The arithmetic of the benchmarks; nothing here is timed."""

import json

import numpy as np
import pytest

from benchmarks import cases
from benchmarks import records
from benchmarks import sections
from benchmarks import timing


def _variant(library, method, facts, **options):
  spec = cases.Spec(library, method, **options)
  return spec.label, cases.Variant(spec, None, None, facts)


@pytest.mark.parametrize(
  ('method', 'tasks', 'expected'),
  [('plain', 7, 3), ('linear', 2, 5), ('flat linear', 2, 11), ('sam', 1, 6)],
)
def test_units_count_a_forward_as_one_and_a_backward_as_two(
  method, tasks, expected
):
  assert records.units(method, tasks) == expected


def test_yardstick_of_two_tasks_is_eleven_thirds_of_a_plain_update():
  assert records.yardstick('flat cagrad', 2) == pytest.approx(11 / 3)


def test_ratio_is_taken_within_a_turn():
  # The machine is ten times slower in the second turn, for both.
  assert timing.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == 2.0
  # The ratio of the medians would be 3.
  assert timing.ratio([9.0, 3.0, 1.0], [1.0, 3.0, 1.0]) == 1.0


def test_turns_hold_as_many_steps_as_are_asked_for_and_alternate():
  called = []
  variants = {
    name: lambda count, name=name: called.append(name) for name in ('a', 'b')
  }
  times = timing.take_turns(variants, least=2, most=3, budget_s=0.0)
  assert [len(seconds) for seconds in times.values()] == [2, 2]
  assert called[-4:] == ['a', 'b', 'a', 'b']


@pytest.mark.parametrize(
  ('seconds', 'steps'), [(1.0, 1), (0.02, 3), (1e-6, 20)]
)
def test_burst_is_longer_for_faster_steps_and_bounded(seconds, steps):
  assert timing.burst(seconds) == steps


def test_rows_divide_by_their_own_plain_and_by_their_peer():
  facts = {'compile_s': 1.0, 'temporary_bytes': 60, 'flops': 220.0}
  variants = dict(
    [
      _variant('ours', 'plain', {**facts, 'flops': 30.0}),
      _variant('ours', 'flat linear', facts),
      _variant('ours', 'flat linear', facts, engine='unroll'),
      _variant('pytorch', 'plain', {}),
      _variant('pytorch', 'flat linear', {}),
    ]
  )
  seconds = (1.0, 4.0, 8.0, 2.0, 10.0)
  times = {label: [s] * 3 for label, s in zip(variants, seconds, strict=True)}
  found = records.rows(
    cases.Case('mlp', 2, 8),
    variants,
    times,
    {'parameters': 5, 'shared_bytes': 20},
    10.0,
  )
  plain, flat, unrolled, torch_plain, torch_flat = found
  assert flat['ratio_to_plain'] == 4.0
  assert flat['over_yardstick'] == pytest.approx(12 / 11, rel=1e-3)
  assert (flat['peer'], flat['ratio_to_peer']) == ('pytorch flat linear', 0.4)
  assert torch_flat['ratio_to_plain'] == 5.0
  assert plain['ratio_to_peer'] == 0.5
  assert unrolled['ratio_to_usual'] == 2.0
  assert flat['temporary_copies'] == 3.0
  # 220 operations where 11 forward passes of 10 are the least.
  assert unrolled['flops_over_yardstick'] == 2.0
  assert plain['flops_over_yardstick'] == 1.0
  # The loop that 'auto' may be is counted once.
  assert flat['flops_over_yardstick'] is None
  assert 'ratio_to_plain' not in torch_plain
  assert 'flops' not in torch_flat
  # Every row has its line, and every line as many cells as the head.
  lines = records.markdown(found).splitlines()
  assert len({line.count('|') for line in lines if '|' in line}) == 1
  assert sum(line.startswith('| ours') for line in lines) == 3


def test_agreement_tells_length_and_direction_apart():
  theirs = cases.First(np.array([1.0, 2.0]), {'a': np.ones(2), 'b': np.ones(2)})
  twice = cases.First(
    np.array([1.0, 2.2]), {'b': 2 * np.ones(2), 'a': 2 * np.ones(2)}
  )
  record = records.agreement('twice', twice, 'theirs', theirs)
  assert record['cosine'] == 1.0
  assert record['relative_difference'] == 1.0
  assert record['losses_relative_difference'] == 0.1


def test_agreement_of_other_parameters_is_an_error():
  one = cases.First(np.ones(1), {'a': np.ones(2)})
  other = cases.First(np.ones(1), {'b': np.ones(2)})
  with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
    records.agreement('one', one, 'other', other)


def test_saving_replaces_the_sections_that_were_run_and_keeps_the_others(
  tmp_path,
):
  path = tmp_path / 'folder' / 'result.json'
  records.save(path, {'what': 'w', 'sections': {'a': 1, 'b': 2}})
  records.save(path, {'what': 'w', 'sections': {'b': 3}})
  assert json.loads(path.read_text())['sections'] == {'a': 1, 'b': 3}
  assert [p.name for p in path.parent.iterdir()] == ['result.json']


def test_parameters_map_to_the_names_and_layouts_of_pytorch():
  kernel = np.arange(24.0).reshape(1, 2, 3, 4)
  params = {
    'shared': {'conv_1': {'kernel': kernel}, 'norm': {'scale': np.ones(4)}},
    'heads': {'task_0': {'kernel': np.ones((2, 3)), 'bias': np.ones(3)}},
  }
  found = cases.by_name(params)
  assert {name: value.shape for name, value in found.items()} == {
    'shared.conv_1.weight': (4, 3, 1, 2),
    'shared.norm.weight': (4,),
    'heads.0.weight': (3, 2),
    'heads.0.bias': (3,),
  }
  assert found['shared.conv_1.weight'][3, 2, 0, 1] == kernel[0, 1, 2, 3]


def test_quick_keeps_every_section_and_every_library():
  everything = sections.all_sections()
  quick = sections.quick(everything)
  assert list(quick) == list(everything)
  for name, groups in everything.items():
    libraries = {s.library for group in groups for s in group.specs}
    assert {s.library for g in quick[name] for s in g.specs} == libraries


def test_the_four_widths_have_parameters_of_four_orders_of_magnitude():
  widths = [
    group.case.options['widths'][0]
    for group in sections.all_sections()['parameters']
    if group.case.model == 'mlp'
  ]
  # Two hidden layers on 36 x 36 pixels, without their biases.
  sizes = [width * (1296 + width) for width in widths]
  assert sizes == pytest.approx([1e5, 1e6, 1e7, 1e8], rel=0.06)
