"""Reads labels for ImageNet's flat val/ folder from the devkit.

In: image names, the sorted class folders in train/, and the devkit folder. Out: one label per image.
Invariant: labels are looked up by the number in the file name, so a subset of the validation set is labeled correctly
too.
"""

import re
from pathlib import Path

from scalekd_cache.config.places import home_path
from scalekd_cache.data.base import missing_folder_error
from scalekd_cache.errors import UserError, counted

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def flat_val_labels(root: Path, images: list[str], class_names: list[str], devkit: str | None) -> list[int]:
    """Labels of `images`, whose names look like ILSVRC2012_val_00000001.JPEG.

    Raises:
        UserError: the devkit is missing or damaged, an image has no number or one beyond the ground truth, or the class
            (WordNet ID) of an image is not in train/.
    """
    data = _devkit_data(root, devkit)
    wnids = _read_wnids(data / "meta.mat")
    truth = _read_truth(data / TRUTH)
    number = {name: label for label, name in enumerate(class_names)}
    labels = []
    for image in images:
        found = re.fullmatch(r"\D.*_(\d{8})", image.rpartition(".")[0])
        index = int(found[1]) if found else 0
        if not 1 <= index <= len(truth):
            raise UserError(
                "an image in the flat val/ folder has no label in the ground truth file",
                got=image,
                expected=f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(truth):08d}.JPEG",
                where=root / "val",
                fix="restore the original file names, or move the images into class folders",
            )
        wnid = wnids.get(truth[index - 1], f"id {truth[index - 1]}, not in meta.mat")
        if wnid not in number:
            raise UserError(
                "val/ has a class that is missing from train/",
                got=f"{image} is {wnid}",
                expected=f"one of the {counted(len(class_names), 'folder')} in train/, such as {class_names[0]}",
                where=root / "val",
                fix="add the class to train/, or remove images of unused classes from val/",
            )
        labels.append(number[wnid])
    return labels


def _devkit_data(root: Path, devkit: str | None) -> Path:
    folder = root / DEVKIT if devkit is None else home_path(devkit)
    for data in (folder / "data", folder):
        if (data / "meta.mat").is_file() and (data / TRUTH).is_file():
            return data
    raise missing_folder_error(
        "val/ is flat, but the ImageNet devkit with its labels is missing",
        folder,
        f"data/meta.mat and data/{TRUTH}",
        f"unpack {DEVKIT}.tar.gz next to val/, or set data.devkit, or move the images into class folders",
    )


def _read_wnids(path: Path) -> dict[int, str]:
    """The WordNet ID of each leaf class (a class without children), keyed by ILSVRC2012_ID."""
    import scipy.io

    try:
        synsets = scipy.io.loadmat(path, squeeze_me=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"].flat, synsets["WNID"].flat, synsets["num_children"].flat)
        return {int(number): str(wnid) for number, wnid, children in rows if int(children) == 0}
    except Exception as error:  # scipy raises many exception types on a damaged file
        raise UserError(
            "cannot read the devkit's meta.mat",
            got=f"{type(error).__name__}: {error}",
            expected="a struct array `synsets` with ILSVRC2012_ID, WNID and num_children",
            where=path,
            fix="unpack the devkit again",
        ) from error


def _read_truth(path: Path) -> list[int]:
    """The ILSVRC2012_IDs of the validation images in numerical order, from image 1."""
    try:
        return [int(line) for line in path.read_text("ascii").split()]
    except ValueError as error:
        raise UserError(
            "cannot read the devkit's ground truth file",
            got=error,
            expected="one number per line",
            where=path,
            fix="unpack the devkit again",
        ) from error
