"""Folders of images, and how to damage files in them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from alexnet.data.sources import Source


def save_classes(folder, counts, size=(40, 30)):
    draw = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def images(source: Source) -> np.ndarray:
    return np.stack([source[i][0] for i in range(len(source))])


def labels(source: Source) -> np.ndarray:
    return np.array([source[i][1] for i in range(len(source))])


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def damage(path: Path, kind: str) -> None:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    whole = file.getvalue()
    if kind == "missing":
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "headless": whole[100:],
                "empty": b"",
                "text": b"not a picture",
                "broken png": b"\x89PNG\r\n\x1a\n" + bytes(64),
            }[kind]
        )
