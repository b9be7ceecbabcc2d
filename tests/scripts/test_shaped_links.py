"""A shaped link has the rate that it claims, and is taken down."""

import subprocess
import sys
import time

import pytest
from narrows.scripts.benchmarks.shaped_links import refusal, shaped_links

SEND = """
import socket, sys
to = socket.create_connection((sys.argv[1], 7000))
to.sendall(bytes(int(sys.argv[2])))
to.shutdown(socket.SHUT_WR)
to.recv(1)
"""
TAKE = """
import socket
at = socket.create_server(("", 7000))
print("ready", flush=True)
peer = at.accept()[0]
while peer.recv(1 << 16): pass
peer.send(b"x")
"""


def test_a_shaped_link_takes_the_time_of_its_rate():
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    size, megabits = 2_000_000, 20
    with shaped_links(2) as links:
        links.shape(megabits)
        here, there = (list(prefix) for prefix in links.prefixes)
        take = [*there, sys.executable, "-c", TAKE]
        with subprocess.Popen(take, stdout=subprocess.PIPE) as taker:
            assert taker.stdout is not None
            taker.stdout.readline()
            clock = time.perf_counter()
            send = [*here, sys.executable, "-c", SEND, links.addresses[1], str(size)]
            subprocess.run(send, check=True)
            seconds = time.perf_counter() - clock
        # The bucket holds 256 kB, which pass at once at each end.
        assert seconds > 8e-6 * (size - 2 * 262_144) / megabits
        assert seconds < 4 * 8e-6 * size / megabits
        named = subprocess.run(
            [*here, sys.executable, "-c", "import socket as s; "
             "print(s.gethostbyname(s.gethostname()))"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert named.stdout.strip() == links.addresses[0]
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    assert here[3] not in listed.stdout.split()
