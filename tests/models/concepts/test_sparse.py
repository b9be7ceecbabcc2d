"""The elastic net's path: each fit is the optimum, wherever it was started from."""

import numpy as np
import pytest
from narrows.models.concepts import sparse
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

N, K, M = 400, 7, 4
STRENGTHS = (0.3, 0.05, 0.01, 0.001)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, K))
    labels = np.argmax(x[:, :M] + 0.7 * rng.gumbel(size=(N, M)), 1)
    return (x - x.mean(0)) / x.std(0), labels


@pytest.fixture(scope="module")
def heads(rows):
    return sparse.elastic_net_path(*rows, STRENGTHS, alpha=0.9)


def gradient(x, labels, weight, bias):
    error = (softmax(x @ weight.T + bias, 1) - np.eye(M)[labels]) / N
    return error.T @ x, error.sum(0)


@pytest.mark.parametrize("i", range(len(STRENGTHS)))
def test_each_fit_meets_the_conditions_of_its_optimum(rows, heads, i):
    """|gradient| <= strength alpha at a zero, equal to it, with sign, elsewhere."""
    weight, bias = (np.asarray(v[i], np.float64) for v in heads[:2])
    slope, level = gradient(*rows, weight, bias)
    slope += 2 * STRENGTHS[i] * 0.1 * weight
    edge, zero = STRENGTHS[i] * 0.9, weight == 0
    assert np.all(np.abs(slope[zero]) <= edge + 3e-5)
    np.testing.assert_allclose(slope[~zero], -edge * np.sign(weight[~zero]), atol=3e-5)
    np.testing.assert_allclose(level, 0, atol=3e-5)
    np.testing.assert_allclose(bias.sum(), 0, atol=1e-4)


def test_weights_leave_as_the_strength_grows(heads):
    counts = np.count_nonzero(heads.weight, axis=(1, 2))
    assert np.all(np.diff(counts) >= 0)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("i", range(len(STRENGTHS)))
def test_a_fit_from_nothing_is_the_fit_along_the_path(rows, heads, i):
    """In what it says: a column that tells nothing leaves its weights' mean open."""
    alone = sparse.elastic_net_path(*rows, STRENGTHS[i : i + 1], alpha=0.9)
    said = [
        log_softmax(rows[0] @ np.asarray(w).T + b, 1)
        for w, b in ((alone.weight[0], alone.bias[0]), (heads.weight[i], heads.bias[i]))
    ]
    np.testing.assert_allclose(*said, atol=2e-3)


def test_the_optimum_is_scikit_learn_s(rows, heads):
    x, labels = rows
    own = LogisticRegression(
        C=1 / (N * 0.01 * 1.1),
        l1_ratio=0.9 / 1.1,
        solver="saga",
        max_iter=20_000,
        tol=1e-8,
    ).fit(x, labels)
    np.testing.assert_allclose(heads.weight[2], own.coef_, atol=2e-3)
    ours = log_softmax(x @ np.asarray(heads.weight[2]).T + heads.bias[2], 1)
    np.testing.assert_allclose(ours, own.predict_log_proba(x), atol=5e-3)


def test_columns_and_classes_in_another_order_give_the_same_head(rows, heads):
    x, labels = rows
    columns, names = np.random.default_rng(1).permutation(K), np.array([2, 0, 3, 1])
    moved = sparse.elastic_net_path(x[:, columns], names[labels], [0.01], alpha=0.9)
    np.testing.assert_allclose(
        moved.weight[0][names], np.asarray(heads.weight[2])[:, columns], atol=2e-3
    )


def test_too_few_steps_are_told(rows):
    with pytest.warns(ConvergenceWarning, match="after 3 steps"):
        stopped = sparse.elastic_net_path(*rows, [0.001], max_iter=3)
    assert stopped.steps[0] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strengths": [0.1, 0.0]}, "every strength must be above 0"),
        ({"strengths": 0.1}, "every strength must be above 0"),
        ({"alpha": 1.5}, "alpha from 0 to 1"),
        ({"tol": 1e-9}, "float32 allows 1e-06 or more"),
        ({"classes": np.repeat([0, 2], N // 2)}, "each from 0 to the largest"),
    ],
)
def test_bad_input_is_named(rows, given, said):
    x, labels = rows
    with pytest.raises(ValueError, match=said):
        sparse.elastic_net_path(
            **({"x": x, "classes": labels, "strengths": [0.1]} | given)
        )
