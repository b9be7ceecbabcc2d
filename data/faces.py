"""Faces whose age is to be told: the UTKFace pictures, for whom has them."""

import pathlib

import numpy as np
from jaxtyping import Float


def load_faces(
    folder: str | pathlib.Path, *, side: int = 32
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]:
    """The aligned pictures of `<folder>/utkface`, grey, flattened; and ages in years.

    Files are named <age>_<gender>_<race>_<date>.jpg..., as they are published. Grey
    values in [0, 1], averaged down to side x side, in order of the files' names.
    Raises: FileNotFoundError where there are none, ValueError for a name with no age.
    """
    from PIL import Image  # comes with matplotlib; only who has the set needs it

    place = pathlib.Path(folder) / "utkface"
    files = sorted(place.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(
            f"{place}: holds no .jpg; put the aligned and cropped UTKFace there"
        )
    faces, ages = [], []
    for file in files:
        age = file.name.split("_")[0]
        if not age.isdigit():
            raise ValueError(f"{file.name}: must begin with an age, as 25_0_2_....jpg")
        with Image.open(file) as picture:
            small = picture.convert("L").resize((side, side), Image.Resampling.BOX)
        faces.append(np.asarray(small, np.float32).ravel() / 255)
        ages.append(float(age))
    return np.stack(faces), np.array(ages)
