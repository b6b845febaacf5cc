"""Test surfaces for optimizers: functions of two parameters, with gradient, Hessian and minima.

Each surface shows one difficulty: an elongated valley, a curved one, cliffs beside a plateau, a
plateau alone, a local minimum, a saddle point. A surface is a small frozen object; its methods take
any array of points whose last axis holds the two coordinates. `contour` gives what a contour plot
needs. Nothing here draws, and nothing needs TensorFlow.

References
----------
Rosenbrock (1960), An automatic method for finding the greatest or least value of a function,
doi:10.1093/comjnl/3.3.175.
Beale (1958), On an iterative method for finding a local minimum of a function of more than one
variable, Technical Report 25, Statistical Techniques Research Group, Princeton University.
"""

from dataclasses import dataclass
import math
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "GALLERY",
    "Beale",
    "Bowl",
    "DoubleWell",
    "Plateau",
    "Rosenbrock",
    "Saddle",
    "Surface",
    "contour",
]


class Surface:
    """A function of two parameters.

    A subclass writes its formulas in `_value`, `_gradient` and `_hessian`, which take the
    coordinates x and y.

    Attributes
    ----------
    name : str
    start : tuple of float
        A point from which the way down is instructive.
    window : tuple
        ``((x_low, x_high), (y_low, y_high))``, which shows the way and the minima.
    """

    name: ClassVar[str]
    start: ClassVar[tuple[float, float]]
    window: ClassVar[tuple[tuple[float, float], tuple[float, float]]]

    @property
    def minima(self) -> np.ndarray:
        """Local minima, shape (k, 2), the lowest first."""
        raise NotImplementedError

    def _value(self, x, y):
        raise NotImplementedError

    def _gradient(self, x, y):
        raise NotImplementedError

    def _hessian(self, x, y):
        raise NotImplementedError

    def value(self, points: ArrayLike) -> np.ndarray:
        """Return the height at points of shape (..., 2); shape (...)."""
        return self._value(*_coordinates(points))

    def gradient(self, points: ArrayLike) -> np.ndarray:
        """Return the gradient at points of shape (..., 2); same shape."""
        x, y = _coordinates(points)
        gradient = np.empty((*x.shape, 2))
        gradient[..., 0], gradient[..., 1] = self._gradient(x, y)
        return gradient

    def hessian(self, points: ArrayLike) -> np.ndarray:
        """Return the second derivatives at points of shape (..., 2); shape (..., 2, 2)."""
        x, y = _coordinates(points)
        xx, xy, yy = self._hessian(x, y)
        hessian = np.empty((*x.shape, 2, 2))
        hessian[..., 0, 0], hessian[..., 1, 1] = xx, yy
        hessian[..., 0, 1] = hessian[..., 1, 0] = xy
        return hessian

    @property
    def minimum(self) -> np.ndarray:
        """The lowest point (the first of them, if several are equally low), shape (2,)."""
        return self.minima[0]


def _coordinates(points) -> tuple[np.ndarray, np.ndarray]:
    points = np.asarray(points, dtype=np.float64)
    if points.shape[-1:] != (2,):
        raise ValueError(f"points must have shape (..., 2); received shape {points.shape}")
    return points[..., 0], points[..., 1]


@dataclass(frozen=True)
class Bowl(Surface):
    """Elongated quadratic bowl, ``f(p) = ½ pᵀ A p``, with its minimum 0 at the origin.

    A has the eigenvalues 1 and `condition`. The flat direction is the x axis, turned by `angle`.

    Parameters
    ----------
    condition : float
        Condition number of A, 1 or more.
    angle : float
        Rotation in degrees, counter-clockwise. At 0 the bowl is aligned with the axes, which is
        what methods with one rate for each coordinate can exploit.

    Examples
    --------
    >>> bowl = Bowl(condition=10)
    >>> bowl.gradient([2.0, 1.0])
    array([ 2., 10.])
    >>> Bowl(condition=3, angle=45).matrix.round(12)
    array([[ 2., -1.],
           [-1.,  2.]])
    """

    condition: float = 20.0
    angle: float = 0.0

    name: ClassVar = "elongated bowl"
    start: ClassVar = (-4.0, 1.5)
    window: ClassVar = ((-5.0, 5.0), (-3.0, 3.0))

    def __post_init__(self):
        if not (isinstance(self.condition, Real) and 1 <= self.condition < math.inf):
            raise ValueError(f"condition must be 1 or more; received {self.condition!r}")
        if not (isinstance(self.angle, Real) and math.isfinite(self.angle)):
            raise ValueError(f"angle must be a finite number; received {self.angle!r}")

    @property
    def eigenvalues(self) -> tuple[float, float]:
        """The curvatures along the flat and along the steep direction."""
        return 1.0, float(self.condition)

    @property
    def matrix(self) -> np.ndarray:
        """A, shape (2, 2)."""
        xx, xy, yy = self._entries()
        return np.array([[xx, xy], [xy, yy]])

    @property
    def minima(self) -> np.ndarray:
        """The origin."""
        return np.zeros((1, 2))

    def _entries(self):
        c, s = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        k = self.condition
        return c * c + k * s * s, (1 - k) * c * s, s * s + k * c * c

    def _value(self, x, y):
        xx, xy, yy = self._entries()
        return (xx * x**2 + 2 * xy * x * y + yy * y**2) / 2

    def _gradient(self, x, y):
        xx, xy, yy = self._entries()
        return xx * x + xy * y, xy * x + yy * y

    def _hessian(self, x, y):
        return self._entries()


@dataclass(frozen=True)
class Rosenbrock(Surface):
    """Curved valley, ``f(x, y) = (1 - x)² + 100 (y - x²)²``, with its minimum 0 at (1, 1).

    It is easy to find the valley and slow to follow it.

    Examples
    --------
    >>> Rosenbrock().value([[0, 0], [1, 1]]).tolist()
    [1.0, 0.0]
    """

    name: ClassVar = "Rosenbrock"
    start: ClassVar = (-1.2, 1.0)
    window: ClassVar = ((-2.0, 2.0), (-1.0, 3.0))

    @property
    def minima(self) -> np.ndarray:
        """(1, 1)."""
        return np.array([[1.0, 1.0]])

    def _value(self, x, y):
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    def _gradient(self, x, y):
        return -2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)

    def _hessian(self, x, y):
        return 2 - 400 * (y - 3 * x**2), -400 * x, 200


@dataclass(frozen=True)
class Beale(Surface):
    """Plateau between cliffs, with its minimum 0 at (3, ½).

    ``f(x, y) = (1.5 - x + xy)² + (2.25 - x + xy²)² + (2.625 - x + xy³)²``. The gradient is small
    around the minimum and enormous in the corners.

    Examples
    --------
    >>> Beale().value([0, 0]).tolist()
    14.203125
    """

    name: ClassVar = "Beale"
    start: ClassVar = (1.0, 1.5)
    window: ClassVar = ((-1.0, 4.5), (-2.0, 2.0))

    @property
    def minima(self) -> np.ndarray:
        """(3, ½)."""
        return np.array([[3.0, 0.5]])

    @staticmethod
    def _terms(x, y):
        """Yield each r = c - x + x yᵏ with its derivatives r_x, r_y, r_xy and r_yy."""
        for k, c in ((1, 1.5), (2, 2.25), (3, 2.625)):
            slope, bend = k * y ** (k - 1), k * (k - 1) * y ** max(k - 2, 0)
            yield c - x + x * y**k, y**k - 1, x * slope, slope, x * bend

    def _value(self, x, y):
        return sum(r**2 for r, *_ in self._terms(x, y))

    def _gradient(self, x, y):
        terms = list(self._terms(x, y))
        return sum(2 * r * rx for r, rx, *_ in terms), sum(2 * r * ry for r, _, ry, *_ in terms)

    def _hessian(self, x, y):
        terms = list(self._terms(x, y))
        return (
            sum(2 * rx**2 for _, rx, *_ in terms),
            sum(2 * (rx * ry + r * rxy) for r, rx, ry, rxy, _ in terms),
            sum(2 * (ry**2 + r * ryy) for r, _, ry, _, ryy in terms),
        )


@dataclass(frozen=True)
class Plateau(Surface):
    """A hole in a plain, ``f(x, y) = 1 - exp(-(x² + y²)/2)``, with its minimum 0 at the origin.

    Far from the hole there is next to nothing to go by: at distance r the slope is r exp(-r²/2).

    Examples
    --------
    >>> Plateau().gradient([-4, 0]).round(4) + 0
    array([-0.0013,  0.    ])
    """

    name: ClassVar = "plateau"
    start: ClassVar = (-3.0, 1.0)
    window: ClassVar = ((-4.0, 4.0), (-3.0, 3.0))

    @property
    def minima(self) -> np.ndarray:
        """The origin."""
        return np.zeros((1, 2))

    def _value(self, x, y):
        return -np.expm1(-(x**2 + y**2) / 2)

    def _gradient(self, x, y):
        bell = np.exp(-(x**2 + y**2) / 2)
        return x * bell, y * bell

    def _hessian(self, x, y):
        bell = np.exp(-(x**2 + y**2) / 2)
        return (1 - x**2) * bell, -x * y * bell, (1 - y**2) * bell


@dataclass(frozen=True)
class DoubleWell(Surface):
    """A good and a poor minimum, ``f(x, y) = (x² - 1)² + tilt x + y²``.

    Parameters
    ----------
    tilt : float
        How much the two wells differ, above 0 (the left well is lower) and at most 1.5; from
        1.54 on there is no right well.

    Examples
    --------
    >>> well = DoubleWell()
    >>> well.minima.round(3)
    array([[-1.036,  0.   ],
           [ 0.96 ,  0.   ]])
    >>> well.barrier.round(3)
    array([0.075, 0.   ])
    """

    tilt: float = 0.3

    name: ClassVar = "double well"
    start: ClassVar = (1.8, 1.0)
    window: ClassVar = ((-2.0, 2.2), (-1.5, 1.5))

    def __post_init__(self):
        if not (isinstance(self.tilt, Real) and 0 < self.tilt <= 1.5):
            raise ValueError(f"tilt must be above 0 and at most 1.5; received {self.tilt!r}")

    @property
    def minima(self) -> np.ndarray:
        """The global minimum on the left and the local one on the right."""
        return self._flat()[[0, 2]]

    @property
    def barrier(self) -> np.ndarray:
        """The saddle point between the wells, shape (2,)."""
        return self._flat()[1]

    def _flat(self):
        x = np.sort(np.roots([4, 0, -4, self.tilt]).real)
        return np.stack([x, np.zeros(3)], axis=-1)

    def _value(self, x, y):
        return (x**2 - 1) ** 2 + self.tilt * x + y**2

    def _gradient(self, x, y):
        return 4 * x * (x**2 - 1) + self.tilt, 2 * y

    def _hessian(self, x, y):
        return 12 * x**2 - 4, 0, 2


@dataclass(frozen=True)
class Saddle(Surface):
    """A saddle point at the origin, ``f(x, y) = x²/2 - y²/2 + y⁴/4``.

    The two minima, of height -¼, are at (0, ±1). A start close to the x axis leads past the saddle
    point, where the gradient almost vanishes.

    Examples
    --------
    >>> Saddle().hessian([0, 0])
    array([[ 1.,  0.],
           [ 0., -1.]])
    """

    name: ClassVar = "saddle"
    start: ClassVar = (-2.0, 0.001)
    window: ClassVar = ((-2.5, 2.5), (-1.6, 1.6))

    @property
    def minima(self) -> np.ndarray:
        """(0, 1) and (0, -1), equally low."""
        return np.array([[0.0, 1.0], [0.0, -1.0]])

    def _value(self, x, y):
        return x**2 / 2 - y**2 / 2 + y**4 / 4

    def _gradient(self, x, y):
        return x, y**3 - y

    def _hessian(self, x, y):
        return 1, 0, 3 * y**2 - 1


#: One of each kind, by name.
GALLERY: dict[str, Surface] = {
    surface.name: surface
    for surface in (Bowl(), Rosenbrock(), Beale(), Plateau(), DoubleWell(), Saddle())
}


def contour(
    surface: Surface, n: int = 120, window: tuple | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the grids that a contour plot of a surface needs.

    Parameters
    ----------
    surface : Surface
    n : int
        Points in each direction, 2 or more.
    window : tuple, optional
        ``((x_low, x_high), (y_low, y_high))`` in place of the surface's own.

    Returns
    -------
    x, y, z : numpy.ndarray
        Coordinates and heights, each of shape (n, n), for ``axes.contour(x, y, z)``.

    Examples
    --------
    >>> x, y, z = contour(Saddle(), n=3)
    >>> x[0].tolist(), y[:, 0].tolist(), z.shape
    ([-2.5, 0.0, 2.5], [-1.6, 0.0, 1.6], (3, 3))
    """
    if not isinstance(n, Integral) or n < 2:
        raise ValueError(f"n must be an int of 2 or more; received {n!r}")
    limits = np.asarray(surface.window if window is None else window, dtype=np.float64)
    if limits.shape != (2, 2) or not np.isfinite(limits).all() or (np.diff(limits) <= 0).any():
        raise ValueError(f"window must be ((x_low, x_high), (y_low, y_high)); received {window!r}")
    x, y = np.meshgrid(*(np.linspace(low, high, n) for low, high in limits))
    return x, y, surface.value(np.stack([x, y], axis=-1))
