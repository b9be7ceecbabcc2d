"""Concepts of pictures, birds and texts: what they say can be seen by eye."""

import numpy as np
import pytest
from narrows.data import concepts_birds, concepts_pictures, concepts_text


def test_pixels_decide_what_the_names_say():
    x = np.zeros((4, 12, 12, 1), np.uint8)
    x[0, 1:11, 5:7] = 255  # an upright bar
    x[1, 1:4, 1:11] = 255  # a bar lying at the top
    x[2, 2:10, 2:10] = 255
    x[2, 4:8, 4:8] = 0  # a frame around a hole
    x[3] = np.eye(12, dtype=np.uint8)[..., None] * 255  # down and to the right
    scores = dict(
        zip(
            concepts_pictures.PIXEL_NAMES,
            concepts_pictures.pixel_scores(x).T,
            strict=True,
        )
    )
    assert scores["tall"][0] > 0.2 > -0.2 > scores["tall"][1]
    assert np.argmax(scores["top_heavy"]) == 1
    assert np.argmax(scores["slanted"]) == 3
    assert scores["holed"].tolist() == [0, 0, 1, 0]
    assert np.argmax(scores["hollow"]) in (1, 2)
    np.testing.assert_allclose(scores["mirrored"][:3], 0, atol=1e-9)
    assert scores["mirrored"][3] < -0.5
    np.testing.assert_allclose(scores["bright"], x.mean((1, 2, 3)) / 255)
    found = concepts_pictures.pixel_concepts(x, concepts_pictures.cuts_of(x))
    assert found.shape == (4, 8)
    assert np.all(found[:, 0] == (scores["bright"] > np.median(scores["bright"])))
    with pytest.raises(ValueError, match="images: shape"):
        concepts_pictures.pixel_scores(np.zeros((2, 4, 4, 3), np.uint8))


def test_garments_tell_all_classes_apart():
    said = concepts_pictures.garment_concepts(np.arange(10))
    assert len(np.unique(said, axis=0)) == 10


def write_archive(place):
    """Three pictures of two classes with two attributes; one line has a stray word."""
    (place / "attributes").mkdir(parents=True)
    (place / "images.txt").write_text("1 a/x.jpg\n2 a/y.jpg\n3 b/z.jpg\n")
    (place / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n")
    (place / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    (place / "attributes" / "image_attribute_labels.txt").write_text(
        "1 1 1 4 2.5\n1 2 0 3 1.0\n2 1 0 1 9.9\n2 2 1 4 0 1.2\n3 1 0 2 1\n3 2 1 1 7\n"
    )


def test_the_archive_is_read_by_its_lists(tmp_path):
    write_archive(tmp_path)
    archive = concepts_birds.read_archive(tmp_path)
    assert archive.paths == ("a/x.jpg", "a/y.jpg", "b/z.jpg")
    assert archive.labels.tolist() == [0, 0, 1]
    assert archive.train.tolist() == [True, False, True]
    assert archive.present.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert archive.known.tolist() == [[1, 1], [0, 1], [1, 0]]
    assert concepts_birds.by_class(archive).tolist() == [[1, 0], [0, 0]]
    (tmp_path / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(ValueError, match="1 class labels"):
        concepts_birds.read_archive(tmp_path)


def test_birds_are_drawn_from_their_shares(shared_data):
    birds = concepts_birds.load_birds(shared_data)
    assert birds.share.shape == (200, 312)
    assert len(birds.names) == 112
    assert birds.names[0] == "has_bill_shape::dagger"
    rows = concepts_birds.simulate(birds, 4000, seed=0, classes=5, noise=0.0)
    assert set(rows.labels) == set(range(5))
    np.testing.assert_array_equal(rows.concepts, birds.concepts()[rows.labels])
    mix = np.random.default_rng(0).normal(size=(312, 64)) / 8
    for y in range(5):
        mean = (birds.share[y] - birds.share.mean(0)) @ mix
        np.testing.assert_allclose(rows.x[rows.labels == y].mean(0), mean, atol=0.15)
    with pytest.raises(ValueError, match="classes: 201, but must be from 2 to 200"):
        concepts_birds.simulate(birds, 4, seed=0, classes=201)


def test_passages_are_cut_apart_and_hide_their_preparation(shared_data):
    learn, test = concepts_text.load_passages(shared_data, 40, seed=0)
    assert np.bincount(learn.labels).tolist() == [10] * 4
    assert not set(learn.text) & set(test.text)
    assert all(len(t) == 200 for t in learn.text)
    assert not any(mark in t for t in learn.text for mark in ("<unk>", "@-@", "\n"))
    features = concepts_text.text_features(learn.text)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(
        learn.concepts, concepts_text.text_concepts(learn.text)
    )
