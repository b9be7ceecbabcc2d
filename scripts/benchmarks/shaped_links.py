"""Slow links, truly slow: a network namespace for each process, rates set by `tc`.

Every namespace has one virtual cable to a bridge in a namespace of its own, so the
host's network is not touched. Both ends of a cable pass its rate through a token
bucket. Linux, root and iproute2 are needed; `/etc/netns` holds a folder for each
namespace while it lives.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Links(NamedTuple):
    prefixes: Sequence[Sequence[str]]  # of the command of each process
    addresses: Sequence[str]
    shape: Callable[[float | None], None]  # Mbit/s of every link; None: as it is


def refusal() -> str | None:
    """Why links cannot be shaped here, in a sentence; None if they can."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return "ip and tc are not installed (iproute2)"
    name = f"narrows-{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces are not permitted: {done.stderr.strip()}"
    _do("ip", "netns", "del", name)
    return None


@contextlib.contextmanager
def shaped_links(count: int) -> Iterator[Links]:
    """`count` namespaces on one bridge; all is taken down at the end."""
    base = f"narrows-{os.getpid()}-"
    spaces = [f"{base}{i}" for i in range(count)]
    hub = f"{base}hub"
    addresses = [f"10.77.0.{i + 1}" for i in range(count)]
    hosts = [pathlib.Path("/etc/netns") / name for name in spaces]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up too
    try:
        _do("ip", "netns", "add", hub)
        _inside(hub, "ip", "link", "add", "bridge", "type", "bridge")
        _inside(hub, "ip", "link", "set", "bridge", "up")
        for i, (name, address, folder) in enumerate(
            zip(spaces, addresses, hosts, strict=True)
        ):
            _do("ip", "netns", "add", name)
            port = f"port{i}"
            ends = ["type", "veth", "peer", "name", "cable", "netns", name]
            _inside(hub, "ip", "link", "add", port, *ends)
            _inside(hub, "ip", "link", "set", port, "master", "bridge", "up")
            _inside(name, "ip", "link", "set", "lo", "up")
            _inside(name, "ip", "addr", "add", f"{address}/24", "dev", "cable")
            _inside(name, "ip", "link", "set", "cable", "up")
            folder.mkdir(parents=True)  # gloo binds to what the host's name resolves to
            (folder / "hosts").write_text(f"{address} {socket.gethostname()}\n")

        def shape(megabits: float | None) -> None:
            for i, name in enumerate(spaces):
                for space, device in ((name, "cable"), (hub, f"port{i}")):
                    _limit(space, device, megabits)

        yield Links([["ip", "netns", "exec", x] for x in spaces], addresses, shape)
    finally:
        signal.signal(signal.SIGTERM, before)
        for name in (*spaces, hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for folder in hosts:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            hosts[0].parent.rmdir()  # only where nothing else is in it


def _limit(space: str, device: str, megabits: float | None) -> None:
    where = ["dev", device, "root"]
    if megabits is None:
        command = ["ip", "netns", "exec", space, "tc", "qdisc", "del", *where]
        subprocess.run(command, capture_output=True)  # none there: as wanted
        return
    bucket = ["tbf", "rate", f"{megabits:g}mbit", "burst", "256kb", "latency", "50ms"]
    _inside(space, "tc", "qdisc", "replace", *where, *bucket)


def _inside(space: str, *command: str) -> None:
    _do("ip", "netns", "exec", space, *command)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
