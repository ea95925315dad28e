"""Normalization, crops, flips and the paper's colours, computed on the device.

The functions take one image (size, size, channels), uint8; `jax.vmap` makes batches of it. They
follow section 4.1 of the paper.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet.data.statistics import Statistics
from alexnet.errors import UsageError


class Preprocessing(NamedTuple):
    """The normalization of pixels of 0 to 255, (pixel - mean) / std, and their colours.

    Attributes:
      mean: (channels,) or, for every place of an image before it is cropped, (size, size,
        channels); float32.
      std: (channels,), float32.
      colours: (channels, channels), float32: its columns are the principal directions of the
        training images' colours, as long as their variances, for pixels of 0 to 1.
    """

    mean: np.ndarray
    std: np.ndarray
    colours: np.ndarray

    @classmethod
    def of(cls, statistics: Statistics, normalization: str) -> "Preprocessing":
        """Normalizes as in the paper ("mean") or by channel ("standard")."""
        mean, std = statistics.mean_image, statistics.std
        colours = statistics.eigenvectors * statistics.eigenvalues
        if normalization == "mean":
            return cls(mean, np.ones_like(std), colours)
        return cls(mean.mean((0, 1)), std, colours)

    @classmethod
    def neutral(cls, channels: int) -> "Preprocessing":
        """Leaves pixels as they are, for programs that are compiled and not run."""
        ones = np.ones(channels, np.float32)
        return cls(np.zeros_like(ones), ones, np.eye(channels, dtype=np.float32))

    def save(self, path: Path) -> None:
        np.savez(path, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Preprocessing":
        """Returns what `save` has written. Raises UsageError if it cannot be read."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in cls._fields})
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error

    def random_view(
        self, image: jax.Array, key: jax.Array, size: int, *, flip: bool, colour: float
    ) -> jax.Array:
        """Returns an image to train on: any crop, perhaps mirrored, its colours shifted.

        Args:
          image: (size, size, channels), uint8.
          key: the key of the random numbers.
          size: pixels along an edge of the crop.
          flip: whether to mirror half of the images.
          colour: deviation of the coefficients of the principal colours, one of each for an image.
        """
        offset_key, flip_key, colour_key = jax.random.split(key, 3)
        top, left = jax.random.randint(offset_key, (2,), 0, image.shape[0] - size + 1)
        view = self._crop(image, top, left, size)
        if flip:
            view = jnp.where(jax.random.bernoulli(flip_key), view[:, ::-1], view)
        if colour:
            drawn = jax.random.normal(colour_key, (len(self.std),))
            shift = 255.0 * (self.colours * (colour * drawn)[None]).sum(axis=1)
            view += (shift / self.std)[None, None]
        return view

    def middle(self, image: jax.Array, size: int) -> jax.Array:
        """Returns the central crop, to test with."""
        start = jnp.int32((image.shape[0] - size) // 2)
        return self._crop(image, start, start, size)

    def ten_crops(self, image: jax.Array, size: int) -> jax.Array:
        """Returns corners and middle, then the same mirrored: (10, size, size, channels)."""
        far, half = image.shape[0] - size, (image.shape[0] - size) // 2
        places = ((0, 0), (0, far), (far, 0), (far, far), (half, half))
        crops = [self._crop(image, jnp.int32(y), jnp.int32(x), size) for y, x in places]
        return jnp.concatenate([jnp.stack(crops), jnp.stack(crops)[:, :, ::-1]])

    def _crop(self, image: jax.Array, top: jax.Array, left: jax.Array, size: int) -> jax.Array:
        """Returns a normalized crop, float32."""

        def crop(array: jax.Array) -> jax.Array:
            start = (top, left, jnp.zeros_like(top))
            return lax.dynamic_slice(array, start, (size, size, array.shape[2]))

        mean = jnp.asarray(self.mean)
        mean = crop(mean) if mean.ndim == 3 else mean[None, None]
        return (crop(image).astype(jnp.float32) - mean) / self.std[None, None]
