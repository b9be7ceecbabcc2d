"""A mean that goes round in hops is the mean, the same bits on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.ring_mean import ring_mean
from narrows.parallel.wire import collectives

LIKE = {"a": jnp.zeros((3, 4)), "b": jnp.zeros((6,)), "c": jnp.zeros(())}
SPECS = {"a": P(None, "fsdp"), "b": P("fsdp"), "c": P()}


def made(text):
    layout = Layout.parse(text)
    mesh = make_mesh(layout, jax.devices()[: layout.size])
    return layout.data, mesh, ring_mean(LIKE, SPECS, mesh)


def of_all(ring, more=0):
    def run(tree):
        chunks = ring.begin(tree)
        chunks = jax.lax.fori_loop(
            0, ring.hops + more, lambda t, c: ring.hop(c, t), chunks
        )
        return ring.end(chunks), chunks

    return jax.jit(run)


@pytest.mark.parametrize("text", ["data=1", "data=4", "data=3,fsdp=2", "data=8"])
@pytest.mark.parametrize("more", [0, 3])
def test_it_is_the_mean_whatever_hops_follow(text, more):
    workers, _, ring = made(text)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: rng.normal(size=(workers, *x.shape)), LIKE)
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    mean, chunks = of_all(ring, more)(tree)
    for name, x in tree.items():
        np.testing.assert_allclose(mean[name], x.mean(0), rtol=1e-6, atol=1e-7)
    held = np.asarray(chunks).reshape(workers, -1, *chunks.shape[1:])
    for worker in held[1:]:
        np.testing.assert_array_equal(worker, held[0])


def test_hops_send_what_the_closed_form_says():
    workers, mesh, ring = made("data=4,fsdp=2")
    tree = jax.tree.map(lambda x: jnp.zeros((workers, *x.shape)), LIKE)
    sent = list(collectives(of_all(ring).lower(tree).compile(), mesh))
    assert {c.axes for c in sent} == {("data",)}
    held = 6 + 3 + 1  # of each of two devices of a worker
    width = -(-held // workers)
    numbers = sum(c.count * np.prod(s) for c in sent for s in c.shapes)
    assert numbers == 2 * (workers - 1) * width
