"""Comparisons are fair, repeatable, interruptible, and the same wherever they run."""

from functools import partial
import json
import pickle
import time
from types import SimpleNamespace

from ch11lib import experiments, training
from ch11lib.backend import keras
from ch11lib.experiments import DenseNet, compare, compare_fleets
from ch11lib.fleets import Fleet
import joblib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

rng = np.random.default_rng(0)
X = rng.normal(size=(96, 4)).astype("float32")
Y = (X[:, 0] + 0.3 * X[:, 1] > 0).astype("int32")
DATA = ((X[:64], Y[:64]), (X[64:], Y[64:]))
SMALL = DenseNet(hidden=(8,), inputs=4, classes=2, learning_rate=0.1)
WIDE = DenseNet(hidden=(16,), inputs=4, classes=2, learning_rate=0.1)


class Watched(keras.callbacks.Callback):
    """Note down the initial weights and every step's loss, one list for each run."""

    runs: list = []  # noqa: RUF012

    def on_train_begin(self, logs=None):
        self.seen = {"first": self.model.get_weights()[0].copy(), "steps": 0}
        self.runs.append(self.seen)

    def on_epoch_end(self, epoch, logs=None):
        self.seen["steps"] = int(self.model.optimizer.iterations)


# --- equal conditions -----------------------------------------------------------------------------


def test_the_runs_of_a_seed_share_batches_and_steps_in_all_arms(monkeypatch):
    orders = []
    real = training.batch_order

    def noted(n, seed, epoch):
        orders.append((seed, epoch, tuple(real(n, seed, epoch))))
        return real(n, seed, epoch)

    monkeypatch.setattr(training, "batch_order", noted)
    Watched.runs = []
    results = compare(
        {"a": SMALL, "b": WIDE},
        DATA,
        seeds=[3, 4],
        epochs=2,
        callbacks=lambda: [Watched()],
        n_jobs=1,
    )
    assert len(orders) == 8
    for seed in (3, 4):
        for epoch in (0, 1):
            same = {order for s, e, order in orders if (s, e) == (seed, epoch)}
            assert len(same) == 1
    assert {run["steps"] for run in Watched.runs} == {4}
    assert len(results.runs) == 4


def test_a_run_equals_training_the_model_by_hand():
    results = compare({"a": SMALL}, DATA, seeds=[5], epochs=3)
    model = SMALL(5)
    (x, y), validation = DATA
    history = training.fit(model, x, y, epochs=3, seed=5, validation_data=validation).history
    row = results.runs.iloc[0]
    for name, values in history.items():
        assert row[name] == pytest.approx(values[-1], rel=1e-6)
    assert results.histories.loss.tolist() == pytest.approx(history["loss"], rel=1e-6)
    assert results.histories.epoch.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("freq", "due"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_validation_after_some_epochs_only(freq, due):
    every, some = (
        compare({"a": SMALL}, DATA, seeds=[5, 6], epochs=5, validation_freq=f) for f in (1, freq)
    )
    expected = every.histories.copy()
    expected.loc[~expected.epoch.isin(due), ["val_loss", "val_accuracy"]] = np.nan
    pd.testing.assert_frame_equal(some.histories, expected)
    columns = ["seed", "loss", "val_loss", "val_accuracy"]
    pd.testing.assert_frame_equal(some.runs[columns], every.runs[columns])


def some_rows(seed):
    rows = np.random.default_rng(seed).permutation(96)
    return (X[rows[:20]], Y[rows[:20]]), (X[rows[20:]], Y[rows[20:]])


def test_data_can_depend_on_the_seed_and_are_then_the_same_for_all_arms():
    made = []

    def data(seed):
        made.append(seed)
        return some_rows(seed)

    tune = {"learning_rate": [0.1, 0.2]}
    results = compare(
        {"a": SMALL, "b": SMALL}, data, seeds=[1, 2], epochs=2, tune=tune, tuning_seeds=[9]
    )
    assert sorted(made) == [1, 2, 9]
    assert results.values("a", "loss").tolist() == results.values("b", "loss").tolist()
    rate = results.best["a"]["learning_rate"]
    for seed, loss in zip((1, 2), results.values("a", "loss"), strict=True):
        arm = {"a": lambda seed: SMALL(seed, learning_rate=rate)}
        alone = compare(arm, some_rows(seed), seeds=[seed], epochs=2)
        assert alone.values("a", "loss")[0] == pytest.approx(loss, rel=1e-6)


def test_runs_on_other_data_of_the_same_seed_are_not_taken_from_the_file(tmp_path):
    for data, kept in ((some_rows, 1), (some_rows(1), 1), (some_rows(2), 2)):
        compare({"a": SMALL}, data, seeds=[1], epochs=1, resume=tmp_path / "runs")
        assert (tmp_path / "runs").read_text().count('"key"') == kept


def test_random_state_of_the_caller_is_untouched():
    import random

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    SMALL(7)
    compare({"a": SMALL}, DATA, seeds=[0], epochs=1)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_seeds_decide_weights():
    one, again, other = SMALL(1), SMALL(1), SMALL(2)
    for a, b in zip(one.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.get_weights()[0], other.get_weights()[0])


def test_all_seeds_and_rates_of_an_arm_share_one_graph():
    training.clear_programs()
    compare({"a": SMALL}, DATA, seeds=[0, 1, 2], epochs=1, tune={"learning_rate": [0.01, 0.1, 0.3]})
    assert len(training._shared_programs) == 2  # one to train, one to evaluate


# --- tuning ---------------------------------------------------------------------------------------


def test_tuning_finds_the_only_rate_that_learns_and_reports_other_seeds():
    results = compare(
        {"a": SMALL, "b": WIDE},
        DATA,
        seeds=[0, 1],
        epochs=8,
        tune={"learning_rate": [1e-9, 0.3]},
        metric="loss",
    )
    assert results.best == {"a": {"learning_rate": 0.3}, "b": {"learning_rate": 0.3}}
    assert sorted(results.tuning.seed.unique()) == [500, 501]
    assert len(results.tuning) == 8
    assert sorted(results.runs.seed.unique()) == [0, 1]
    assert (results.runs.learning_rate == 0.3).all()


def test_every_arm_can_have_its_own_range_of_equal_length():
    ranges = {"a": {"learning_rate": [0.1, 0.2]}, "b": {"learning_rate": [0.01, 0.02]}}
    results = compare({"a": SMALL, "b": WIDE}, DATA, seeds=[0], epochs=1, tune=ranges)
    assert set(results.tuning[results.tuning.arm == "b"].learning_rate) == {0.01, 0.02}
    ranges["b"]["learning_rate"].append(0.04)
    with pytest.raises(ValueError, match="same number of trials"):
        compare({"a": SMALL, "b": WIDE}, DATA, seeds=[0], epochs=1, tune=ranges)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "arms"),
        ({"arms": {"a": 3}}, "arms\\['a'\\]"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"data": 3}, "data"),
        ({"tune": {"learning_rate": []}}, "number of trials"),
        ({"tune": {"learning_rate": [0.1]}, "tuning_seeds": [0]}, "tuning_seeds"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"arms": {"a": SMALL}, "data": DATA, "seeds": [0], "epochs": 1} | change
    with pytest.raises((ValueError, TypeError), match=message):
        compare(arguments.pop("arms"), arguments.pop("data"), **arguments)


# --- results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return compare({"a": SMALL, "b": WIDE}, DATA, seeds=range(6), epochs=3)


def test_summary_is_median_and_bootstrap_interval(results):
    values = results.runs[results.runs.arm == "a"].sort_values("seed").val_loss.to_numpy()
    row = results.summary("val_loss").loc["a"]
    assert row["median"] == np.median(values)
    expected = stats.bootstrap((values,), np.median, method="percentile", rng=0)
    assert row.low == pytest.approx(expected.confidence_interval.low)
    assert row.high == pytest.approx(expected.confidence_interval.high)
    assert row.seeds == 6
    assert row.diverged == 0


def test_difference_is_paired_and_has_students_interval(results):
    difference = results.difference("a", "b", "val_loss")
    a, b = results.values("a", "val_loss"), results.values("b", "val_loss")
    np.testing.assert_array_equal(difference.values, a - b)
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert difference.low == pytest.approx(expected.low)
    assert difference.high == pytest.approx(expected.high)
    assert str(difference).startswith("~")


def test_epochs_to_a_target(results):
    histories = results.histories
    target = float(histories.loss.median())
    table = results.epochs_to("loss", target).set_index(["arm", "seed"]).epoch
    for (arm, seed), epoch in table.items():
        losses = histories[(histories.arm == arm) & (histories.seed == seed)].loss.to_numpy()
        reached = np.flatnonzero(losses <= target)
        assert epoch == (reached[0] + 1 if len(reached) else np.inf)
    assert np.isinf(results.epochs_to("loss", -1.0).epoch).all()


def test_report_shows_measured_numbers_with_a_tilde(results):
    text = results.report("val_loss")
    assert text.splitlines()[0].strip() == "val_loss: median (95 % interval), 6 seeds"
    assert text.count("~") == 6


def test_unknown_names_are_refused(results):
    with pytest.raises(ValueError, match="arm must be one of"):
        results.values("c")
    with pytest.raises(ValueError, match="metric must be one of"):
        results.values("a", "auc")


def test_a_run_that_diverges_is_a_result():
    broken = DenseNet(hidden=(8,), activation="linear", inputs=4, classes=2, learning_rate=1e30)
    results = compare({"fine": SMALL, "broken": broken}, DATA, seeds=[0, 1], epochs=3)
    row = results.runs[results.runs.arm == "broken"].iloc[0]
    assert row.diverged_at.startswith("epoch 1, step ")
    assert pd.isna(row.val_accuracy)
    assert results.values("broken").tolist() == [0, 0]
    assert np.isinf(results.values("broken", "loss")).all()
    assert results.summary().loc["broken", "diverged"] == 2
    assert "~2 diverged" in results.report()
    assert results.difference("fine", "broken").mean > 0.3


def test_measure_adds_columns():
    results = compare(
        {"a": SMALL},
        DATA,
        seeds=[0, 1],
        epochs=1,
        measure=lambda model: {"norm": float(np.linalg.norm(model.get_weights()[0]))},
    )
    assert (results.runs.norm > 0).all()


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [1.0, np.inf]])
def test_interval_of_degenerate_values_is_their_range(values):
    assert experiments.interval(values) == (min(values), max(values))


def test_interval_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="values must be"):
        experiments.interval([])


# --- where it runs --------------------------------------------------------------------------------


def deterministic(results):
    return results.runs.drop(columns="seconds")


def test_threads_give_the_results_of_one_at_a_time():
    arguments = {"seeds": range(4), "epochs": 2}
    alone = compare({"a": SMALL, "b": WIDE}, DATA, **arguments, n_jobs=1)
    threads = compare({"a": SMALL, "b": WIDE}, DATA, **arguments, n_jobs=3)
    pd.testing.assert_frame_equal(deterministic(alone), deterministic(threads))


# TensorFlow's import looks like a memory leak to loky, which then replaces the worker, and warns in
# a thread of its own: as an error that would end the thread, and the test would wait for ever.
@pytest.mark.filterwarnings("default:A worker stopped while some jobs:UserWarning")
def test_processes_and_dask_give_the_same_results():
    from dask.distributed import Client, LocalCluster

    expected = deterministic(compare({"a": SMALL}, DATA, seeds=[0, 1, 2], epochs=2))
    with joblib.parallel_config("loky", n_jobs=2):
        loky = deterministic(compare({"a": SMALL}, DATA, seeds=[0, 1, 2], epochs=2))
    pd.testing.assert_frame_equal(expected, loky)
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with (
        LocalCluster(processes=True, **options) as cluster,
        Client(cluster),
        joblib.parallel_config("dask"),
    ):
        dask = deterministic(compare({"a": SMALL}, DATA, seeds=[0, 1, 2], epochs=2))
    pd.testing.assert_frame_equal(expected, dask)


# --- interruptions --------------------------------------------------------------------------------


class Counted:
    """A recipe that counts its calls, and is interrupted at one of them."""

    def __init__(self, interrupt_at=None):
        self.calls, self.interrupt_at = 0, interrupt_at

    def __call__(self, seed, **changes):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return SMALL(seed, **changes)


def test_an_interrupted_comparison_hands_over_what_is_done():
    with pytest.raises(experiments.Interrupted, match="after 2 runs") as caught:
        compare({"a": Counted(interrupt_at=3)}, DATA, seeds=range(5), epochs=1, n_jobs=1)
    assert caught.value.results.runs.seed.tolist() == [0, 1]


def test_resuming_repeats_only_what_is_missing(tmp_path, monkeypatch):
    file = tmp_path / "runs.jsonl"
    fits = []
    real = training.fit

    def counted(*arguments, **options):
        fits.append(options["seed"])
        if len(fits) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(training, "fit", counted)
    call = {"seeds": range(4), "epochs": 2, "resume": file, "n_jobs": 1}
    with pytest.raises(experiments.Interrupted):
        compare({"a": SMALL}, DATA, **call)
    with file.open("a") as opened:
        opened.write('\n{"key": "cut off')
    results = compare({"a": SMALL}, DATA, **call)
    assert fits == [0, 1, 2, 2, 3]
    monkeypatch.undo()
    fresh = compare({"a": SMALL}, DATA, seeds=range(4), epochs=2)
    pd.testing.assert_frame_equal(deterministic(results), deterministic(fresh))
    assert sum(bool(line) for line in file.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 3},
        {"batch_size": 16},
        {"data": ((X[:63], Y[:63]), (X[64:], Y[64:]))},
        {"arms": {"a": DenseNet(hidden=(9,), inputs=4, classes=2, learning_rate=0.1)}},
        {"arms": {"a": DenseNet(hidden=(8,), inputs=4, classes=2, learning_rate=0.2)}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_changed_comparison_is_not_taken_from_the_file(tmp_path, changed):
    call = {"arms": {"a": SMALL}, "data": DATA, "seeds": [0], "epochs": 2}
    call["resume"] = tmp_path / "runs.jsonl"
    compare(**call)
    compare(**(call | changed))
    lines = call["resume"].read_text().splitlines()
    keys = {json.loads(line)["key"] for line in lines if line}
    assert len(keys) == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="resume="):
        compare({"a": SMALL}, DATA, seeds=[0], epochs=1, resume=tmp_path)
    with pytest.raises(OSError, match="resume="):
        compare({"a": SMALL}, DATA, seeds=[0], epochs=1, resume=tmp_path / "missing" / "file")


# --- seeds and recipes ----------------------------------------------------------------------------


def test_seeds_follow_the_block_of_a_remeasurement(monkeypatch):
    monkeypatch.delenv("CH11_SEED", raising=False)
    assert experiments.seeds(3) == [0, 1, 2]
    monkeypatch.setenv("CH11_SEED", "7")
    assert experiments.seeds(2) == [7000, 7001]
    with pytest.raises(ValueError, match="n must be"):
        experiments.seeds(0)


def test_recipe_with_batch_norm_and_layer_activations():
    model = DenseNet((5, 6), batch_norm=True, inputs=3)(0)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Dense", "BatchNormalization", "Activation"] * 2 + ["Dense"]
    assert not model.layers[0].use_bias
    model = DenseNet((5,), activation=keras.layers.PReLU, inputs=3)(0)
    assert [type(layer).__name__ for layer in model.layers] == ["Dense", "PReLU", "Dense"]


def test_a_recipe_survives_pickling():
    copy = pickle.loads(pickle.dumps(SMALL))
    np.testing.assert_array_equal(copy(3).get_weights()[0], SMALL(3).get_weights()[0])


def test_data_can_be_a_dataset():
    parts = dict(
        zip(("x_train", "y_train", "x_valid", "y_valid"), (*DATA[0], *DATA[1]), strict=True)
    )
    expected = deterministic(compare({"a": SMALL}, DATA, seeds=[0], epochs=1))
    found = deterministic(compare({"a": SMALL}, SimpleNamespace(**parts), seeds=[0], epochs=1))
    pd.testing.assert_frame_equal(expected, found)


def test_memory_is_released_between_runs():
    import gc
    import weakref

    alive = []

    def arm(seed):
        model = SMALL(seed)
        alive.append(weakref.ref(model))
        return model

    compare({"a": arm}, DATA, seeds=range(5), epochs=1, n_jobs=1)
    gc.collect()
    assert sum(reference() is not None for reference in alive) == 0


def test_no_model_is_built_while_another_is_measured():
    inside, overlaps = [], []

    def slowly(what, seed):
        overlaps.append([other for other, _ in inside if "measure" in (what, other)])
        inside.append((what, seed))
        time.sleep(0.02)
        inside.remove((what, seed))

    def build(seed):
        slowly("build", seed)
        return SMALL(seed)

    def measure(model):
        slowly("measure", id(model))
        return {"one": 1}

    compare({"a": build}, DATA, seeds=range(6), epochs=1, measure=measure, n_jobs=4)
    assert len(overlaps) == 12
    assert not any(overlaps)


# --- fleets ---------------------------------------------------------------------------------------

TINY = partial(Fleet, 2, 8, inputs=4, classes=2)
RATES = {"seeds": [1, 2, 3], "rates": [0.001, 0.1], "tuning_seeds": [8, 9]}


def test_fleets_get_equal_trials_and_keep_every_run():
    results = compare_fleets(
        {"relu": TINY, "tanh": partial(TINY, activation="tanh")},
        DATA,
        epochs=4,
        tuning_epochs=3,
        **RATES,
    )
    assert results.tuning.groupby(["arm", "learning_rate"]).size().tolist() == [2] * 4
    assert results.runs[["arm", "seed"]].values.tolist() == [
        [arm, seed] for arm in ("relu", "tanh") for seed in (1, 2, 3)
    ]
    for arm in results.arms:
        trials = results.tuning[results.tuning.arm == arm].groupby("learning_rate").loss.median()
        assert results.best[arm] == {"learning_rate": trials.idxmin()}
    fleet = TINY(seeds=[2], rates=[results.best["relu"]["learning_rate"]])
    (x, y), (x_valid, y_valid) = DATA
    losses = fleet.train(x, y, steps=8)
    valid = fleet.evaluate(x_valid, y_valid)
    run = results.runs.query("arm == 'relu' and seed == 2").iloc[0]
    assert run.loss == pytest.approx(losses[-2:].mean(), rel=1e-5)
    assert run.val_loss == pytest.approx(valid.loss[0], rel=1e-5)
    assert run.val_accuracy == pytest.approx(valid.accuracy[0])
    assert results.histories.query("arm == 'relu' and seed == 2").epoch.tolist() == [1, 2, 3, 4]


def test_a_fleet_that_diverges():
    arms = {"fine": TINY, "lost": TINY}
    rates = {"fine": [0.1], "lost": [1e9]}
    results = compare_fleets(arms, DATA, epochs=8, **RATES | {"rates": rates})
    assert results.summary().diverged.to_dict() == {"fine": 0, "lost": 3}
    assert np.isinf(results.values("lost")).all()
    assert results.runs.query("arm == 'lost'").diverged_at.str.startswith("epoch ").all()


def test_an_interrupted_comparison_of_fleets_keeps_the_finished_arms():
    def interrupted(**options):
        raise KeyboardInterrupt

    with pytest.raises(experiments.Interrupted) as caught:
        compare_fleets({"a": TINY, "b": interrupted}, DATA, epochs=1, **RATES)
    assert caught.value.results.arms == ["a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_seeds": [3]}, "tuning_seeds must not share"),
        ({"rates": {"a": [0.1], "b": [0.1, 0.2]}}, "same number of trials"),
        ({"rates": {"a": [0.1]}}, "must name the arms"),
        ({"seeds": []}, "seeds must be distinct and at least one"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"tuning_epochs": 0}, "tuning_epochs must be at least 1"),
    ],
)
def test_bad_arguments_of_a_comparison_of_fleets(changes, message):
    with pytest.raises(ValueError, match=message):
        compare_fleets({"a": TINY, "b": TINY}, DATA, **{"epochs": 1, **RATES, **changes})
