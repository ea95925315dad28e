"""What is done to images on their device: normalization, crops, flips and the paper's colours.

Of one image (size, size, channels), uint8; `jax.vmap` makes batches of it. Section 4.1 of the
paper has them all.
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
    """What a net's pixels are made with: (pixel - mean) / std, of pixels of 0 to 255.

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
        """As the paper ("mean") or as it is usual today ("standard")."""
        mean, std = statistics.mean_image, statistics.std
        colours = statistics.eigenvectors * statistics.eigenvalues
        if normalization == "mean":
            return cls(mean, np.ones_like(std), colours)
        return cls(mean.mean((0, 1)), std, colours)

    @classmethod
    def neutral(cls, channels: int) -> "Preprocessing":
        """Leaves pixels as they are: for programs that are compiled and not run."""
        ones = np.ones(channels, np.float32)
        return cls(np.zeros_like(ones), ones, np.eye(channels, dtype=np.float32))

    def save(self, path: Path) -> None:
        np.savez(path, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Preprocessing":
        """What `save` has written.

        Raises:
          UsageError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in cls._fields})
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error

    def normalized(self, image: jax.Array, top: jax.Array, left: jax.Array, size: int) -> jax.Array:
        """A crop of an image, float32."""
        crop = _crop(image, top, left, size).astype(jnp.float32)
        mean = jnp.asarray(self.mean)
        mean = _crop(mean, top, left, size) if mean.ndim == 3 else mean[None, None]
        return (crop - mean) / self.std[None, None]

    def random_view(
        self, image: jax.Array, key: jax.Array, size: int, *, flip: bool, colour: float
    ) -> jax.Array:
        """An image as it is trained on: any crop, perhaps mirrored, its colours shifted.

        Args:
          image: see above.
          key: of what is drawn.
          size: pixels along an edge of the crop.
          flip: whether to mirror half of the images.
          colour: deviation of the coefficients of the principal colours, one of each for an image.
        """
        offset_key, flip_key, colour_key = jax.random.split(key, 3)
        top, left = jax.random.randint(offset_key, (2,), 0, image.shape[0] - size + 1)
        view = self.normalized(image, top, left, size)
        if flip:
            view = jnp.where(jax.random.bernoulli(flip_key), view[:, ::-1], view)
        if colour:
            channels = len(self.std)
            drawn = jax.random.normal(colour_key, (channels,))
            shift = 255.0 * (self.colours * (colour * drawn)[None]).sum(axis=1)
            view += (shift / self.std)[None, None]
        return view

    def middle(self, image: jax.Array, size: int) -> jax.Array:
        """An image as it is tested with."""
        start = (image.shape[0] - size) // 2
        return self.normalized(image, *_starts(start, start), size)

    def ten_crops(self, image: jax.Array, size: int) -> jax.Array:
        """(10, size, size, channels): corners and middle, then the same mirrored."""
        far, half = image.shape[0] - size, (image.shape[0] - size) // 2
        places = ((0, 0), (0, far), (far, 0), (far, far), (half, half))
        crops = jnp.stack([self.normalized(image, *_starts(*at), size) for at in places])
        return jnp.concatenate([crops, crops[:, :, ::-1]])


def _starts(top: int, left: int) -> tuple[jax.Array, jax.Array]:
    return jnp.int32(top), jnp.int32(left)


def _crop(image: jax.Array, top: jax.Array, left: jax.Array, size: int) -> jax.Array:
    start = (top, left, jnp.zeros_like(top))
    return lax.dynamic_slice(image, start, (size, size, image.shape[2]))
