"""Text as windows of bytes: Python's standard library, and text files of one's own."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inner_training.families import draws, family_of
from trimtab.errors import UserError
from trimtab.inner_training.networks.transformer import LanguageModel, VisionTransformer
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.tasks.language import (
    FEWEST,
    MOST,
    MOST_JUDGED,
    Part,
    StandardLibrary,
    TextFamily,
    TextVariation,
    library_folder,
    library_parts,
    windows,
)
from trimtab.inner_training.tasks.local_files.text import TextTask
from trimtab.inner_training.tasks.recipe import RecipeRange


def library() -> StandardLibrary:
    family = family_of("language")
    assert isinstance(family, StandardLibrary)
    return family


def some_text(count: int = 4000) -> bytes:
    return " ".join(f"{number:x}" for number in range(count)).encode()


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6), st.integers(1, 7))
def test_windows_are_the_first_of_each_kind(texts: list[bytes], length: int) -> None:
    expected: dict[bytes, int] = {}
    for number, text in enumerate(texts):
        for start in range(0, len(text) - length + 1, length):
            expected.setdefault(text[start : start + length], number)
    table, owner = windows([Part(str(number), text, False) for number, text in enumerate(texts)], length)
    assert [row.tobytes() for row in table] == list(expected)
    assert owner.tolist() == list(expected.values())


def test_the_manifest_is_that_of_the_files() -> None:
    family = library()
    lines = [line.split("  ") for line in family.manifest.splitlines()]
    assert tuple(name for _, name in lines) == family.parts
    text = b""
    for digest, name in lines:
        data = (library_folder() / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        assert 4096 <= len(data) <= 65536
        assert name.removesuffix(".py") in sys.stdlib_module_names
        text += data
    assert family.text_sha256 == hashlib.sha256(text).hexdigest()
    assert len(text) > 1_000_000


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_sha256sum_accepts_the_manifest() -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet"],
        input=library().manifest,
        text=True,
        cwd=library_folder(),
        check=False,
    )
    assert done.returncode == 0


def test_whole_files_are_held_out() -> None:
    files = [
        {name for instance in draws("language", 100, held_out=held_out) for name in instance.traits["parts"]}
        for held_out in (False, True)
    ]
    assert files[0].isdisjoint(files[1])
    assert sorted(files[0] | files[1]) == list(library().parts)
    for instance in draws("language", 5, held_out=True):
        text = b"\n".join((library_folder() / name).read_bytes() for name in instance.traits["parts"])
        for row in library().inputs[torch.tensor(instance.rows[instance.split("test")])].numpy():
            assert row.tobytes() in text


def test_only_training_windows_are_corrupted() -> None:
    family, hit, expected, replaced, without = library(), 0, 0.0, [], 0
    count = len(family.inputs) // 2
    for instance in draws("language", 60, held_out=False):
        share, train = instance.traits["corrupted"], instance.sizes[0]
        assert 0 <= share <= 1
        without += share == 0
        assert (instance.rows[train:] < count).all()
        noisy = instance.rows[:train][instance.rows[:train] >= count]
        hit, expected = hit + noisy.size, expected + share * train
        replaced.append((family.inputs[noisy] != family.inputs[noisy - count]).float().mean(1))
    assert 15 <= without <= 45
    assert hit == pytest.approx(expected, rel=0.05)
    shares = torch.cat(replaced)
    assert shares.mean() == pytest.approx(0.2, abs=0.01)
    assert shares.std() == pytest.approx(math.sqrt(0.2 * 0.8 / 33), rel=0.1)
    values = Counter(family.inputs[count:][family.inputs[count:] != family.inputs[:count]].tolist())
    assert len(values) == 128
    assert max(values.values()) < 1.5 * min(values.values())


def test_sizes_and_variation() -> None:
    instances = draws("language", 200, held_out=False)
    sizes = [instance.rows.size for instance in instances]
    assert FEWEST <= min(sizes) < 1.2 * FEWEST
    assert 0.8 * MOST < max(sizes) <= MOST
    for instance in instances:
        _, validation, test = instance.sizes
        assert validation == min(round(0.15 * instance.rows.size), MOST_JUDGED[0])
        assert test <= MOST_JUDGED[1]
        assert instance.buffers["blocks.1.gate0"].sum() == instance.traits["heads"] in (1, 2)
        assert instance.buffers["blocks.0.gate1"].sum() == instance.traits["width"]
    for trait, low, high in (("width", 16, 64), ("init_scale", 0.5, 2.0)):
        values = [instance.traits[trait] for instance in instances]
        assert low <= min(values) < 1.1 * low
        assert high / 1.1 < max(values) <= high
    parts = [len(instance.traits["parts"]) for instance in instances]
    assert (min(parts), max(parts)) == (1, 16)
    kinds = Counter(instance.traits["optimizer"] for instance in instances)
    assert set(kinds) == {"adamw", "adam", "sgd-momentum"}
    assert kinds["adamw"] > 75


def test_the_next_byte_is_asked_for() -> None:
    family = library()
    window = torch.arange(33, dtype=torch.int64).expand(2, 3, 33)
    x, y = family.present(window, torch.zeros(2, 3))
    assert torch.equal(x, window[..., :32])
    assert torch.equal(y, x + 1)
    outputs = torch.nn.functional.one_hot(y[0], 128).float() * 50
    assert family.loss(outputs, y[0]).tolist() == [0, 0, 0]
    assert family.score(outputs, y[0]).tolist() == [1, 1, 1]
    outputs[1, :8] = outputs[1, :8].roll(1, -1)
    assert family.score(outputs, y[0]).tolist() == [1, 0.75, 1]
    torch.testing.assert_close(family.loss(outputs, y[0]), torch.tensor([0, 50 * 0.25, 0]))
    assert family.loss_cap == 2 * math.log(128)


def test_a_population_learns_language() -> None:
    """The first evaluation is that of guessing, and a little training is better than knowing how common bytes are."""
    family = library()
    settings = OptimizerSettings(rule="adamw", lr=3e-3)
    instance = replace(family.draw(0, held_out=True), optimizer=settings, schedule=BaseSchedule())
    population = Population(family, 2, rules=("adamw",), mode="eager", score=True)
    population.reset([0, 1], [instance, instance])
    assert float(population.evaluate("test")[0]) == pytest.approx(math.log(128), abs=0.6)
    population.advance(150)
    test = family.inputs[torch.tensor(instance.rows[instance.split("test")])][:, 1:].flatten().numpy()
    common = np.bincount(test, minlength=128) / test.size
    unigram = -(common[common > 0] * np.log(common[common > 0])).sum()
    assert float(population.evaluate("test")[0]) < unigram
    assert 0.15 < float(population.evaluate("test", score=True)[0]) < 0.9


def test_libraries_without_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_bytes(b"#" * 5000)
    with pytest.raises(
        UserError, match=r"library is not in .*: 1 of at least 40 modules were found; run a Python that"
    ):
        library_parts(tmp_path)


def test_which_modules_are_taken(tmp_path: Path) -> None:
    for module in sys.stdlib_module_names:
        (tmp_path / f"{module}.py").write_bytes(b"#" * 5000)
    (tmp_path / "sitecustomize.py").write_bytes(b"#" * 5000)
    (tmp_path / "ast.py").write_bytes(b"#" * 4000)
    (tmp_path / "argparse.py").write_bytes(b"#" * 70_000)
    (tmp_path / "bisect.py").write_bytes(b"\xe4" * 5000)
    names = [part.name for part in library_parts(tmp_path)]
    left_out = {"ast", "argparse", "bisect", "stringprep", *(n for n in sys.stdlib_module_names if n.startswith("_"))}
    assert names == sorted(f"{module}.py" for module in sys.stdlib_module_names - left_out)
    by_name = {part.name: part.held_out for part in library_parts(library_folder())}
    assert all(part.held_out == by_name[part.name] for part in library_parts(tmp_path) if part.name in by_name)
    assert 0.35 < np.mean(list(by_name.values())) < 0.65


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "Hex numbers.txt"
    path.write_bytes(some_text())
    family = TextTask(path)
    assert (family.name, family.vocabulary, family.module.vocabulary) == ("text-hex-numbers", 128, 128)
    assert family.text_sha256 == hashlib.sha256(some_text()).hexdigest()
    assert (family.inputs.shape[1], family.module.context) == (33, 32)
    for instance in (family.draw(seed, held_out=bool(seed % 2)) for seed in range(10)):
        assert instance.traits["corrupted"] == 0
        for row in family.inputs[torch.tensor(instance.rows)].numpy():
            assert row.tobytes() in some_text()
    path.write_bytes(some_text() + "ä".encode())
    assert TextTask(path).vocabulary == 256
    assert TextTask(path).loss_cap == 2 * math.log(256)


def test_a_text_with_a_network_and_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_bytes(some_text())
    network = {"context": 20, "width": 24, "depth": 3, "heads": 3, "units": 8, "tied": True}
    family = TextTask(path, network=network, recipe=RecipeRange(kinds=("sgd",), batch=(4, 16)))
    assert (len(family.module.blocks), family.module.head, family.max_batch) == (3, None, 16)
    instance = family.draw(0, held_out=False)
    assert instance.optimizer.rule == "sgd"
    assert instance.traits["width"] == 8
    population = Population(family, 1, rules=("sgd",), mode="eager")
    population.reset([0], [instance])
    assert population.advance(2).losses.isfinite().all()


def test_the_beginning_of_a_long_text_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.inner_training.tasks.local_files import text

    monkeypatch.setattr(text, "BYTES", 5000)
    (tmp_path / "numbers.txt").write_bytes(some_text())
    family = TextTask(tmp_path / "numbers.txt")
    assert family.text_sha256 == hashlib.sha256(some_text()[:5000]).hexdigest()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, r"there is no file or folder '.*/a.txt'; give the path of a text file"),
        (b"", {}, "the text of 'text-a' has 0 different windows of 33 bytes for training instances and 0 for held-out"),
        (b"x" * 100_000, {}, "has 1 different windows .* 0 for held-out ones; give at least 32 each: more text or"),
        (some_text(400), {"network": {"context": 64}}, "windows of 65 bytes"),
        (some_text(), {"network": {"witdh": 64}}, "unknown argument of the network 'witdh'; did you mean 'width'"),
        (some_text(), {"network": {"heads": 5}}, "width is 32 and heads is 5"),
        (some_text(), {"network": {"context": 0}}, "context is 0; it must be at least 1"),
    ],
)
def test_text_errors(text: bytes | None, options: dict[str, object], message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
        TextTask(tmp_path / "a.txt", **options)  # type: ignore[arg-type]


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file; give the path of a text file"):
        TextTask(tmp_path)


def test_parts_of_one_role_only_are_refused() -> None:
    with pytest.raises(UserError, match="and 0 for held-out ones"):
        TextFamily("mine", "", [Part("all", some_text(), False)])


@pytest.mark.parametrize("corrupted", [0.0, 0.5])
def test_variation_of_ones_own(corrupted: float) -> None:
    parts = [Part("a", some_text(), False), Part("b", some_text()[1:], True)]
    family = TextFamily("mine", "", parts, variation=TextVariation(corrupted=corrupted, replaced=1.0))
    clean = len(windows(parts, 33)[0])
    assert len(family.inputs) == clean * (1 + (corrupted > 0))
    if corrupted:
        assert (family.inputs[clean:] != family.inputs[:clean]).all()
        assert max(family.draw(seed, held_out=False).traits["corrupted"] for seed in range(40)) <= 0.5


def test_the_networks_are_small() -> None:
    """A step of 4 windows or 8 images costs about 15 million floating-point operations, 6 per weight and token."""
    makers: dict[str, tuple[type, Callable[[], int]]] = {
        "language": (LanguageModel, lambda: 4 * 32),
        "sprites-vit": (VisionTransformer, lambda: 8 * 16),
    }
    for name, (kind, tokens) in makers.items():
        family = family_of(name)
        assert isinstance(family.module, kind)
        weights = sum(value.numel() for key, value in family.module.named_parameters() if key.endswith("weight"))
        assert 6 * weights * tokens() < 20e6


def test_images_vary_as_those_of_the_other_sprites() -> None:
    vit, conv = draws("sprites-vit", 60, held_out=False), family_of("sprites-conv")
    assert torch.equal(family_of("sprites-vit").inputs, conv.inputs)
    assert {int(instance.buffers["blocks.0.gate0"].sum()) for instance in vit} == {1, 2}
    widths = [instance.traits["width"] for instance in vit]
    assert 16 <= min(widths) < 18
    assert 60 < max(widths) <= 64
    assert {instance.batch_size for instance in vit} == {2, 4, 8}
