"""Side by side with vector-quantize-pytorch: same inputs and codes, same answers.

Its losses are means over positions and over the width, where ours sum over the width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models.quantize import lfq as lookup_free
from narrows.models.quantize import losses
from narrows.models.quantize.fsq import fsq
from narrows.models.quantize.lfq import lfq
from narrows.models.quantize.protocol import State
from narrows.models.quantize.residual import residual
from narrows.models.quantize.simvq import Basis, Frozen, simvq
from narrows.models.quantize.updates import code_state, ema, gradient, sphere
from narrows.models.quantize.vq import vq

torch = pytest.importorskip("torch", reason="the peer needs torch: pip install torch")
peer = pytest.importorskip(
    "vector_quantize_pytorch",
    reason="no peer to compare with: pip install vector-quantize-pytorch",
)
peer_vq = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
WIDTH, CODES, ROWS = 6, 20, 64
RNG = np.random.default_rng(0)
X = RNG.normal(size=(1, ROWS, WIDTH)).astype(np.float32)
PULL = RNG.normal(size=X.shape).astype(np.float32)
TABLE = RNG.normal(size=(3, CODES, WIDTH)).astype(np.float32)
PLAIN = {"threshold_ema_dead_code": 0, "commitment_weight": 1.0}


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=rtol, atol=atol)


def theirs_on(module, x=X):
    """Their output, and the gradient to x of what PULL weighs."""
    x = torch.from_numpy(x.copy()).requires_grad_()
    out = module(x)
    (slope,) = torch.autograd.grad((out[0] * torch.from_numpy(PULL)).sum(), x)
    return out, slope


def ours_on(q, state, x=X):
    slope = jax.grad(lambda x: jnp.sum(PULL * q.quantize(state, x).z))(jnp.asarray(x))
    return q.quantize(state, jnp.asarray(x)), slope


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("estimator", ["straight", "rotation"])
def test_vq(metric, estimator):
    """Output, indices, loss, gradient; five steps in which codes follow averages."""
    cosine = metric == "cosine"
    module = peer.VectorQuantize(
        WIDTH,
        CODES,
        rotation_trick=estimator == "rotation",
        use_cosine_sim=cosine,
        decay=0.8,
        **PLAIN,
    )
    table = TABLE[0] / np.linalg.norm(TABLE[0], axis=-1, keepdims=True)
    table = table if cosine else TABLE[0]
    for held in (module._codebook.embed, module._codebook.embed_avg):
        held.data.copy_(torch.from_numpy(table)[None])
    rules = (ema(0.8), sphere()) if cosine else (ema(0.8),)
    q = vq(WIDTH, CODES, metric=metric, estimator=estimator, rules=rules)
    memory = code_state(jnp.asarray(table), rules)
    state = State(memory=memory._replace(weight=jnp.ones(CODES)))  # as the peer starts
    for step in range(5):
        x = X + np.float32(0.1 * step)
        (z, index, loss), slope = theirs_on(module, x)
        out, ours = ours_on(q, state, x)
        close(out.indices[..., 0], index)
        close(out.z, z)
        close(out.losses["commitment"] / WIDTH, loss)
        close(ours, slope)
        state, _ = q.update(state, out.stats)
        close(state.memory.codes, module._codebook.embed[0], rtol=1e-3, atol=1e-4)
        if cosine:
            break  # from here on theirs also averages the lengths of averages


def test_gradient_codes():
    """The rule on sums makes the step that their optimizer makes in place."""
    module = peer.VectorQuantize(
        WIDTH,
        CODES,
        rotation_trick=False,
        ema_update=False,
        learnable_codebook=True,
        in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.7),
        **PLAIN,
    )
    module._codebook.embed.data.copy_(torch.from_numpy(TABLE[0])[None])
    theirs_on(module)
    # their loss is a mean over the width as well
    rules = (gradient(optax.sgd(0.7 / WIDTH)),)
    q = vq(WIDTH, CODES, rules=rules)
    state = State(memory=code_state(jnp.asarray(TABLE[0]), rules))
    state, _ = q.update(state, q.quantize(state, jnp.asarray(X)).stats)
    close(state.memory.codes, module._codebook.embed[0])


def test_residual_vq():
    module = peer.ResidualVQ(
        dim=WIDTH, num_quantizers=3, codebook_size=CODES, rotation_trick=False, **PLAIN
    )
    for layer, table in zip(module.layers, TABLE, strict=True):
        layer._codebook.embed.data.copy_(torch.from_numpy(table)[None])
    q = residual(*[vq(WIDTH, CODES, rules=(ema(),))] * 3)
    tables = tuple(code_state(jnp.asarray(t), (ema(),)) for t in TABLE)
    state = State(((),) * 3, tables)
    (z, index, loss), _ = theirs_on(module)
    out, _ = ours_on(q, state)
    close(out.indices, index)
    close(out.z, z)
    close(out.losses["commitment"] / WIDTH, loss.sum())


@pytest.mark.parametrize(
    ("levels", "symmetric"), [((8, 5, 5, 5, 7, 4), False), ((8, 5, 2, 5, 7, 4), True)]
)
def test_fsq(levels, symmetric):
    module = peer.FSQ(list(levels), preserve_symmetry=symmetric)
    q = fsq(levels, symmetric=symmetric)
    (z, index), slope = theirs_on(module)
    out, ours = ours_on(q, State())
    close(out.indices[..., 0], index)
    close(out.z, z)
    close(ours, slope)


def test_lfq():
    """Indices, output and each loss; their logarithms are cut at 1e-5."""
    module = peer.LFQ(
        dim=WIDTH, codebook_size=2**WIDTH, commitment_loss_weight=1.0
    ).train()
    cold = 0.5  # inverse temperature, at which few probabilities lie below the cut
    x = torch.from_numpy(0.3 * X).requires_grad_()
    (z, index, _), parts = module(x, inv_temperature=cold, return_loss_breakdown=True)
    q = lfq(WIDTH, temperature=1 / cold)
    ours = jnp.asarray(0.3 * X)
    out = q.quantize(q.init(jax.random.key(0)), ours)
    close(out.indices[..., 0], index)
    close(out.z, z)
    close(out.losses["entropy"], parts.per_sample_entropy, rtol=1e-3)
    close(out.losses["commitment"] / WIDTH, parts.commitment)
    batch = lookup_free.batch_entropy(ours, 1 / cold)
    close(batch, parts.batch_entropy, rtol=1e-3)


def test_simvq():
    module = peer.SimVQ(WIDTH, CODES, rotation_trick=True)
    module.frozen_codebook.data.copy_(torch.from_numpy(TABLE[0]))
    basis = module.code_transform.weight.detach().numpy().T
    q = simvq(WIDTH, CODES, estimator="rotation")
    state = State(Basis(jnp.asarray(basis)), Frozen(jnp.asarray(TABLE[0])))
    (z, index, loss), slope = theirs_on(module)
    out, ours = ours_on(q, state)
    close(out.indices[..., 0], index)
    close(out.z, z)
    close(ours, slope, rtol=1e-3, atol=1e-4)
    total = sum(q.weights[name] * value for name, value in out.losses.items())
    close(total / WIDTH, loss)


def test_orthogonality():
    close(
        losses.orthogonality(jnp.asarray(TABLE[0])),
        peer_vq.orthogonal_loss_fn(torch.from_numpy(TABLE[:1])),
    )
