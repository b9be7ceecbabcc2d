"""The papers' formulas against what the papers tabulate, and against counting."""

import jax
import pytest
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.parallel.closed_forms import (
    gpt_flops,
    gpt_parameters,
    layer_memory,
    tensor_parallel_sent,
    training_days,
)


@pytest.mark.parametrize(
    ("billions", "h", "l"), [(39.1, 8192, 48), (145.6, 12288, 80), (1008.0, 25600, 128)]
)
def test_sizes_are_those_of_the_table(billions, h, l):
    found = gpt_parameters(l, h, 51200, 2048) / 1e9
    assert found == pytest.approx(billions, rel=1e-3)


def test_sizes_are_those_of_our_own_gpt():
    """Biases, norms and learned positions included; the head is the embedding."""
    l, h, v, s = 3, 128, 512, 64
    config = TransformerConfig(
        vocab_size=v,
        depth=l,
        width=h,
        heads=4,
        max_len=s,
        norm="layer",
        position="learned",
        mlp="gelu",
        bias=True,
        tied=True,
    )
    params, _ = jax.eval_shape(model_parts(config).init, jax.random.key(0))
    counted = sum(x.size for x in jax.tree.leaves(params))
    # the formula leaves out the last norm alone
    assert counted - 2 * h == gpt_parameters(l, h, v, s)


def test_arithmetic_is_eight_operations_a_parameter_and_token():
    """With recomputation, where sequence and vocabulary are small beside the width."""
    l, h, v, s, batch = 96, 10**6, 1, 1, 1
    assert gpt_flops(batch, s, l, h, v) == pytest.approx(
        8 * batch * s * gpt_parameters(l, h, v, s), rel=1e-4
    )
    assert training_days(300e9, 175e9, 1024, 140e12) == pytest.approx(34, rel=0.01)


def test_four_all_reduces_of_the_stream():
    for n in (1, 2, 8):
        assert tensor_parallel_sent(2, 3, 5, n) == 4 * 2 * (n - 1) * 2 * 3 * 5 / n


def test_sequences_keep_less_where_the_paper_says():
    """MLP and attention together: when b s exceeds 16 times the width's two parts."""
    h, z, n = 256, 16, 16

    def keeps_less(positions):
        one, other = (
            layer_memory(kind, 1, positions, h, z, n) for kind in ("sequence", "tensor")
        )
        return one < other

    # 48 h^2 (1 - 1 / n) of weights against 2 b s h (1 - 1 / n) of activations
    assert not keeps_less(24 * h - 1)
    assert keeps_less(24 * h + 1)
    with pytest.raises(ValueError, match="17 devices, but 16 heads"):
        layer_memory("tensor", 1, 64, h, z, 17)
    with pytest.raises(ValueError, match="kind: 'ring'"):
        layer_memory("ring", 1, 64, h, z, 2)
