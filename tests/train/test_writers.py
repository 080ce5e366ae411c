"""The log can be read back, and is cut where a run goes on."""

import json
import math
import struct

import pytest
from tensorboardX.proto import event_pb2

from mtl_jax.train import writers


def _write(workdir, steps, start_step=0, **values):
  writer = writers.MetricsWriter(workdir, start_step=start_step)
  for step in steps:
    writer.write(
      step, {'train/loss': 1 / step, **values}, epoch=step / 3, wall_time=0.1
    )
  return writer


def test_numbers_come_back_exactly(tmp_path):
  values = {'a': 0.1 + 0.2, 'b': 1e-310, 'c': math.pi * 1e300, 'd': -0.0}
  _write(tmp_path, [3], **values).close()
  (line,) = writers.read_lines(tmp_path)
  assert line == {
    'step': 3,
    'epoch': 1.0,
    'wall_time': 0.1,
    'train/loss': 1 / 3,
    **values,
  }


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
  writer = _write(tmp_path, [1, 2])
  assert [line['step'] for line in writers.read_lines(tmp_path)] == [1, 2]
  writer.close()


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_strict_json(tmp_path, value):
  _write(tmp_path, [1], bad=value).close()

  def refuse(constant):
    raise ValueError(constant)

  line = json.loads(
    (tmp_path / 'metrics.jsonl').read_text(), parse_constant=refuse
  )
  assert line['bad'] is None


def test_log_is_cut_back_to_the_step_a_run_goes_on_from(tmp_path):
  _write(tmp_path, [1, 2, 3, 4]).close()
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "epo')
  _write(tmp_path, [4], start_step=3).close()
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_run_that_starts_anew_has_an_empty_log(tmp_path):
  _write(tmp_path, [1, 2]).close()
  _write(tmp_path, []).close()
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b''


def test_broken_line_within_the_log_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(
    '{"step": 1}\nnonsense\n{"step": 2}\n'
  )
  with pytest.raises(ValueError, match=r'metrics.jsonl, line 2 cannot be read'):
    writers.MetricsWriter(tmp_path, start_step=2)


def test_folder_without_a_log_has_no_lines(tmp_path):
  assert writers.read_lines(tmp_path) == []


def _events(path):
  """The events of a file: length, checksum, event, checksum, and again."""
  content, start, events = path.read_bytes(), 0, []
  while start < len(content):
    (length,) = struct.unpack_from('<Q', content, start)
    events.append(event_pb2.Event.FromString(content[start + 12 :][:length]))
    start += length + 16
  return events


def test_tensorboard_gets_every_metric_at_its_step(tmp_path):
  _write(tmp_path, [5, 10], other=2.5).close()
  (path,) = tmp_path.glob('events.*')
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in _events(path)
    for value in event.summary.value
  ]
  assert scalars == [
    (5, 'train/loss', pytest.approx(0.2)),
    (5, 'other', 2.5),
    (10, 'train/loss', pytest.approx(0.1)),
    (10, 'other', 2.5),
  ]


def test_tensorboard_is_told_from_where_a_run_goes_on(tmp_path):
  _write(tmp_path, [5, 10]).close()
  (first,) = tmp_path.glob('events.*')
  first.rename(tmp_path / 'first')
  _write(tmp_path, [6], start_step=5).close()
  (second,) = tmp_path.glob('events.*')
  starts = [
    event.step
    for event in _events(second)
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  assert starts == [6]
