"""Convolutions as operators."""

import itertools

import numpy as np

import optax_constraints as oc
from cases._case import Case


def bound(kernel: np.ndarray, strides: tuple[int, ...] = (1,)) -> float:
    """An upper bound of the norm of a convolution with a kernel (*window, in, out).

    With strides a frequency of what comes out is that of several in the image.
    """
    *window, _, _ = kernel.shape
    degrees = [-(-n // s) - 1 for n, s in zip(window, strides, strict=True)]
    points = list(itertools.product(*(np.arange(max(8 * d, 1)) / max(8 * d, 1) for d in degrees)))
    aliases = list(itertools.product(*map(range, strides)))
    angles = 2 * np.pi * (np.array(points)[:, None] + np.array(aliases)) / np.array(strides)
    places = list(itertools.product(*map(range, window)))
    at = np.tensordot(
        np.exp(-1j * np.inner(angles, places)), kernel.reshape(-1, *kernel.shape[-2:]), 1
    )
    gram = np.sum(np.conj(np.swapaxes(at, -1, -2)) @ at, axis=1) / len(aliases)
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    top = np.max(values, axis=-1, keepdims=True)
    powers = np.sum((values / np.where(top > 0, top, 1)) ** 128, axis=-1) ** (1 / 128)
    largest = np.max(top[:, 0] * powers)
    return largest / np.cos(np.pi / 16) ** sum(d > 0 for d in degrees)


def at_most(most: float, groups: int, strides: tuple[int, ...]):
    """Reference for kernels scaled group by group: the projection, and how far outside."""

    def bounds(w: np.ndarray) -> np.ndarray:
        unit = np.max(np.abs(w[np.isfinite(w)]), initial=1e-300)
        own = [
            unit * bound(kernel / unit, strides) if np.all(np.isfinite(kernel)) else np.nan
            for kernel in np.split(w, groups, axis=-1)
        ]
        return np.repeat(own, w.shape[-1] // groups)

    def project(w: np.ndarray) -> np.ndarray:
        return w * (most / np.maximum(bounds(w), most))

    def outside(w: np.ndarray) -> np.ndarray:
        above = np.maximum(bounds(w) / most - 1 - 1e-14, 0)
        return np.broadcast_to(above, (1,) * (w.ndim - 1) + above.shape)

    return project, outside


CASES = [
    Case(
        oc.max_operator_norm(1.0, strides=1, padding="SAME", dilation=2, groups=1),
        *at_most(1, 1, (1,)),
        shape=(3, 5, 3),
        unit=(0, 1, 2),
        near=4e-6,
        slack=8,
        nearest=False,
    ),
    Case(
        oc.max_operator_norm(0.5, strides=(2, 1), padding="VALID", dilation=1, groups=3),
        *at_most(0.5, 3, (2, 1)),
        shape=(3, 2, 2, 3),
        unit=(0, 1, 2),
        near=4e-6,
        slack=8,
        nearest=False,
    ),
]
