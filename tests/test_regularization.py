from ch11lib import datasets, training
from ch11lib import regularization as reg
from ch11lib.backend import keras
import numpy as np
import pytest

L = keras.layers
saves = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def net(*extra):
    return keras.Sequential([keras.Input((6,)), L.Dense(8, "relu"), *extra, L.Dense(3)])


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(50, 6)).astype("float32")


def test_penalty_is_what_keras_adds_to_the_loss(x):
    w = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    got = float(keras.regularizers.L1L2(0.02, 0.03)(w))
    assert np.isclose(reg.penalty(w, l1=0.02, l2=0.03), got, rtol=1e-5)
    assert np.isclose(
        reg.penalty([w, w], l2=0.03), 2 * float(keras.regularizers.L2(0.03)(w)), rtol=1e-5
    )


def test_max_norm_equals_keras_on_the_axis_of_a_unit():
    w = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    for axis in (0, 1):
        expected = keras.ops.convert_to_numpy(keras.constraints.MaxNorm(1.2, axis=axis)(w))
        np.testing.assert_allclose(reg.max_norm(w, 1.2, axis), expected, rtol=1e-5)
    assert (np.linalg.norm(reg.max_norm(w, 1.2), axis=0) <= 1.2 + 1e-6).all()
    k = np.random.default_rng(1).normal(size=(3, 3, 2, 5))
    expected = keras.ops.convert_to_numpy(keras.constraints.MaxNorm(1.0, axis=[0, 1, 2])(k))
    np.testing.assert_allclose(reg.max_norm(k, 1.0, (0, 1, 2)), expected, rtol=1e-5)


def test_dropout_moments_and_values():
    out, mask = reg.dropout(np.ones(200_000), 0.75, np.random.default_rng(0))
    assert set(np.unique(out)) == {0.0, 4.0}
    assert abs(mask.mean() - 0.25) < 0.005


def test_alpha_dropout_has_keras_two_values():
    ours = np.unique(reg.alpha_dropout(np.zeros(500), 0.3, np.random.default_rng(0)))
    keras_ = np.unique(
        keras.ops.convert_to_numpy(L.AlphaDropout(0.3, seed=1)(np.zeros(500, "f"), training=True))
    )
    np.testing.assert_allclose(ours, keras_, rtol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: reg.dropout(np.ones(2), 1.0, np.random.default_rng(0)),
        lambda: reg.alpha_dropout(np.ones(2), -0.1, np.random.default_rng(0)),
        lambda: reg.penalty([1.0], l2=-1),
        lambda: reg.max_norm(np.ones((2, 2)), 0),
        lambda: reg.max_norm(np.ones((2, 2)), 1, 2),
        lambda: reg.mc_model(net()),
        lambda: reg.mc_model(net(L.GaussianDropout(0.1))),
        lambda: reg.mc_predict(net(L.Dropout(0.5)), np.ones((2, 6))),
        lambda: reg.mc_predict(net(reg.MCDropout(0.5)), np.ones((2, 6)), passes=0),
        lambda: reg.RegularizedFleet([{"seed": 0, "dropout": 1.0}]),
        lambda: reg.RegularizedFleet([{"seed": 0, "l2": -1}]),
        lambda: reg.RegularizedFleet([{"seed": 0, "max_norm": 0}]),
        lambda: reg.RegularizedFleet([{"l2": 1}]),
        lambda: reg.RegularizedFleet([{"seed": 0, "shift": 1.5}]),
        lambda: reg.RegularizedFleet([{"seed": 0, "stop": 0}]),
        lambda: reg.calibration([[0.5, 0.6]], [0]),
        lambda: reg.calibration([[0.5, 0.5]], [2]),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="must"):
        call()


def functional():
    i = keras.Input((6,))
    shared, drop = L.Dense(6, "relu"), L.AlphaDropout(0.4)
    return keras.Model(i, L.Dense(3)(L.Add()([drop(shared(i)), shared(shared(i))])))


@pytest.mark.parametrize(
    "make",
    [
        lambda: net(L.BatchNormalization(), L.Dropout(0.5)),
        functional,
        lambda: keras.Sequential([keras.Input((6,)), net(L.Dropout(0.5)), L.Dense(2)]),
    ],
)
def test_conversion_copies_and_shares_nothing(make, x):
    model = make()
    mc = reg.mc_model(model)
    assert not {id(v) for v in model.variables} & {id(v) for v in mc.variables}
    before, plain = model.get_weights(), keras.ops.convert_to_numpy(model(x))
    state = [v.numpy().copy() for v in mc.variables]
    a, b, c = (reg.mc_predict(mc, x, 300, seed=s, rows=4000) for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert a.shape[:2] == (300, 50)
    assert len(np.unique(a.reshape(300, -1), axis=0)) > 200  # 50 images: masks hardly repeat
    for old, v in zip(state, mc.variables, strict=True):
        assert np.array_equal(old, v.numpy())
    mc.set_weights([w + 1 for w in mc.get_weights()])
    assert all(np.array_equal(p, q) for p, q in zip(before, model.get_weights(), strict=True))
    assert np.array_equal(plain, keras.ops.convert_to_numpy(model(x)))


def test_mean_of_passes_of_a_linear_readout_is_the_plain_output(x):
    model = net(L.Dropout(0.5))
    passes = reg.mc_predict(reg.mc_model(model), x, 2000, seed=0)
    error = (passes.mean(0) - keras.ops.convert_to_numpy(model(x))) / (
        passes.std(0) / 2000**0.5 + 1e-9
    )
    assert np.abs(error).max() < 5
    assert 0.7 < error.std() < 1.3


@saves
def test_layers_survive_saving(tmp_path, x):
    model = net(reg.MCDropout(0.5, seed=3), reg.MCAlphaDropout(0.1))
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert [type(v) for v in again.layers] == [type(v) for v in model.layers]
    np.testing.assert_array_equal(reg.mc_predict(model, x, 4, 1), reg.mc_predict(again, x, 4, 1))


def test_calibration_of_calibrated_predictions():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 100_000)
    y = (rng.random(100_000) > p).astype(int)
    probabilities = np.stack([p, 1 - p], 1)
    assert reg.calibration_error(probabilities, y) < 0.01
    assert abs(reg.calibration_error(probabilities, 0 * y) - 0.25) < 0.01
    expected = keras.losses.sparse_categorical_crossentropy(y[:9], probabilities[:9])
    assert np.isclose(
        reg.negative_log_likelihood(probabilities[:9], y[:9]), np.mean(expected), rtol=1e-5
    )


def test_bins_count_by_their_size():
    # Three predictions of 0.9 are right, one of 0.6 is wrong: (3 * 0.1 + 1 * 0.6) / 4.
    probabilities = [[0.9, 0.1]] * 3 + [[0.6, 0.4]]
    assert np.isclose(reg.calibration_error(probabilities, [0, 0, 0, 1]), 0.225)


def keras_twin(fleet, i):
    s = fleet.settings[i]
    kw = {"kernel_regularizer": keras.regularizers.L1L2(s["l1"], s["l2"])}
    if np.isfinite(s["max_norm"]):
        kw["kernel_constraint"] = keras.constraints.MaxNorm(s["max_norm"], axis=0)
    act = "selu" if s["alpha"] else "relu"
    m = keras.Sequential(
        [keras.Input((9,)), L.Dense(7, act, **kw), L.Dense(7, act, **kw), L.Dense(3, **kw)]
    )
    for layer, w in zip(m.layers, fleet.kernels(), strict=True):
        layer.kernel.assign(w[i])
    m.compile(
        keras.optimizers.SGD(s["rate"], momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return m


@pytest.mark.parametrize(
    "setting", [{}, {"l1": 0.01}, {"l2": 0.02}, {"max_norm": 0.8}, {"alpha": True}]
)
def test_fleet_trains_as_keras_does(setting):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(64, 9)).astype("float32"), rng.integers(3, size=64)
    fleet = reg.RegularizedFleet([{"seed": 4}, {"seed": 3} | setting], 7, inputs=9, classes=3)
    twin = keras_twin(fleet, 1)
    fleet.train(x, y, epochs=4)
    training.fit(twin, x, y, epochs=4, seed=3)
    for layer, w in zip(twin.layers, fleet.kernels(), strict=True):
        np.testing.assert_allclose(layer.kernel.numpy(), w[1], rtol=2e-3, atol=2e-5)


def test_all_arms_share_start_order_and_budget():
    arms = [
        {},
        {"l1": 0.01},
        {"l2": 0.01},
        {"dropout": 0.5},
        {"max_norm": 1.0},
        {"shift": 1.0},
        {"alpha": True},
    ]
    fleet = reg.RegularizedFleet(
        [{"seed": s} | a for a in arms for s in (1, 2)], 7, inputs=9, classes=3
    )
    for i in range(0, 14, 2):
        for e in (0, 1):
            np.testing.assert_array_equal(fleet.batches(64, i, e), fleet.batches(64, 0, e))
        for w in fleet.kernels()[:2]:
            np.testing.assert_allclose(w[i] * (2**0.5 if i == 12 else 1), w[0], rtol=1e-5)
    assert (fleet.batches(64, 0, 0) != fleet.batches(64, 1, 0)).any()
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(64, 9)).astype("float32"), rng.integers(3, size=64)
    losses = fleet.train(x, y, epochs=2)
    assert losses.shape == (2, 14)
    same = reg.RegularizedFleet([{"seed": 1}] * 2, 7, inputs=9, classes=3)
    same.train(x, y, epochs=2)  # a plain network does not notice its neighbours
    for a, b in zip(fleet.kernels(), same.kernels(), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-6)


def test_noise_of_the_fleet_has_the_mean_of_inference():
    fleet = reg.RegularizedFleet([{"seed": 1, "dropout": (0.0, 0.0, 0.5)}], 30, inputs=9, classes=3)
    x = np.random.default_rng(5).normal(size=(1, 9)).astype("float32")
    noisy = fleet.outputs(np.repeat(x, 20_000, 0), seed=3)[0]
    z = (noisy.mean(0) - fleet.outputs(x)[0, 0]) / (noisy.std(0) / 20_000**0.5)
    assert np.abs(z).max() < 4.5


SMALL = {"inputs": 9, "classes": 3}


def blobs(n=64):
    rng = np.random.default_rng(5)
    return rng.normal(size=(n, 9)).astype("float32"), rng.integers(3, size=n)


@pytest.mark.parametrize(
    "setting",
    [
        {"dropout": (0.2, 0.5, 0.3)},
        {"dropout": 0.3, "rescale": False},
        {"alpha": True, "dropout": 0.2},
        {"shift": 0.7},
        {"l1": 0.01, "max_norm": 0.9},
    ],
)
def test_a_network_does_not_notice_its_neighbours(setting):
    x, y = blobs()
    others = [{"seed": 9, "dropout": 0.9}, {"seed": 1, "shift": 1.0}, {"seed": 2}]
    alone = reg.RegularizedFleet([{"seed": 1} | setting], 7, **SMALL)
    among = reg.RegularizedFleet([*others, {"seed": 1} | setting], 7, **SMALL)
    for fleet in (alone, among):
        fleet.train(x, y, epochs=3)
    for a, b in zip(alone.kernels(), among.kernels(), strict=True):
        np.testing.assert_allclose(a[0], b[3], rtol=1e-4, atol=1e-5)
    start = reg.RegularizedFleet([{"seed": 1}], 7, **SMALL)
    start.train(x, y, epochs=3)
    assert np.abs(start.kernels()[0] - alone.kernels()[0]).max() > 0.01


def test_networks_of_a_seed_drop_the_same_units():
    fleet = reg.RegularizedFleet(
        [{"seed": s, "dropout": (0, 0, p)} for s, p in ((1, 0.5), (1, 0.5), (1, 0.2), (2, 0.5))],
        7,
        **SMALL,
    )
    out = fleet.outputs(blobs()[0], seed=0)
    np.testing.assert_allclose(out[0], out[1], rtol=1e-5)
    assert np.abs(out[0] - out[2]).max() > 0.1
    assert np.abs(out[0] - fleet.outputs(blobs()[0], seed=1)[0]).max() > 0.1


def test_inputs_get_ordinary_dropout_also_with_alpha():
    settings = [{"seed": 1, "dropout": (0.75, 0, 0), "alpha": alpha} for alpha in (True, False)]
    fleet = reg.RegularizedFleet(settings, 7, **SMALL)
    x = np.zeros((40, 9), "float32")
    x[:, 2] = 1.0
    noisy, kept, lost = fleet.outputs(x, seed=3), fleet.outputs(4 * x), fleet.outputs(0 * x)
    was_kept = np.isclose(noisy, kept, atol=1e-5).all(axis=2)
    assert (was_kept | np.isclose(noisy, lost, atol=1e-5).all(axis=2)).all()
    assert (was_kept.sum(axis=1) > 2).all()
    assert (was_kept.sum(axis=1) < 20).all()


def test_shifts_move_the_image_by_a_pixel():
    image = np.arange(9.0)[None]
    views = reg._shifted(image).reshape(9, 3, 3)
    padded = np.pad(image.reshape(3, 3), 1, mode="edge")
    expected = [padded[i : i + 3, j : j + 3] for i in range(3) for j in range(3)]
    np.testing.assert_array_equal(views[0], image.reshape(3, 3))
    assert {v.tobytes() for v in views} == {v.tobytes() for v in expected}
    # Only pixel (1, 1) of 5 x 5 is ever lit: weights of others move if the image does.
    x, y = np.zeros((64, 25), "float32"), np.arange(64) % 3
    x[:, 6] = 1.0
    settings = [{"seed": 1}, {"seed": 1, "shift": 1.0}]
    fleet = reg.RegularizedFleet(settings, 7, inputs=25, classes=3)
    before = fleet.kernels()[0]
    fleet.train(x, y, epochs=8)
    moved = np.abs(fleet.kernels()[0] - before).max(axis=2).reshape(2, 5, 5) > 0
    assert np.argwhere(moved[0]).tolist() == [[1, 1]]
    assert moved[1, :3, :3].all()
    assert moved[1].sum() == 9


def test_a_share_of_the_images_is_shifted(monkeypatch):
    seen = []

    def run(weights, velocity, numbers_, views, y, rows, places, noise, done):
        seen.extend(places.numpy() - rows.numpy())
        return rows[0, :, 0], weights, velocity

    monkeypatch.setattr(reg, "_compiled_epoch", lambda: run)
    x, y = blobs(640)
    settings = [{"seed": 1, "shift": s} for s in (0.0, 0.5, 1.0)]
    reg.RegularizedFleet(settings, 7, **SMALL).train(x, y, epochs=4)
    moved = np.concatenate(seen, axis=1)
    assert (moved % 640 == 0).all()
    share = (moved > 0).mean(axis=1)
    np.testing.assert_allclose(share, [0, 0.5 * 8 / 9, 8 / 9], atol=0.04)
    assert set(moved[2] // 640) == set(range(9))


def test_a_stopped_network_is_the_shorter_training():
    x, y = blobs()  # two steps per epoch
    stopped = reg.RegularizedFleet([{"seed": 1, "stop": 4}, {"seed": 1}], 7, **SMALL)
    short = reg.RegularizedFleet([{"seed": 1}], 7, **SMALL)
    stopped.train(x, y, epochs=1)
    stopped.train(x, y, epochs=3)
    short.train(x, y, epochs=2)
    for a, b in zip(stopped.kernels(), short.kernels(), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-6)
        assert np.abs(a[1] - b[0]).max() > 1e-3


def test_rows_are_what_a_seed_sees():
    x, y = blobs()
    rows = {1: np.arange(32), 2: np.arange(16, 48)}
    fleet = reg.RegularizedFleet([{"seed": 1, "shift": 1.0}, {"seed": 2}], 7, **SMALL)
    fleet.train(x, y, epochs=3, rows=rows)
    table = fleet.evaluate(x, y, rows)
    for i, (seed, own) in enumerate(rows.items()):
        twin = reg.RegularizedFleet([fleet.settings[i]], 7, **SMALL)
        twin.train(x[own], y[own], epochs=3)
        np.testing.assert_allclose(twin.kernels()[0][0], fleet.kernels()[0][i], atol=1e-5)
        expected = twin.evaluate(x[own], y[own])
        assert np.isclose(table.loss[i], expected.loss[0], rtol=1e-4), seed
        assert np.isclose(table.accuracy[i], expected.accuracy[0])
    with pytest.raises(ValueError, match="rows must"):
        fleet.train(x, y, epochs=1, rows={1: np.arange(32)})


def test_evaluation_equals_keras():
    x, y = blobs(600)
    fleet = reg.RegularizedFleet([{"seed": 1}, {"seed": 2, "dropout": 0.5}], 7, **SMALL)
    for i, row in fleet.evaluate(x, y).iterrows():
        twin = keras_twin(fleet, i)
        logits = twin(x)
        assert np.isclose(row.loss, float(twin.loss(y, logits)), rtol=1e-4)
        assert np.isclose(row.accuracy, (logits.numpy().argmax(1) == y).mean())
        norm = sum(np.square(layer.kernel.numpy()).sum() for layer in twin.layers) ** 0.5
        assert np.isclose(row.norm, norm, rtol=1e-5)


ARMS = {
    "none": [{}],
    "l1": [{"l1": 1.0}, {"l1": 1e-3}],
    "l2": [{"l2": 1e-3}, {"l2": 5.0}],
    "dropout": [{"dropout": 0.1}, {"dropout": 0.95}],
    "alpha dropout": [{"alpha": True, "dropout": p} for p in (0.9, 0.1)],
    "max-norm": [{"max_norm": 1.0}, {"max_norm": 0.001}],
    "augmentation": [{"shift": 0.5}, {"shift": 1.0}],
    "early stopping": [{"stop": 1}, {"stop": 8}],
}


@pytest.fixture(scope="module")
def images():
    return datasets.load_fashion_mnist().take(300, 100).standardized().halved().flattened()


def test_the_comparison_gives_all_arms_the_same_data_order_and_budget(monkeypatch, images):
    calls, real = [], reg._compiled_epoch()

    def run(weights, velocity, numbers_, views, y, rows, *rest):
        calls.extend(rows.numpy())
        return real(weights, velocity, numbers_, views, y, rows, *rest)

    monkeypatch.setattr(reg, "_compiled_epoch", lambda: run)
    reg.compare(ARMS, images, n=64, seeds=[1, 2], tuning_seeds=[3, 4, 5], epochs=2, width=8)
    trials = sum(map(len, ARMS.values()))
    tuning, final = (
        np.stack([c for c in calls if len(c) == size], 1) for size in (3 * trials, 2 * len(ARMS))
    )
    assert len(calls) == tuning.shape[1] + final.shape[1] == 8
    for rows, arms, seeds in ((tuning, trials, 3), (final, len(ARMS), 2)):
        rows = rows.reshape(arms, seeds, -1)  # every arm: the same images, order and steps
        assert (rows == rows[0]).all()
        assert rows.shape[2] == 2 * 64
        assert all(len(set(rows[0, s].tolist())) == 64 for s in range(seeds))
        assert len({r.tobytes() for r in rows[0]}) == seeds  # and every seed others


def test_the_comparison_tunes_on_validation_and_reports_on_test_images(images):
    options = {"n": 64, "seeds": [1, 2], "tuning_seeds": [3, 4], "epochs": 6, "width": 8}
    tried, results = reg.compare(ARMS, images, **options)
    best = tried.loc[tried.groupby("arm").loss.idxmin()].set_index("arm").trial
    assert best[["l1", "l2", "dropout", "max-norm"]].tolist() == [1, 0, 0, 0]
    assert set(results.query("arm == 'l1'").l1) == {1e-3}
    rows = {s: np.random.default_rng([s, 64]).choice(300, 64, replace=False) for s in (1, 2, 3, 4)}

    def losses(setting, seeds, x, y):
        found = []
        for seed in seeds:
            fleet = reg.RegularizedFleet([{"seed": seed} | setting], 8)
            own = images.x_train[rows[seed]], images.y_train[rows[seed]]
            fleet.train(*own, epochs=6)
            loss = fleet.evaluate(x, y).loss[0]
            found.append([loss, loss - fleet.evaluate(*own).loss[0]])
        return np.array(found)

    expected = losses({"l1": 1e-3}, (1, 2), images.x_test, images.y_test)
    ours = results.query("arm == 'l1'")[["loss", "gap"]]
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
    expected = losses({"dropout": 0.1}, (3, 4), images.x_valid, images.y_valid).mean(axis=0)
    ours = tried.query("arm == 'dropout' and trial == 0")[["loss", "gap"]]
    np.testing.assert_allclose(ours.to_numpy()[0], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="equally many trials"):
        reg.compare({"a": [{}, {}], "b": [{}, {}, {}]}, images, **options)
    with pytest.raises(ValueError, match="tuning_seeds"):
        reg.compare(ARMS, images, **options | {"tuning_seeds": [2]})
