"""Batches do not depend on who makes them, nor on where a run was gone on with."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from image_folders import damage, save_classes

from alexnet.data import load
from alexnet.data.pipeline import Batch, Damage, evaluation_batches, training_batches
from alexnet.data.sources import ArraySource, Dataset, Source
from alexnet.errors import UsageError

EXAMPLES = Path(__file__).parents[2] / "examples"


def numbered(count: int) -> ArraySource:
    """Images of one pixel, the label of each its number."""
    numbers = np.arange(count)
    return ArraySource(np.uint8(numbers % 256).reshape(-1, 1, 1, 1), numbers, "numbers")


def take(source: Source, steps: int, batch_size: int = 4, **options) -> list[Batch]:
    settings = {"rows": range(batch_size), "seed": 0, "first_step": 0, "workers": 0} | options
    with training_batches(source, batch_size=batch_size, **settings) as batches:
        return list(islice(batches, steps))


def order(source: Source, steps: int, **options) -> list[list[int]]:
    return [batch.labels.tolist() for batch in take(source, steps, **options)]


def evaluate(source: Source, batch_size: int, workers: int = 0, rows=None) -> list[Batch]:
    rows = range(batch_size) if rows is None else rows
    with evaluation_batches(source, batch_size=batch_size, rows=rows, workers=workers) as batches:
        return list(batches)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for array, expected in zip(one, other, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("count", [4, 11, 1000])
def test_an_epoch_is_an_order_of_its_own(count):
    steps = count // 4

    def epochs(seed):
        labels = np.array(order(numbered(count), 3 * steps, seed=seed))
        return labels.reshape(3, steps * 4).tolist()

    found = epochs(0)
    for epoch in found:
        assert len(set(epoch)) == steps * 4
        assert set(epoch) <= set(range(count))
    assert epochs(0) == found
    if count > 4:
        assert len({tuple(epoch) for epoch in (*found, *epochs(1))}) == 6


def test_the_order_is_the_same_on_every_machine():
    # Of this version and others: a run is gone on with where it stopped.
    assert order(numbered(10), 3, seed=7) == [[3, 8, 2, 1], [0, 4, 9, 5], [7, 9, 0, 8]]


def test_every_example_is_left_out_at_times():
    left_out = [
        set(range(11))
        - {label for labels in order(numbered(11), 2, first_step=step) for label in labels}
        for step in range(0, 30, 2)
    ]
    assert all(len(rest) == 3 for rest in left_out)
    assert set.union(*left_out) == set(range(11))


def test_one_image_can_be_a_batch():
    assert order(numbered(1), 3, batch_size=1) == [[0]] * 3


def test_a_batch_has_the_images_of_its_labels():
    for batch in take(numbered(1000), 5, first_step=3):
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0], batch.labels % 256)
        assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
        assert (batch.damaged == -1).all()


@pytest.mark.parametrize("first_step", [1, 2, 3, 7])
def test_a_run_goes_on_where_it_was(first_step):
    whole = take(numbered(11), 9)
    assert_same(take(numbered(11), 9 - first_step, first_step=first_step), whole[first_step:])


def test_a_run_goes_on_after_many_steps():
    source = numbered(11)
    assert_same(take(source, 2, first_step=10**9), take(source, 3, first_step=10**9 - 1)[1:])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("interleaved", [False, True])
def test_processes_share_a_batch(processes, interleaved):
    source = numbered(30)
    whole, evaluated = take(source, 6, batch_size=12), evaluate(source, 12)
    shares = np.arange(12).reshape(processes, -1)
    if interleaved:
        shares = np.arange(12).reshape(-1, processes).T
    for rows in shares.tolist():
        for part, of_all in (
            (take(source, 6, batch_size=12, rows=rows), whole),
            (evaluate(source, 12, rows=rows), evaluated),
        ):
            assert_same(part, [Batch(*(array[rows] for array in batch)) for batch in of_all])


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory) -> Dataset:
    """Of 21 training images and 6 others, some are damaged."""
    path = tmp_path_factory.mktemp("damaged")
    save_classes(path / "train", {"a": 9, "b": 8, "c": 4})
    save_classes(path / "val", {"a": 2, "b": 2, "c": 2})
    for name in ("train/a/2.png", "train/a/3.png", "train/c/3.png"):
        damage(path / name, "truncated")
    damage(path / "val" / "b" / "0.png", "empty")
    damage(path / "val" / "c" / "1.png", "text")
    return load(f"folder:{path}", 16, seed=0)


DAMAGED = {2, 3, 20}
"""Training images of the folder."""


@pytest.mark.slow
def test_workers_make_the_same_batches(damaged_folder):
    source = damaged_folder.train
    rows = [3, 1]
    ours = take(source, 7, first_step=5, rows=rows, workers=2)
    assert not multiprocessing.active_children()
    whole = take(source, 12)[5:]
    assert_same(ours, [Batch(*(array[rows] for array in batch)) for batch in whole])


@pytest.mark.slow
def test_workers_evaluate_every_image_once(damaged_folder):
    source = damaged_folder.test
    ours = evaluate(source, 4, workers=2)
    assert not multiprocessing.active_children()
    assert_same(ours, evaluate(source, 4))
    labels = [batch.labels.tolist() for batch in ours]
    assert labels == [[0, 0, -1, 1], [2, -1, -1, -1]]
    assert [batch.damaged.tolist() for batch in ours] == [[-1, -1, 2, -1], [-1, 5, -1, -1]]
    for i in (0, 1, 3):
        np.testing.assert_array_equal(ours[0].images[i], source[i][0])
    assert not ours[1].images[1:].any()


def test_a_damaged_image_is_replaced_by_the_next(damaged_folder):
    source = damaged_folder.train
    following = {2: 4, 3: 4, 20: 0}
    found = set()
    # Batches of 7 leave nothing out.
    for batch in take(source, 6, batch_size=7):
        for image, label, number in zip(*batch, strict=True):
            assert label >= 0
            if number >= 0:
                found.add(int(number))
                expected, expected_label = source[following[int(number)]]
                np.testing.assert_array_equal(image, expected)
                assert label == expected_label
    assert found == DAMAGED


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_damaged_images(tmp_path, workers):
    save_classes(tmp_path, {"a": 4, "b": 4})
    for file in tmp_path.rglob("*.png"):
        damage(file, "text")
    source = load(f"folder:{tmp_path}", 8, seed=0).train
    with pytest.raises(
        UsageError, match=r"all of 6 images in a row are damaged, the first is .*png"
    ):
        take(source, 1, workers=workers)
    assert not multiprocessing.active_children()


def test_damage_is_named_and_counted_once(damaged_folder):
    lines = []
    damage = Damage(limit=5, warn=lines.append)
    for _ in range(2):
        for batch in take(damaged_folder.train, 6, batch_size=7):
            damage.add(damaged_folder.train, batch.damaged)
    folder = damaged_folder.train.name(0).removesuffix("a/0.png")
    names = [f"{folder}{name}" for name in ("a/2.png", "a/3.png", "c/3.png")]
    assert sorted(damage.names) == names
    assert [line.partition(": ")[0] for line in lines] == [
        f"skipped the damaged image {name}" for name in damage.names
    ]
    assert all("truncated" in line for line in lines)
    for batch in evaluate(damaged_folder.test, 4):
        damage.add(damaged_folder.test, batch.damaged)
    assert len(damage.names) == 5
    assert "b/0.png: not an image" in lines[3]


def test_too_much_damage_ends_a_run(damaged_folder):
    damage = Damage(limit=2, warn=lambda line: None)
    damage.add(damaged_folder.train, np.array([-1, 3, 2, 3]))
    with pytest.raises(
        UsageError, match=r"3 images are damaged, of 2 that may be; the last one is .*c/3\.png"
    ):
        damage.add(damaged_folder.train, np.array([20]))


def test_an_image_that_was_damaged_before_is_named(damaged_folder):
    lines = []
    Damage(limit=1, warn=lines.append).add(damaged_folder.train, np.array([0]))
    assert lines[0].endswith("a/0.png: it could not be read at first")


SCRIPT = """
    import os, signal, sys, time

    os.environ.pop("JAX_PLATFORMS", None)
    sys.path.insert(0, {examples!r})

    import jax
    from alexnet import data
    from alexnet.data import pipeline, sources

    class Spy(sources.ArraySource):
        in_memory = False

        def __getitem__(self, index):
            image, _ = super().__getitem__(index)
            return image, int(jax.config.jax_platforms == "cpu")

    def main():
        images = data.load("digits", 8, seed=0).train.source
        source = Spy(images.images, images.labels, "spied on")
        settings = dict(batch_size=8, rows=range(8), seed=0, first_step=0, workers=2)
        try:
            with pipeline.training_batches(source, **settings) as batches:
                next(batches)
                # The second is of the second worker: both have begun.
                print(next(batches).labels.tolist(), flush=True)
                time.sleep(60)
        except KeyboardInterrupt:
            sys.exit(130)

    if __name__ == "__main__":
        main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_of_a_script_that_is_ended(tmp_path, end, code):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT).format(examples=str(EXAMPLES)))
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        # That is, no worker takes an accelerator.
        assert process.stdout.readline() == f"{[1] * 8}\n"
        if end == signal.SIGKILL:
            process.kill()
        else:
            # As the terminal does it: to the workers too.
            os.killpg(process.pid, end)
        # The workers have the same output: it ends when they have.
        _, errors = process.communicate(timeout=20)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == code
    if end == signal.SIGINT:
        assert not errors
