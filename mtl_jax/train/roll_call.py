"""A roll call of all processes before JAX is started.

JAX aborts a process whose companions do not come, and names none of them. Here
the processes meet first, on the port that JAX will use, and get a message with
the missing ones.
"""

import json
import select
import socket
import time

# Seconds to wait for one line from a process, or for its end of connection.
_ANSWER_S = 5.0


def roll_call(
  address: str, num_processes: int, process_id: int, timeout_s: float
) -> None:
  """Returns when all processes have called this with the same number.

  Args:
    address: `host:port` of process 0; the port is free again afterwards.
    num_processes: number of processes.
    process_id: the number of this process.
    timeout_s: seconds to wait for the others.

  Raises:
    TimeoutError: if a process did not come; the message names it.
    ValueError: in all processes, if they differ in `num_processes` or two have
      the same `process_id`; and for an address without a port.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit():
    raise ValueError(f'coordinator_address must be host:port, got {address!r}')
  deadline = time.monotonic() + timeout_s
  if process_id == 0:
    _call(address, int(port), num_processes, timeout_s, deadline)
  else:
    _answer(
      (host.strip('[]'), int(port)),
      *(num_processes, process_id, timeout_s, deadline),
    )


def _call(address, port, num_processes, timeout_s, deadline):
  """Process 0: waits for the others and sends them the result."""
  there: dict[int, socket.socket] = {}
  error: Exception | None = None
  dual = socket.has_dualstack_ipv6()
  try:
    server = socket.create_server(
      ('', port),
      family=socket.AF_INET6 if dual else socket.AF_INET,
      dualstack_ipv6=dual,
      backlog=num_processes,
    )
  except OSError as failure:
    raise ConnectionError(
      f'process 0 cannot listen at {address}: {failure}'
    ) from failure
  with server:
    while error is None and len(there) < num_processes - 1:
      left = deadline - time.monotonic()
      if left <= 0:
        missing = sorted(set(range(1, num_processes)) - there.keys())
        error = TimeoutError(
          f'of num_processes={num_processes} the processes {missing} did not '
          f'come to {address} within {timeout_s} s'
        )
        break
      ready, _, _ = select.select([server, *there.values()], [], [], left)
      # While waiting, a process sends data only if it gives up.
      for i in [i for i, other in there.items() if other in ready]:
        there.pop(i).close()
      if server in ready:
        error = _admit(server.accept()[0], there, num_processes)
    for other in there.values():
      _tell(other, error)
  if error is not None:
    raise error


def _admit(other, there, num_processes):
  """Registers a process; returns its error, if there is one."""
  other.settimeout(_ANSWER_S)
  try:
    said = json.loads(other.makefile().readline())
    i, number = int(said['process_id']), int(said['num_processes'])
  except (OSError, ValueError, TypeError, KeyError):
    other.close()  # A foreign connection, such as a scan for open ports.
    return None
  taken = i in there or not 0 < i < num_processes
  there[-1 if taken else i] = other
  if number != num_processes:
    return ValueError(
      f'num_processes is {num_processes} in process 0, but {number} in process '
      f'{i}'
    )
  return ValueError(f'two processes have process_id {i}') if taken else None


def _tell(other, error):
  kind = None if error is None else type(error).__name__
  with other:
    try:
      other.sendall((json.dumps([kind, str(error)]) + '\n').encode())
      # The side that closes first keeps the port for a while.
      other.recv(1)
    except OSError:
      return  # It has ended; JAX will notice if it is needed.


def _answer(place, num_processes, process_id, timeout_s, deadline):
  """Any other process: reports, and waits for the answer from process 0."""
  name = f'process 0 at {place[0]}:{place[1]}'
  said = None
  while not said:
    left = deadline - time.monotonic()
    if left <= 0:
      raise TimeoutError(f'{name} did not answer within {timeout_s} s')
    try:
      with socket.create_connection(place, timeout=left) as zero:
        line = {'process_id': process_id, 'num_processes': num_processes}
        zero.sendall((json.dumps(line) + '\n').encode())
        # Process 0 can then name the missing ones, if its timeout is the same.
        zero.settimeout(left + _ANSWER_S)
        said = json.loads(zero.makefile().readline())
    except (OSError, ValueError):
      said = None  # It may not have started yet; another program may answer.
    if not said:
      time.sleep(0.1)
  kind, message = said
  if kind is not None:
    raise {'TimeoutError': TimeoutError}.get(kind, ValueError)(message)
