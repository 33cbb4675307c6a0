"""Tests of the rendezvous of processes, here threads, because only sockets are involved."""

import contextlib
import socket
import threading
import time

import pytest

from mea_jax.errors import UserError
from mea_jax.parallel import processes, rendezvous


@pytest.fixture
def address(monkeypatch):
    """Return a free address, and shorten the wait for late processes after an error."""
    monkeypatch.setattr(rendezvous, "_LINGER_SECONDS", 1.0)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def port_of(address):
    return rendezvous.parse(address)[1]


def meet(address, *processes, timeout=20.0):
    """Run processes, each (index, count) or (index, count, seconds before it starts).

    Return a list with None for each process that met the others, otherwise its error message.
    """
    found: list[str | None] = [""] * len(processes)

    def one(number, index, count, delay=0.0):
        time.sleep(delay)
        try:
            rendezvous.meet(address, count, index, timeout)
            found[number] = None
        except UserError as error:
            found[number] = str(error)

    threads = [
        threading.Thread(target=one, args=(number, *process))
        for number, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_meet_in_whatever_order(address, count):
    processes = [(index, count, 0.1 * ((index * 3 + 2) % count)) for index in range(count)]
    assert meet(address, *processes) == [None] * count
    # The port is immediately free for jax and for the next run.
    rendezvous._listen(port_of(address)).close()


def test_missing_processes_are_named_to_all_that_came(address):
    began = time.monotonic()
    found = meet(address, (0, 4), (2, 4), timeout=2.5)
    assert time.monotonic() - began < 4.5
    assert f"2 of 4 processes came to {address} within 2.5 s; processes 1, 3 did not" in found[0]
    for line in found:
        assert "processes 1, 3 did not" in line
        assert "--startup_timeout" in line


@pytest.mark.slow
def test_one_whose_time_is_up_first_knows_who_is_missing(address):
    """Process 0, which continues to wait, has sent it the list of missing processes."""
    thread = threading.Thread(target=meet, args=(address, (0, 3)), kwargs={"timeout": 4.0})
    thread.start()
    with pytest.raises(UserError, match=rf"^process 1 did not come to {address} within 2\.5 s"):
        rendezvous.meet(address, 3, 2, 2.5)
    thread.join()


def test_process_zero_never_comes(address):
    (line,) = meet(address, (1, 2), timeout=0.5)
    assert line.startswith(
        f"process 0 did not answer at {address} within 0.5 s (connection refused)"
    )


def test_unknown_host():
    (line,) = meet("no-such-host.invalid:2222", (1, 2), timeout=0.5)
    assert "process 0 did not answer at no-such-host.invalid:2222" in line


@pytest.mark.parametrize("processes", [[(0, 3), (1, 3), (1, 3)], [(0, 2), (0, 2)]])
def test_two_with_one_number(address, processes):
    began = time.monotonic()
    found = meet(address, *processes)
    assert time.monotonic() - began < 6
    number = processes[-1][0]
    for line in found:
        assert f"two processes were started with --process_id {number}, on " in line


def test_counts_that_differ_are_told_to_all(address):
    """All processes report it, also the late third, which process 0 did not expect."""
    for line in meet(address, (0, 2), (1, 3), (2, 3, 0.5)):
        assert "--num_processes 3, process 0 on" in line
        assert "with 2: give every process the same" in line


def test_strangers_do_not_disturb(address):
    """A port scanner, bytes of another program and a silent connection do not disturb."""

    def strangers():
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"process": "x"}\n'):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("localhost", port_of(address)), 1) as connection,
            ):
                connection.sendall(words)
        with contextlib.suppress(OSError):
            silent.append(socket.create_connection(("localhost", port_of(address)), 1))

    silent: list[socket.socket] = []
    thread = threading.Timer(0.3, strangers)
    thread.start()
    assert meet(address, (0, 2), (1, 2, 1.0)) == [None, None]
    thread.join()
    for connection in silent:
        connection.close()


def test_one_that_left_is_not_counted(address):
    """If process 1 connects, is killed and is started again, the run is complete only then."""

    def come_and_go():
        with socket.create_connection(("localhost", port_of(address)), 5) as connection:
            rendezvous._send(connection, {"process": 1, "count": 3, "host": "a"})
            assert b"missing" in connection.makefile("rb").readline()

    thread = threading.Timer(0.3, come_and_go)
    thread.start()
    began = time.monotonic()
    assert meet(address, (0, 3), (2, 3, 3.0), (1, 3, 5.0)) == [None] * 3
    assert time.monotonic() - began > 5
    thread.join()


def test_a_port_that_another_program_has(address):
    with socket.create_server(("localhost", port_of(address))) as server:

        def speak():  # like jax's service after the start of a run
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"\x00\x00\x12\x04\x00\n")
                    connection.close()

        threading.Thread(target=speak, daemon=True).start()
        (line,) = meet(address, (1, 2), timeout=10.0)
        assert f"the program at {address} is not a waiting process 0" in line
        server.shutdown(socket.SHUT_RDWR)


def test_process_zero_cannot_listen(address):
    with rendezvous._listen(port_of(address)):
        (line,) = meet(address, (0, 2), timeout=5.0)
    assert f"process 0 cannot listen at port {port_of(address)} (" in line
    assert "choose another port for --coordinator" in line


@pytest.mark.parametrize("text", ["localhost", "localhost:", ":80", "a:b", "a:0", "a:70000", ""])
def test_addresses_that_are_none(text):
    with pytest.raises(UserError, match="write HOST:PORT"):
        rendezvous.parse(text)


def test_addresses():
    assert rendezvous.parse("10.0.0.1:8476") == ("10.0.0.1", 8476)
    assert rendezvous.parse("[::1]:8476") == ("::1", 8476)


def test_silence_is_noticed_at_the_limit():
    """A heartbeat counts from its first arrival, by the clock of the process that receives it."""
    signs = processes.Heartbeats(3, 100.0)
    signs.note({0: "1 a", 1: "7 b"}, 110.0)
    assert signs.describe_lost(100.0 + processes.LOST_SECONDS) is None
    found = signs.describe_lost(101.0 + processes.LOST_SECONDS)
    assert found == f"process 2 has sent no heartbeat for {processes.LOST_SECONDS + 1:.0f} s"
    signs.note({0: "2 a", 1: "7 b", 2: "1 c"}, 160.0)
    found = signs.describe_lost(160.0 + processes.LOST_SECONDS)
    assert found is not None
    assert found.startswith("process 1 on b ")
