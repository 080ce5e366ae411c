"""One process at a time trains in a run directory."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from mtl_jax.train import lock


def _write(workdir, **changes):
  own = {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'process_started': lock._start_time(os.getpid()),
  }
  (workdir / lock.FILE).write_text(json.dumps({**own, **changes}))


def test_second_holder_is_refused_naming_process_and_host(tmp_path):
  with lock.hold(tmp_path / 'run'):
    message = (
      f'run is in use: another process is running there, pid {os.getpid()} on '
      f'host {re.escape(socket.gethostname())}'
    )
    with pytest.raises(ValueError, match=message):
      with lock.hold(tmp_path / 'run'):
        pytest.fail('two hold one lock')
    # The one who was refused did not release it.
    assert (tmp_path / 'run' / lock.FILE).exists()
  assert not list((tmp_path / 'run').iterdir())


def test_lock_is_released_when_the_body_fails(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with lock.hold(tmp_path):
      raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
  script = (
    'import os, signal, sys; from mtl_jax.train import lock\n'
    'with lock.hold(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)'
  )
  # Not waited for yet, so that its number stays that of a zombie.
  process = subprocess.Popen([sys.executable, '-c', script, str(tmp_path)])
  os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
  held = json.loads((tmp_path / lock.FILE).read_text())
  assert held['pid'] == process.pid
  with lock.hold(tmp_path):
    assert json.loads((tmp_path / lock.FILE).read_text())['pid'] == os.getpid()
  process.wait()


def test_process_that_got_the_number_of_the_holder_is_not_the_holder(tmp_path):
  _write(tmp_path, process_started='1')
  with lock.hold(tmp_path):
    pass
  assert not list(tmp_path.iterdir())


def test_lock_of_another_host_is_refused_with_the_file_to_remove(tmp_path):
  _write(tmp_path, host='elsewhere', pid=7, process_started='1')
  with pytest.raises(
    ValueError,
    match=rf'pid 7 on host elsewhere; .* remove {tmp_path / lock.FILE}',
  ):
    with lock.hold(tmp_path):
      pytest.fail('it may be alive')
  assert (tmp_path / lock.FILE).exists()


def test_lock_that_another_took_meanwhile_is_left_to_it(tmp_path):
  with lock.hold(tmp_path):
    _write(tmp_path, pid=1)
  assert (tmp_path / lock.FILE).exists()


def test_file_that_is_no_lock_is_named(tmp_path):
  (tmp_path / lock.FILE).write_text('{}')
  with pytest.raises(ValueError, match=f'{tmp_path / lock.FILE} is no lock'):
    with lock.hold(tmp_path):
      pytest.fail('it may be a lock')


def test_place_where_no_folder_can_be_is_named(tmp_path):
  (tmp_path / 'file').touch()
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    with pytest.raises(ValueError, match=f'{workdir} cannot be written to: '):
      with lock.hold(workdir):
        pytest.fail('it is no folder')
