"""Every way in which a file or a network for it can be wrong, and what is said about it before any training."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.inner_training.files import (
    PIXELS,
    cifar_20,
    cifar_mislabelled,
    cifar_without_class,
    divided,
    images_with,
    one_class,
    pickled_cifar,
    save,
    text_as,
    text_image,
    truncated,
    write_cifar10,
    write_images,
    write_npz,
)
from trimtab import cli
from trimtab.errors import MissingExtraError, UserError
from trimtab.inner_training.population import Population
from trimtab.inner_training.tasks import resolve_family
from trimtab.inner_training.tasks.local_files import common
from trimtab.inner_training.tasks.local_files.cifar import cifar_task
from trimtab.inner_training.tasks.local_files.image_folder import image_folder_task
from trimtab.inner_training.tasks.local_files.npz import npz_task


def archive_of_text(path: Path) -> Path:
    """An archive of files that are no arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("inputs", "labels"):
            archive.writestr(name, "text")
    return path


def endless(path: Path) -> Path:
    """An archive with an array that says that it is larger than any memory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**14, 5)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", header.getvalue())
    return path


WRONG: list[tuple[str, Callable[[Path], Path], str]] = [
    (
        "cifar10",
        lambda at: at / "nowhere",
        "there is no file or folder .*nowhere'; download the binary version of CIFAR-10",
    ),
    (
        "cifar10",
        lambda at: at,
        r"holds none of data_batch_1.bin, .*; give the folder of the binary version of CIFAR-10",
    ),
    ("cifar10", pickled_cifar, "holds the Python version of CIFAR-10, which is pickled; download the binary version"),
    (
        "cifar10",
        lambda at: truncated(write_cifar10(at) / "test_batch.bin", 5000),
        r"test_batch.bin has 5000 bytes, which is no multiple of the 3073 of a record of CIFAR-10; .* download it again",
    ),
    ("cifar10", lambda at: truncated(write_cifar10(at) / "test_batch.bin", 0), "has 0 bytes"),
    ("cifar100", lambda at: write_cifar10(at) / "test_batch.bin", "no multiple of the 3074 of a record of CIFAR-100"),
    ("cifar10", cifar_mislabelled, "data_batch_3.bin: record 7 has label 10, but CIFAR-10 has labels 0 to 9"),
    ("cifar10", cifar_without_class, "class '9' has no example; give the folder with all files of CIFAR-10"),
    ("cifar10", lambda at: cifar_20(at), "number of examples is 20; it must be at least 40"),
    ("image-folder", lambda at: at / "nowhere", "there is no file or folder .* one folder of images for each class"),
    ("image-folder", lambda at: text_as(at / "a.txt"), "a.txt is a file; give a folder that holds one folder"),
    ("image-folder", lambda at: at, "holds no folders; give a folder that holds one folder of images for each class"),
    ("image-folder", divided, "holds test, train and no classes; give one of these folders"),
    ("image-folder", one_class, "holds 1 class; give at least two"),
    ("image-folder", lambda at: images_with(at, empty=True), "class 'dog' has no example; put images .* or remove"),
    (
        "image-folder",
        lambda at: images_with(at, torn=True),
        r"cannot read image '.*bee/2.jpg' \(OSError: .*\); repair or",
    ),
    ("image-folder", lambda at: text_image(at), "cannot read image .*UnidentifiedImageError.* repair or remove it"),
    ("npz", lambda at: at / "nowhere.npz", "there is no file or folder .* that numpy.savez has written"),
    ("npz", lambda at: at, "is no file; give the path of a file that numpy.savez has written"),
    ("npz", lambda at: archive_of_text(at / "a.npz"), r"inputs have shape \(\) and labels"),
    ("npz", lambda at: endless(at / "a.npz"), r"cannot be read as .npz \(.*MemoryError.* too large"),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.ones((120, 0))), r"inputs have shape \(120, 0\)"),
    ("npz", lambda at: text_as(at / "a.npz"), "cannot be read as .npz .* write it again from arrays of numbers"),
    ("npz", lambda at: text_as(at / "a.npz", ""), r"cannot be read as .npz \(EOFError"),
    ("npz", lambda at: truncated(write_npz(at / "a.npz"), 3000), r"cannot be read as .npz \(BadZipFile"),
    ("npz", lambda at: save(at / "a.npy", np.ones((50, 2))), "is a single array; it must hold the arrays 'inputs'"),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=None, y=np.ones(3)),
        "holds inputs, y but no 'labels'; it must hold",
    ),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.ones(120)), r"inputs have shape \(120,\) and labels \(120,\)"),
    ("npz", lambda at: write_npz(at / "a.npz", labels=np.ones((120, 1))), r"labels \(120, 1\); it must hold"),
    ("npz", lambda at: write_npz(at / "a.npz", labels=np.ones(119)), r"\(120, 6\) and labels \(119,\)"),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.full((120, 2), "a")), "inputs are of type <U1; give real"),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.full((120, 2), None)), "holds pickled objects"),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", inputs=np.full((120, 2), np.nan)),
        "inputs hold NaN, infinity or a number beyond",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=np.full(120, np.inf)),
        "labels hold NaN, infinity or a number beyond 1e.30; remove",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", inputs=np.linspace(0, 1e300, 240).reshape(120, 2)),
        "a number beyond 1e.30",
    ),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.full((120, 2), np.inf, np.float16)), "hold NaN, infinity"),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=np.arange(120) % 3 - 1),
        "labels go down to -1; number the classes",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=10**12 * (np.arange(120) % 2)),
        "class 1 has no example, but class 1000000000000 has; number the classes from 0 without gaps",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=np.zeros(120, int)),
        "every label is 0; give at least two classes",
    ),
    ("npz", lambda at: write_npz(at / "a.npz", labels=np.ones(120)), "labels that are all alike cannot be learned"),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.ones((3, 2)), labels=np.arange(3)), "number of examples is 3"),
]


@pytest.mark.parametrize(("form", "write", "message"), WRONG, ids=[f"{form}-{text[:40]}" for form, _, text in WRONG])
def test_what_is_wrong_is_said_in_one_line(
    form: str, write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        resolve_family(f"{form}:{path}")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_half_precision_is_as_good_as_any(tmp_path: Path) -> None:
    half = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float16)
    assert npz_task(write_npz(tmp_path / "a.npz", inputs=half)).inputs.isfinite().all()


def test_a_home_that_is_unknown() -> None:
    for make in (lambda: resolve_family("npz:~nobody_of_that_name/a.npz"), lambda: npz_task("~nobody_of_that_name/a")):
        with pytest.raises(UserError, match="'~nobody_of_that_name/.*' begins with a home folder that is unknown"):
            make()


def test_inputs_that_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LARGEST_TABLE", 72 * 3 * 32 * 32 * 4 - 1)
    with pytest.raises(UserError, match=r"72 examples of shape \(3, 32, 32\) take 0.0 GiB as float32, .* use smaller"):
        image_folder_task(write_images(tmp_path / "insects"))
    assert len(image_folder_task(tmp_path / "insects", examples=71).inputs) == 71
    monkeypatch.setattr(common, "LARGEST_TABLE", 120 * 6 * 4 - 1)
    with pytest.raises(UserError, match=r"120 examples of shape \(6,\)"):
        npz_task(write_npz(tmp_path / "a.npz"))


def test_options_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes is 50; give 10 for CIFAR-10, 100 or 20"):
        cifar_task(tmp_path, classes=50)
    with pytest.raises(UserError, match="size is 1000; it must be between 4 and 256"):
        image_folder_task(tmp_path, size=1000)
    with pytest.raises(UserError, match="examples is 10; it must be at least 40"):
        npz_task(write_npz(tmp_path / "a.npz"), examples=10)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 9)), r"to shape \(2, 9\); .* it must be \(2, 10\)"),
        (
            lambda: nn.Linear(5, 10),
            r"fails on two examples of shape \(2, 3, 32, 32\) .* make the module and the inputs fit",
        ),
    ],
)
def test_networks_that_do_not_fit(network: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        cifar_task(write_cifar10(tmp_path), network=network)
    assert str(caught.value).startswith(str(tmp_path))


class Counter(nn.Module):
    """Counts its calls in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(x)


@pytest.mark.parametrize(
    "network",
    [
        Counter,
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
    ],
    ids=["buffer", "batch-norm", "dropout"],
)
def test_networks_that_cannot_be_stacked(network: Callable[[], nn.Module], tmp_path: Path) -> None:
    task = npz_task(write_npz(tmp_path / "table.npz"), network=network)
    with pytest.raises(UserError, match="use layer or group norm in place of batch norm, leave dropout out"):
        Population(task, 2, mode="eager")


def test_pillow_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "insects")
    for name in [one for one in sys.modules if one.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"PIL is not installed; run: pip install 'trimtab\[images\]'"):
        image_folder_task(tmp_path / "insects")


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenario.yaml").write_text("id: mine\nfamilies:\n- npz:table.npz\n")
    assert cli.main(["check", "scenario.yaml"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "there is no file or folder" in err and "numpy.savez" in err
    write_npz(Path("table.npz"))
    assert cli.main(["check", "scenario.yaml"]) == 0
