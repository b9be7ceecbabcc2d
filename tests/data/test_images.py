"""Pictures: what a file holds comes back, and what is not a set of bytes is refused."""

import gzip
import lzma

import numpy as np
import pytest
from narrows.data.images import grey, load_images, padded


def write_idx(path, array):
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    header = bytes([0, 0, 8, array.ndim])
    path.write_bytes(gzip.compress(header + sizes + array.tobytes()))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mnist").mkdir()
    return tmp_path


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("test", "t10k")])
def test_idx_files_come_back_with_one_channel(folder, split, file):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (3, 5, 4), np.uint8)
    labels = np.array([7, 0, 255], np.uint8)
    write_idx(folder / "mnist" / f"{file}-images-idx3-ubyte.gz", images)
    write_idx(folder / "mnist" / f"{file}-labels-idx1-ubyte.gz", labels)
    read = load_images(folder, "mnist", split)
    assert np.array_equal(read.images[..., 0], images)
    assert read.labels.tolist() == [7, 0, 255]


def test_colour_pictures_come_back_with_channels_last(tmp_path):
    place = tmp_path / "cifar10_subset"
    place.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
    with lzma.open(place / "train_images.npy.xz", "wb") as file:
        np.save(file, images)
    np.save(place / "train_labels.npy", np.array([1, 9]))
    read = load_images(tmp_path, "cifar10_subset", "train")
    assert np.array_equal(read.images.transpose(0, 3, 1, 2), images)
    assert read.labels.dtype == np.int32


def test_what_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="allowed are mnist"):
        load_images(folder, "imagenet", "train")
    with pytest.raises(ValueError, match="allowed are train, test"):
        load_images(folder, "mnist", "valid")
    with pytest.raises(FileNotFoundError):
        load_images(folder, "mnist", "train")


def test_other_types_than_bytes_are_refused(folder):
    path = folder / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 13, 1]) + bytes(8)))
    with pytest.raises(ValueError, match="must be idx bytes"):
        load_images(folder, "mnist", "train")


def test_real_sets_have_their_published_sizes(shared_data):
    assert load_images(shared_data, "mnist", "test").images.shape == (10000, 28, 28, 1)
    fashion = load_images(shared_data, "fashion_mnist", "test")
    assert np.bincount(fashion.labels).tolist() == 10 * [1000]


def test_grey_is_brightness_and_padding_is_black():
    white = np.full((2, 3, 4, 3), 255, np.uint8)
    assert np.array_equal(grey(white), white[..., :1])
    green = grey(np.array([0, 200, 0], np.uint8).reshape(1, 1, 1, 3))
    assert green.item() == round(0.587 * 200)
    assert grey(white[..., :1]).shape == (2, 3, 4, 1)
    large = padded(white, 7)
    assert large.shape == (2, 7, 7, 3)
    assert np.array_equal(large[:, 2:5, 1:5], white)
    assert large.sum() == white.sum(dtype=int)
    with pytest.raises(ValueError, match="side: 3, but pictures are"):
        padded(white, 3)
