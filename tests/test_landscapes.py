"""Surfaces against SciPy, automatic differentiation, finite differences and known minima."""

from ch11lib import landscapes
from ch11lib.backend import tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
import numpy as np
import pytest
from scipy import optimize

SURFACES = [
    *landscapes.GALLERY.values(),
    landscapes.Bowl(condition=7, angle=30),
    landscapes.DoubleWell(tilt=1.2),
]
every_surface = pytest.mark.parametrize("surface", SURFACES, ids=repr)


def points_of(surface, n=50):
    low, high = np.transpose(surface.window)
    return np.random.default_rng(0).uniform(low, high, (n, 2))


def bowl(condition, angle):
    turn = np.deg2rad(angle)

    def height(x, y):
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        return (along**2 + condition * across**2) / 2

    return height


#: The formulas again, as the literature prints them, for TensorFlow to differentiate.
FORMULAS = {
    "elongated bowl": lambda s, x, y: bowl(s.condition, s.angle)(x, y),
    "Rosenbrock": lambda s, x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
    "Beale": lambda s, x, y: (
        (1.5 - x + x * y) ** 2 + (2.25 - x + x * y * y) ** 2 + (2.625 - x + x * y * y * y) ** 2
    ),
    "plateau": lambda s, x, y: 1 - tf.exp(-0.5 * (x * x + y * y)),
    "double well": lambda s, x, y: (x - 1) ** 2 * (x + 1) ** 2 + s.tilt * x + y * y,
    "saddle": lambda s, x, y: 0.5 * x * x - 0.5 * y * y + 0.25 * y * y * y * y,
}


@every_surface
def test_value_gradient_and_hessian_against_automatic_differentiation(surface):
    points = points_of(surface)
    x, y = (tf.constant(column) for column in points.T)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch([x, y])
        with tf.GradientTape(persistent=True) as inner:
            inner.watch([x, y])
            height = FORMULAS[surface.name](surface, x, y)
        slopes = inner.gradient(height, [x, y])
    hessian = [outer.gradient(slope, [x, y], unconnected_gradients="zero") for slope in slopes]
    close = {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(surface.value(points), height, **close)
    np.testing.assert_allclose(surface.gradient(points), np.stack(slopes, axis=-1), **close)
    expected = np.moveaxis(np.array(hessian), -1, 0)
    np.testing.assert_allclose(surface.hessian(points), expected, **close)


@every_surface
def test_gradient_and_hessian_against_finite_differences(surface):
    for point in points_of(surface, 10):
        numeric = optimize.approx_fprime(point, surface.value, 1e-7)
        np.testing.assert_allclose(surface.gradient(point), numeric, rtol=1e-4, atol=2e-4)
        numeric = optimize.approx_fprime(point, surface.gradient, 1e-7)
        np.testing.assert_allclose(surface.hessian(point), numeric, rtol=1e-4, atol=1e-3)


def test_rosenbrock_against_scipy():
    surface, points = landscapes.Rosenbrock(), points_of(landscapes.Rosenbrock())
    np.testing.assert_allclose(surface.value(points), optimize.rosen(points.T), rtol=1e-12)
    for point in points:
        np.testing.assert_allclose(surface.gradient(point), optimize.rosen_der(point), rtol=1e-9)
        np.testing.assert_allclose(surface.hessian(point), optimize.rosen_hess(point), rtol=1e-12)


def test_published_values():
    # Moré, Garbow, Hillstrom (1981), doi:10.1145/355934.355936, functions 1 and 5.
    assert landscapes.Rosenbrock().value([-1.2, 1]) == pytest.approx(24.2)
    assert landscapes.Beale().value([1, 1]) == 1.5**2 + 2.25**2 + 2.625**2


@every_surface
def test_minima(surface):
    assert surface.minima.ndim == 2
    np.testing.assert_allclose(surface.gradient(surface.minima), 0, atol=1e-9)
    assert (np.linalg.eigvalsh(surface.hessian(surface.minima)) > 0).all()
    heights = surface.value(surface.minima)
    assert (np.diff(heights) >= 0).all()
    np.testing.assert_array_equal(surface.minimum, surface.minima[0])
    assert surface.value(surface.minimum) <= surface.value(points_of(surface, 1000)).min()
    # No minimum is missing: SciPy finds none but these.
    found = set()
    for point in points_of(surface, 40):
        result = optimize.minimize(
            surface.value, point, jac=surface.gradient, method="BFGS", options={"gtol": 1e-8}
        )
        distances = np.linalg.norm(surface.minima - result.x, axis=1)
        if distances.min() < 1e-4:
            found.add(int(distances.argmin()))
        else:  # run away over an edge
            low, high = np.transpose(surface.window)
            assert ((result.x < low) | (result.x > high)).any()
    assert found == set(range(len(surface.minima)))


@every_surface
def test_start_and_minima_lie_in_the_window(surface):
    low, high = np.transpose(surface.window)
    for point in (surface.start, *surface.minima):
        assert (low < point).all()
        assert (point < high).all()
    assert np.linalg.norm(surface.gradient(surface.start)) > 0


@every_surface
@settings(derandomize=True, deadline=None, max_examples=15)
@given(shape=array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
def test_any_shape_of_points(surface, shape):
    points = np.random.default_rng(1).standard_normal((*shape, 2))
    assert surface.value(points).shape == shape
    assert surface.gradient(points).shape == (*shape, 2)
    assert surface.hessian(points).shape == (*shape, 2, 2)
    for index in np.ndindex(shape):
        # Vectorized powers may differ from scalar ones in the last digit.
        close = {"rtol": 1e-13, "atol": 1e-13}
        np.testing.assert_allclose(
            surface.value(points)[index], surface.value(points[index]), **close
        )
        np.testing.assert_allclose(
            surface.gradient(points)[index], surface.gradient(points[index]), **close
        )
        np.testing.assert_allclose(
            surface.hessian(points)[index], surface.hessian(points[index]), **close
        )


@every_surface
def test_points_of_integers_and_wrong_shapes(surface):
    np.testing.assert_array_equal(surface.gradient([1, 2]), surface.gradient([1.0, 2.0]))
    for bad in (3.0, [1.0], [[1.0, 2.0, 3.0]]):
        for method in (surface.value, surface.gradient, surface.hessian):
            with pytest.raises(ValueError, match=r"points must have shape \(\.\.\., 2\); received"):
                method(bad)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(1, 1e4), st.floats(-360, 360))
def test_bowl_has_the_condition_and_the_direction_that_it_says(condition, angle):
    bowl = landscapes.Bowl(condition, angle)
    np.testing.assert_allclose(np.linalg.eigvalsh(bowl.matrix), bowl.eigenvalues, rtol=1e-9)
    flat = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
    np.testing.assert_allclose(bowl.matrix @ flat, flat, atol=1e-9 * condition)
    np.testing.assert_array_equal(bowl.hessian([[3.0, 1.0]])[0], bowl.matrix)


def test_double_well():
    well = landscapes.DoubleWell()
    heights = well.value(well.minima)
    assert heights[0] < heights[1] < well.value(well.barrier)
    np.testing.assert_allclose(well.gradient(well.barrier), 0, atol=1e-12)
    curvatures = np.linalg.eigvalsh(well.hessian(well.barrier))
    assert curvatures[0] < 0 < curvatures[1]
    # From the start the local minimum comes first.
    assert well.minima[1, 0] < well.start[0]


def test_surfaces_are_frozen_and_equal_by_value():
    assert landscapes.Bowl(3) == landscapes.Bowl(3.0) != landscapes.Bowl(4)
    with pytest.raises(AttributeError):
        landscapes.Bowl().condition = 2
    # Nobody can change the minima of others.
    landscapes.Bowl().minima[:] = 1
    assert not landscapes.Bowl().minima.any()


@pytest.mark.parametrize("bad", [0.5, -1, np.inf, np.nan, "2", None])
def test_bad_parameters(bad):
    with pytest.raises(ValueError, match="condition must be 1 or more; received"):
        landscapes.Bowl(condition=bad)


@pytest.mark.parametrize("bad", [0, -1, 1.6, np.nan, "2"])
def test_bad_tilt(bad):
    with pytest.raises(ValueError, match="tilt must be above 0 and at most"):
        landscapes.DoubleWell(tilt=bad)


def test_bad_angle():
    with pytest.raises(ValueError, match="angle must be a finite number; received inf"):
        landscapes.Bowl(angle=np.inf)


def test_contour():
    surface = landscapes.Beale()
    x, y, z = landscapes.contour(surface, n=17)
    assert x.shape == y.shape == z.shape == (17, 17)
    assert (x[0, 0], x[0, -1]) == surface.window[0]
    assert (y[0, 0], y[-1, 0]) == surface.window[1]
    assert z[3, 5] == pytest.approx(float(surface.value([x[3, 5], y[3, 5]])))
    x, y, z = landscapes.contour(surface, n=2, window=((0, 1), (2, 4)))
    assert (x[0, 1], y[1, 0]) == (1, 4)
    with pytest.raises(ValueError, match="n must be an int of 2 or more; received 1"):
        landscapes.contour(surface, n=1)
    for bad in (((0, 1),), ((1, 0), (0, 1)), ((0, np.inf), (0, 1))):
        with pytest.raises(ValueError, match="window must be"):
            landscapes.contour(surface, window=bad)


def test_gallery():
    assert all(name == surface.name for name, surface in landscapes.GALLERY.items())
    assert set(FORMULAS) == set(landscapes.GALLERY)
