"""Two processes of two devices each, on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

import quick_compile


def run_two(arguments, *, timeout_s=300):
  """Runs Python twice at once, with the devices of four.

  Args:
    arguments: `(address of process 0, process) -> arguments` after `python`.
    timeout_s: seconds that both may take.

  Returns:
    For each process its exit status and what it wrote to its standard error.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  processes = [
    subprocess.Popen(
      [sys.executable, *arguments(address, i)],
      cwd=pathlib.Path(__file__).parents[1],
      env={
        **os.environ,
        'XLA_FLAGS': (
          f'{quick_compile.FLAGS} --xla_force_host_platform_device_count=2'
        ),
      },
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    errors = [p.communicate(timeout=timeout_s)[1] for p in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, e) for p, e in zip(processes, errors, strict=True)]
