"""Wait, on machines without a cluster, until all processes of a run are there, before jax starts.

jax's own start-up aborts the process, with a stack trace, if another one never arrives. So process
0 first listens at the coordinator's address itself. Each process connects, identifies itself, and
receives the numbers of the missing processes once a second, until all are there or something is
wrong. Then process 0 frees the port, and jax's coordination service takes it.
"""

import json
import selectors
import socket
import sys
import time
from typing import Any

from mea_jax.errors import UserError

_TELL_SECONDS = 1.0  # between two messages to waiting processes
_SILENCE_SECONDS = 10.0  # without a message from process 0 until it counts as gone
_HELLO_SECONDS = 2.0  # that a connection may take to identify itself
_LINGER_SECONDS = 5.0  # that process 0 stays to report the problem to late processes
_PATIENCE_SECONDS = 10.0  # until a waiting process prints what it waits for
_LINE = 65536  # bytes of a message, at most


def meet(address: str, count: int, index: int, timeout: float) -> None:
    """Wait until processes 0 .. `count` - 1 have all connected to `address`, "host:port".

    Raises:
      UserError: within `timeout` seconds, on every process that connected: if some did not connect,
        two have the same index or disagree on `count`, or process 0 cannot be reached.
    """
    host, port = parse(address)
    me = {"process": index, "count": count, "host": socket.gethostname()}
    deadline = time.monotonic() + timeout
    if index != 0:
        _join(host, port, me, deadline, timeout)
        return
    try:
        listener = _listen(port)
    except OSError as error:
        # Another process 0 may hold the port: if so, joining it makes both report the duplicate.
        _join(host, port, me, time.monotonic() + 2.0, timeout, why=f"{error.strerror or error}")
        return
    with listener:
        _Meeting(listener, address, me, deadline, timeout).run()


def parse(address: str) -> tuple[str, int]:
    """Return (host, port) of an `address` HOST:PORT. Raise `UserError` if it is malformed."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator {address} is no address: write HOST:PORT, the machine of process 0 and "
            "a free port on it, such as 10.0.0.1:8476"
        )
    return host.strip("[]"), int(port)


def _listen(port: int) -> socket.socket:
    """Return a socket that listens on all addresses of this host, as jax's service will."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


class _Meeting:
    """The side of process 0, which accepts connections and reports to the waiting processes."""

    def __init__(
        self,
        listener: socket.socket,
        address: str,
        me: dict[str, Any],
        deadline: float,
        timeout: float,
    ):
        self.listener, self.address = listener, address
        self.deadline, self.timeout = deadline, timeout
        self.count = self.expected = int(me["count"])
        self.here: dict[int, dict[str, Any]] = {0: me}
        self.connections: dict[socket.socket, int | None] = {}  # the process at the other end
        self.answered = 1  # processes that have received the outcome, including this one

    def missing(self) -> list[int]:
        return [i for i in range(self.count) if i not in self.here]

    def run(self) -> None:
        problem = self.wait()
        if problem is None:
            self.tell({"go": True})
            return
        self.tell({"problem": problem})
        linger = min(time.monotonic() + _LINGER_SECONDS, self.deadline)
        while (now := time.monotonic()) < linger and self.answered < self.expected:
            self.accept(min(0.2, linger - now))
            self.tell({"problem": problem})
        raise UserError(problem)

    def wait(self) -> str | None:
        """Wait until all processes are here. Return the problem that prevents it, or None."""
        told = time.monotonic()
        patience = told + _PATIENCE_SECONDS
        while self.missing():
            now = time.monotonic()
            if now >= self.deadline:
                return self.late()
            if now >= patience:
                patience = float("inf")
                _say(f"waiting for {_processes(self.missing())} at {self.address}")
            if now >= told + _TELL_SECONDS:
                told = now
                self.tell({"missing": self.missing()})
            if problem := self.accept(min(_TELL_SECONDS, self.deadline - now)):
                return problem
            if not self.missing():  # sending drops a process that left in the last second
                self.tell({"missing": []})
        return None

    def late(self) -> str:
        return (
            f"{len(self.here)} of {self.count} processes came to {self.address} within "
            f"{self.timeout:g} s; {_processes(self.missing())} did not: start every process "
            "from --process_id 0 to "
            f"{self.count - 1} with the same --coordinator and --num_processes, and check that "
            "their machines can reach the port; or raise --startup_timeout"
        )

    def accept(self, seconds: float) -> str | None:
        """Wait for one more connection. Return the problem that it reveals, or None."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            if not selector.select(max(seconds, 0)):
                return None
        try:
            connection, _ = self.listener.accept()
            connection.settimeout(_HELLO_SECONDS)
            with connection.makefile("rb") as lines:
                hello = json.loads(lines.readline(_LINE))
            other, count, host = int(hello["process"]), int(hello["count"]), str(hello["host"])
        except (OSError, ValueError, LookupError, TypeError):  # not one of ours
            return None
        self.connections[connection] = None
        self.expected = max(self.expected, min(count, 2 * self.count))
        if count != self.count:
            return (
                f"process {other} on {host} was started with --num_processes {count}, process 0 "
                f"on {self.here[0]['host']} with {self.count}: give every process the same number"
            )
        if other in self.here:
            first = self.here[other]["host"]
            return (
                f"two processes were started with --process_id {other}, on {first} and on {host}: "
                f"give each of the {self.count} processes its own number"
            )
        self.here[other], self.connections[connection] = hello, other
        return None

    def tell(self, message: dict[str, Any]) -> None:
        """Send `message` to all connected processes; drop those that cannot be reached."""
        last = "missing" not in message
        for connection, process in list(self.connections.items()):
            try:
                _send(connection, message)
                self.answered += last
            except OSError:
                gone = True
                if process is not None:
                    del self.here[process]
            else:
                gone = last
            if gone:
                connection.close()
                del self.connections[connection]


def _join(
    host: str,
    port: int,
    me: dict[str, Any],
    deadline: float,
    timeout: float,
    why: str = "",
) -> None:
    """Connect to process 0, and wait until it reports that all processes are there.

    Process 0 itself calls this with `why`, the reason why it could not listen. Raise `UserError` as
    `meet`.
    """
    address, reason, missing = f"{host}:{port}", why, None
    patience = time.monotonic() + _PATIENCE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if time.monotonic() >= patience:
            patience = float("inf")
            _say(f"waiting for process 0 at {address} ({reason})")
        try:
            with socket.create_connection((host, port), min(left, 5.0)) as connection:
                _send(connection, me)
                with connection.makefile("rb") as lines:
                    while (left := deadline - time.monotonic()) > 0:
                        connection.settimeout(min(left, _SILENCE_SECONDS))
                        message = _parse_message(lines.readline(_LINE), address)
                        if message is None:
                            reason = "it closed the connection"
                            break
                        if "problem" in message:
                            raise UserError(message["problem"])
                        if "go" in message:
                            return
                        missing = message["missing"]
        except OSError as error:
            if not why:
                reason = (error.strerror or str(error)).lower()
        time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))
    if why:
        raise UserError(
            f"process 0 cannot listen at port {port} ({why}): another job uses it; choose another "
            "port for --coordinator, the same on every process"
        )
    if missing:
        raise UserError(
            f"{_processes(missing)} did not come to {address} within {timeout:g} s: start every "
            "process, or raise --startup_timeout"
        )
    raise UserError(
        f"process 0 did not answer at {address} within {timeout:g} s ({reason}): start it with "
        "--process_id 0 on that machine, and check that the port can be reached from here"
    )


def _parse_message(line: bytes, address: str) -> dict[str, Any] | None:
    """Return a message of process 0, or None at the end of the connection.

    Raise `UserError` if another program has sent it.
    """
    if not line:
        return None
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise UserError(
            f"the program at {address} is not a waiting process 0: the run already has all its "
            "processes, or another program uses the port; choose another port for --coordinator"
        )
    return message


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:20])) + (", ..." if len(indices) > 20 else "")
    return f"process {shown}" if len(indices) == 1 else f"processes {shown}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
