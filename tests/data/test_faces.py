"""Ages come from the files' names, faces from their pixels."""

import numpy as np
import pytest
from narrows.data.faces import load_faces
from narrows.data.tables import named_table, split


def write(place, name, level):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((40, 40, 3), level, np.uint8)).save(place / name)


def test_ages_and_grey_values_are_those_of_the_files(tmp_path):
    place = tmp_path / "utkface"
    place.mkdir()
    for number, (age, level) in enumerate([(61, 0), (7, 255), (25, 51)] * 4):
        write(place, f"{age}_0_2_2017{number:03}.jpg.chip.jpg", level)
    x, ages = load_faces(tmp_path, side=8)
    assert x.shape == (12, 64)
    assert set(ages) == {7, 25, 61}
    for age, level in ((61, 0), (7, 1), (25, 0.2)):
        np.testing.assert_allclose(x[ages == age], level, atol=0.01)
    parts = split(named_table(tmp_path, "utkface"), seed=0)
    assert parts.train.x.shape == (8, 1024)


def test_a_folder_without_faces_and_a_name_without_an_age_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.jpg"):
        load_faces(tmp_path)
    (tmp_path / "utkface").mkdir()
    write(tmp_path / "utkface", "face.jpg", 9)
    with pytest.raises(ValueError, match=r"face\.jpg: must begin with an age"):
        load_faces(tmp_path)
