"""Turned digits: what turns them back gives the picture, and the angle is the label."""

import gzip

import numpy as np
import pytest
from narrows.data.rotated import LARGEST, rotated_digits, turn
from narrows.data.tables import named_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 pictures of a bar, upright, in the files of MNIST."""
    place = tmp_path_factory.mktemp("data") / "mnist"
    place.mkdir()
    images = np.zeros((30, 28, 28), np.uint8)
    images[:, 6:22, 13:15] = 255
    for kind, array in (
        ("images-idx3", images),
        ("labels-idx1", np.zeros(30, np.uint8)),
    ):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        packed = gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
        (place / f"train-{kind}-ubyte.gz").write_bytes(packed)
    return place.parent


def test_the_angle_is_read_off_the_picture(folder):
    """The axis of a bar's second moments lies at the label's angle, within a degree."""
    x, angles = rotated_digits(folder, seed=0, rows=30, side=28)
    assert x.shape == (30, 784)
    assert np.all(np.abs(angles) <= LARGEST)
    assert np.ptp(angles) > LARGEST
    row, column = np.mgrid[:28, :28] - 13.5
    for picture, angle in zip(x.reshape(-1, 28, 28), angles, strict=True):
        mass = picture / picture.sum()
        cross = (mass * row * column).sum()
        spread = (mass * (row**2 - column**2)).sum()
        found = np.degrees(0.5 * np.arctan2(2 * cross, spread))
        assert abs(found - angle) < 1


def test_quarter_turns_are_exact_and_smaller_pictures_are_means(folder):
    picture = np.random.default_rng(0).random((28, 28))
    np.testing.assert_allclose(turn(picture, 90), np.rot90(picture), atol=1e-9)
    large, angles = rotated_digits(folder, seed=3, rows=5, side=28)
    small, same = rotated_digits(folder, seed=3, rows=5, side=7)
    assert np.array_equal(angles, same)
    means = large.reshape(5, 7, 4, 7, 4).mean((2, 4)).reshape(5, 49)
    np.testing.assert_allclose(small, means)
    assert not np.array_equal(rotated_digits(folder, seed=4, rows=5)[1], angles)


@pytest.mark.parametrize(
    ("options", "says"), [({"side": 9}, "side: 9"), ({"rows": 31}, "rows: 31")]
)
def test_bad_input_is_named(folder, options, says):
    with pytest.raises(ValueError, match=says):
        rotated_digits(folder, seed=0, **({"rows": 5} | options))


def test_tables_without_files_are_found_by_name(folder):
    assert named_table(folder, "diabetes").x.shape == (442, 10)
    one, two = (named_table(folder, "friedman_none", seed=s) for s in (0, 1))
    assert one.x.shape == (4000, 10)
    assert not np.array_equal(one.x, two.x)
    with pytest.raises(ValueError, match="table: 'boston', but allowed are calif"):
        named_table(folder, "boston")
