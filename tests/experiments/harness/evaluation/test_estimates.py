"""Estimates of one bound by different roads agree within the errors that they report."""

import json
import shutil

import numpy as np
import pytest

from experiments import variance
from experiments.evaluate import evaluate, result_line, stem_of
from experiments.harness.errors import ConfigError
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import init_params
from experiments.harness.training.optimizer import make_optimizer
from experiments.harness.training.state import init_state
from experiments.train import train
from tests.experiments import tiny

SHORT = {"train__num_steps": 2, "train__checkpoint_every": 2}

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compiles):
    """A work directory of small random weights, whose bound at T = 8 is not near a tight one."""
    return tiny.untrained(tmp_path_factory.mktemp("trained"), tiny.config(), scale=0.1)


@pytest.fixture(scope="module")
def full(trained):
    """The full sum over t."""
    return evaluate(tiny.config(), trained)


def agree(a, b, slack=0.0):
    error = np.hypot(a["bits_per_dim_mc_se"], b["bits_per_dim_mc_se"])
    assert abs(a["bits_per_dim"] - b["bits_per_dim"]) < 4 * error + slack


def test_a_target_is_met_with_the_full_sums_mean(trained, full):
    """Its own size differs, since examples, T and weights are the same and the noise is not."""
    target = 4 * full["bits_per_dim_mc_se"]
    found = evaluate(tiny.config(evaluate__target=target), trained)
    assert 0 < found["bits_per_dim_mc_se"] < 1.2 * target
    agree(found, full)
    parts = sum(found[part] for part in ("prior", "diffusion", "reconstruction"))
    assert parts == pytest.approx(found["bits_per_dim"], rel=1e-9)
    assert found["num_examples"] == 447
    # The curve, constant on bins of t, has the diffusion term for its sum.
    with np.load(trained / "evaluation.npz") as arrays:
        assert arrays["kl"].shape == (7,)
        assert arrays["kl"].sum() == pytest.approx(found["diffusion"], rel=0.1)
        mean = arrays["bits_per_dim_per_example"].mean()
        assert mean == pytest.approx(found["bits_per_dim"], rel=1e-9)


def test_a_budget_is_kept(trained):
    config = tiny.config(evaluate__target=1e-6, evaluate__max_evaluations=447 * 30)
    found = evaluate(config, trained)
    assert 447 * 15 < found["network_evaluations"] <= 447 * 30


def test_further_estimates_agree_with_the_bound(trained, full):
    """(13.10) at the same T has the mean of (13.26); K samples lower it; all is told and kept."""
    config = tiny.config(
        evaluate__also=("continuous", "k_sample", "ode"),
        evaluate__target=0.05,
        evaluate__k_sample={"num_samples": 3, "num_timesteps": 8},
        evaluate__ode__num_steps=4,
        evaluate__ode__method="heun",
    )
    found = evaluate(config, trained)
    of_k = found["k_sample"]
    one = {
        "bits_per_dim": of_k["one_sample_bits_per_dim"],
        "bits_per_dim_mc_se": of_k["one_sample_bits_per_dim_mc_se"],
    }
    agree(one, full)
    assert of_k["bits_per_dim"] < one["bits_per_dim"]
    assert of_k["network_evaluations"] == 447 * 2 * 3 * 8
    assert found["ode"]["failed_solves"] == 0
    assert np.isfinite(found["ode"]["bits_per_dim"])
    kept = json.loads(stem_of(trained, found).with_suffix(".json").read_text())
    lines = result_line(kept).splitlines()
    assert len(lines) == 4
    for name, line in zip(("continuous", "k_sample", "ode"), lines[1:], strict=True):
        assert line.startswith(f"  {name} bits/dim {found[name]['bits_per_dim']:.4f}")


def test_the_limit_is_the_bound_at_many_timesteps(trained):
    """At T = 400 the discrete bound exceeds its limit by about 1/400 of the loss's own size."""
    many = tiny.config(
        schedule__num_timesteps=400, evaluate__target=0.02, evaluate__also=("continuous",)
    )
    found = evaluate(many, trained)
    agree(found["continuous"], found, slack=0.02 * found["bits_per_dim"])
    parts = ("prior", "diffusion", "reconstruction")
    total = sum(found["continuous"][part] for part in parts)
    assert total == pytest.approx(found["continuous"]["bits_per_dim"], rel=1e-9)


def test_what_no_error_is_known_of_is_told_as_unknown(trained):
    """One probe has no standard error: NaN in the result, null in the file, a word in the line."""
    config = tiny.config(
        evaluate__also=("ode",),
        evaluate__target=0.1,
        evaluate__ode__num_steps=2,
        evaluate__ode__probes=1,
        evaluate__ode__method="heun",
    )
    stem = stem_of(trained, evaluate(config, trained))
    kept = json.loads(stem.with_suffix(".json").read_text())
    assert kept["ode"]["trace_se"] is None
    assert "trace ± unknown" in result_line(kept)


def test_levels_that_a_schedule_does_not_have_are_refused(trained):
    config = tiny.config(
        schedule__name="betas", schedule__betas={"betas": (0.5,)}, schedule__num_timesteps=1
    )
    for name, message in (("continuous", "schedule.num_timesteps = 1"), ("k_sample", "k_sample")):
        config.evaluate.also = (name,)
        with pytest.raises(ConfigError, match=message):
            evaluate(config, trained)


def test_a_network_is_measured_without_the_schedule_learned_beside_it(tmp_path):
    """The same weights on a straight line, where the schedule has not moved from it yet."""
    learned = tiny.config(
        schedule__name="learned",
        schedule__learned__max=8.0,
        schedule__learned__min=-5.0,
        train__time="continuous",
    )
    definition = define_model(learned)
    state = init_state(init_params(definition, 0), make_optimizer(learned))
    tiny.save(tmp_path, {1: (state, None)})
    both = [evaluate(config, tmp_path) for config in (learned, tiny.config())]
    assert both[0]["bits_per_dim"] == pytest.approx(both[1]["bits_per_dim"], rel=1e-4)


def test_a_new_run_forgets_what_was_measured_of_another(tmp_path):
    config = tiny.config(**SHORT)
    train(config, tmp_path)
    evaluate(tiny.config(evaluate__variance="analytic_isotropic", **SHORT), tmp_path)
    measured = [tmp_path / "evaluations", tmp_path / "eps_errors.npz"]
    assert all(path.exists() for path in measured)
    train(config, tmp_path)  # finished: nothing is touched
    assert all(path.exists() for path in measured)
    shutil.rmtree(tmp_path / "checkpoints")
    train(tiny.config(train__learning_rate=0.01, **SHORT), tmp_path)
    assert not any(path.exists() for path in measured)


@pytest.fixture(scope="module")
def tables(trained):
    config = tiny.config(
        variance__examples=48,
        variance__draws=40,
        variance__num_samples=3,
        variance__num_timesteps=100,
        evaluate__batch_size=48,
    )
    # The goal sets what the allocated rows spend.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variance, "GOAL", 0.02)
        return variance.variance(config, trained)


def test_every_estimator_of_a_bound_has_the_same_mean(tables):
    """On a Gaussian in closed form and on a network; the whole trajectory among them."""
    for name, rows in tables.items():
        for target in ("T", "∞"):
            same = [row for row in rows if row.target == target]
            assert len(same) == {"T": 8, "∞": 5}[target] + (not name.startswith("Gaussian"))
            # The reference is the estimate with the least error.
            best = min(same, key=lambda row: row.se)
            for row in same:
                assert abs(row.mean - best.mean) < 4.5 * np.hypot(row.se, best.se), row


def test_variances_are_ordered_as_theory_has_them(tables):
    for name, rows in tables.items():
        of = {row.estimator: row for row in rows}
        uniform = of["one t, uniform"]
        if name.startswith("Gaussian"):
            # What (13.26) is for. At one t (13.10) has noise that grows with T: log-ratios of q.
            assert of["(13.10), one t, uniform"].variance > 2 * uniform.variance
        best = [row for row in rows if "allocated, Gaussian" in row.estimator]
        assert all(row.needed < uniform.needed for row in best)
        for row in rows:
            if row.evaluations:
                needed = row.variance * row.evaluations / 0.02**2
                assert row.needed == pytest.approx(needed, rel=1e-9)


def test_bounds_are_in_order_on_the_gaussian(tables):
    """−log p ≤ K samples ≤ one sample, and the limit below the bound at T = 100."""
    rows = next(rows for name, rows in tables.items() if name.startswith("Gaussian"))
    of = {row.estimator: row for row in rows}
    truth, few, one = of["closed form"], of["3 trajectories"], of["(13.10), whole trajectory"]
    assert truth.mean < few.mean + 3 * few.se
    assert few.mean < one.mean
    assert of["T → ∞: allocated, Gaussian control"].mean < of["allocated, Gaussian control"].mean


def test_the_comparison_is_written_down(tables, trained):
    for name in ("variance.json", "variance.md", "variance.png"):
        assert (trained / name).stat().st_size > 0
    kept = json.loads((trained / "variance.json").read_text())
    assert list(kept) == list(tables)
    text = (trained / "variance.md").read_text()
    assert text.count("| (13.26), full sum | T |") == 2
