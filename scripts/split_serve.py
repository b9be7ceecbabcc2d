"""Run a split classifier in two processes: head on the device, tail on the server.

    python scripts/split_serve.py --workdir=/tmp/split --role=tail --port=7710
    python scripts/split_serve.py --workdir=/tmp/split --role=head --port=7710

The head encodes test pictures one by one and sends the bytes of `models/split_payload`;
the tail answers with a class and its probability, 5 bytes. Both stay on this machine
(127.0.0.1). The tail serves connections one after another until it is stopped; port 0
takes a free one and says which. A payload that is none ends its connection with a
sentence. The head prints accuracy and the bytes that went through its socket.
"""

import pathlib
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from narrows.models import bottlefit
from narrows.models.split_payload import HEADER, pack, payload_size, unpack
from narrows.scripts import command, results, splits

HOST = "127.0.0.1"
ANSWER = struct.Struct("<Bf")


class Sent(NamedTuple):
    classes: np.ndarray
    probabilities: np.ndarray
    bytes_up: int
    bytes_down: int


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "of scripts/train_split.py", flag_values=f)
    flags.DEFINE_enum("role", None, ("head", "tail"), "which end", flag_values=f)
    flags.DEFINE_integer("port", 0, "of the tail", 0, 65535, flag_values=f)
    flags.DEFINE_integer("images", 100, "head: test pictures", 1, flag_values=f)
    flags.DEFINE_integer("connections", None, "tail: then end", 1, flag_values=f)
    flags.DEFINE_string(
        "data_dir", str(results.ROOT.parent / "shared" / "data"), "sets", flag_values=f
    )
    return f


def main(argv: Sequence[str]) -> int:
    f = define_flags()
    command.parse(f, argv, __doc__)
    with command.bad_input():
        if f.workdir is None or f.role is None:
            raise ValueError("workdir, role: give both --workdir and --role")
        split = splits.load_split(f.workdir)
        if f.role == "tail":
            listener = socket.create_server((HOST, f.port))
        else:
            test = splits.pictures(
                pathlib.Path(f.data_dir), split.recipe.dataset, "test"
            )
            line = socket.create_connection((HOST, f.port), timeout=60)
    if f.role == "tail":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with listener:
            print(f"listening on {HOST}:{listener.getsockname()[1]}", flush=True)
            serve(split, listener, connections=f.connections)
        return 0
    with line:
        sent = send(split, line, test.images[: f.images])
    right = np.mean(sent.classes == test.labels[: f.images])
    print(
        f"{len(sent.classes)} pictures, {100 * right:.2f} % right; "
        f"{sent.bytes_up / len(sent.classes):g} bytes up and "
        f"{sent.bytes_down / len(sent.classes):g} down a picture"
    )
    return 0


def send(split: splits.Split, line: socket.socket, images) -> Sent:
    """Head: encode each picture, send its payload, wait for the answer."""
    p, s = split.parts
    graph = split.graphs["encoder"]

    @jax.jit
    def encode(image):
        out = bottlefit.call(
            graph, p["encoder"], s["encoder"], splits.scaled(image)[None]
        )
        return out[0][0]

    classes, probabilities, up, down = [], [], 0, 0
    for image in images:
        payload = pack(np.asarray(encode(image)), bits=split.recipe.bits)
        line.sendall(payload)
        answer = receive(line, ANSWER.size)
        if len(answer) < ANSWER.size:
            raise ConnectionError("the tail closed the connection: see what it says")
        up, down = up + len(payload), down + len(answer)
        got = ANSWER.unpack(answer)
        classes.append(got[0])
        probabilities.append(got[1])
    return Sent(np.array(classes), np.array(probabilities), up, down)


def serve(
    split: splits.Split, listener: socket.socket, *, connections: int | None = None
) -> None:
    """Tail: answer every payload of every connection, one after another."""
    p, s = split.parts
    graphs = {name: split.graphs[name] for name in ("decoder", "tail")}

    @jax.jit
    def finish(z):
        return jax.nn.softmax(bottlefit.predict(graphs, bottlefit.Parts(p, s), z[None]))

    shape = encoded_shape(split)
    finish(jnp.zeros(shape))  # compiled before the first picture comes
    served = 0
    while connections is None or served < connections:
        line, _ = listener.accept()
        served += 1
        with line:
            line.settimeout(60)
            try:
                while payload := receive_payload(line, payload_size(*shape, 8)):
                    z = unpack(payload)
                    if z.shape != shape:
                        raise ValueError(f"payload: {z.shape}, but must be {shape}")
                    probability = np.asarray(finish(z))[0]
                    best = int(probability.argmax())
                    line.sendall(ANSWER.pack(best, probability[best]))
            except (ValueError, OSError) as reason:
                print(f"connection ended: {reason}", file=sys.stderr, flush=True)


def encoded_shape(split: splits.Split) -> tuple[int, ...]:
    """Of what the encoder sends: height, width, channels."""
    side = (1, splits.SIDE, splits.SIDE, split.recipe.inputs)
    out, _ = jax.eval_shape(
        lambda x: bottlefit.call(
            split.graphs["encoder"],
            split.parts.params["encoder"],
            split.parts.stats["encoder"],
            x,
        ),
        jax.ShapeDtypeStruct(side, jnp.float32),
    )
    return out.shape[1:]


def receive_payload(line: socket.socket, most: int) -> bytes:
    """The next payload; empty where the other end has closed.

    Raises: ValueError where it announces more than `most` bytes.
    """
    head = receive(line, HEADER.size)
    if len(head) < HEADER.size:
        return b""
    kind, height, width, channels, *_ = HEADER.unpack(head)
    size = payload_size(height, width, channels, kind & 15)
    if size > most:
        raise ValueError(f"payload: announces {size} bytes, more than {most}")
    return head + receive(line, size - HEADER.size)


def receive(line: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer where the connection ended."""
    parts = bytearray()
    while len(parts) < size:
        more = line.recv(size - len(parts))
        if not more:
            break
        parts += more
    return bytes(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
