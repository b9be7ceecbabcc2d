"""The timeline of stalls is the closed form where there is one, and keeps its order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from narrows.parallel.checkpoint.timeline import stalls

rates = st.floats(1.0, 100.0)


@given(rates, rates, st.floats(0, 5), st.integers(1, 4), st.integers(1, 3))
def test_closed_forms(copy_rate, write_rate, gradients, saves, interval):
    case = {
        "size": 100,
        "chunk": 10,
        "copy_rate": copy_rate,
        "write_rate": write_rate,
        "gradients": gradients,
        "saves": saves,
        "interval": interval,
        "capacity": 100 * saves,  # never full
    }
    copy = 100 / copy_rate
    written = 10 / max(copy_rate, write_rate) + 100 / min(copy_rate, write_rate)
    sync = stalls(**case, engine="sync")
    asynchronous = stalls(**case, engine="async")
    lazy = stalls(**case, engine="lazy")
    assert sync == pytest.approx([written] * saves)
    assert asynchronous == pytest.approx([copy] * saves)
    assert lazy == pytest.approx([max(0.0, copy - gradients)] * saves, abs=1e-9)


@given(rates, rates, st.floats(0, 5), st.integers(1, 5), st.integers(1, 3))
def test_lazy_stops_least_whatever_the_buffer(
    copy_rate, write_rate, gradients, saves, lines
):
    """And not at all where the copy and the disk keep up."""
    case = {
        "size": 100,
        "chunk": 10,
        "copy_rate": copy_rate,
        "write_rate": write_rate,
        "gradients": gradients,
        "saves": saves,
        "capacity": 100 * lines,
    }
    totals = [sum(stalls(**case, engine=e)) for e in ("lazy", "async", "sync")]
    assert totals[0] <= totals[1] + 1e-9
    assert totals[1] <= totals[2] + 1e-9
    if max(100 / copy_rate, 110 / write_rate + 10 / copy_rate) <= gradients:
        assert totals[0] == 0


def test_bad_arguments_are_named():
    case: dict = {"size": 100, "copy_rate": 1, "write_rate": 1, "gradients": 0}
    case["chunk"] = 50
    with pytest.raises(ValueError, match="engine: 'slow', but allowed"):
        stalls(**case, engine="slow")
    with pytest.raises(ValueError, match="capacity: 20 bytes hold no chunk of 50"):
        stalls(**case, capacity=20)
