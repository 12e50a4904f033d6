"""The exact bound of a trained model: against closed forms, and against itself done otherwise."""

import json
import re

import jax
import numpy as np
import pytest
from scipy import stats

from experiments.evaluate import evaluate, result_line, stem_of
from experiments.harness.data import splits
from experiments.harness.data.sources.source import Source
from experiments.harness.errors import ConfigError
from experiments.harness.workdir import record
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

NUM_DIMS = 64


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_a_model_that_always_guesses_zero_has_the_bound_on_paper(tmp_path, variance):
    """x̂_0 = 0, so that nothing is left of the noise: every term in float64, over all 447 digits.

    KL_t = ½ Σ [log Σ/β̃ + β̃/Σ − 1 + c² ᾱ_s x_0²/Σ] with Σ = β̃ or β; at β̃ it is
    ½ (SNR_{t−1} − SNR_t) ‖x_0‖². The decoder is N(0, β̃_2) over each pixel's bin.
    """
    config = tiny.config(
        model__parameterization="x_0",
        model__variance=variance,
        decoder__name="discretized_gaussian",
    )
    state = tiny.state_of(config)
    zero = jax.tree.map(np.zeros_like, state.ema_params)
    tiny.save(tmp_path, {1: (state._replace(ema_params=zero), None)})
    result = evaluate(config, tmp_path)

    images = splits.load("digits", "test").images.astype(np.float64).reshape(447, NUM_DIMS)
    x_0, half_bin = images / 8 - 1, 1 / 16
    log_snr = np.linspace(8, -5, 8)
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    sigma2 = 1 / (1 + np.exp(log_snr))
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    beta_tilde = beta * sigma2[:-1] / sigma2[1:]
    ratio = 1.0 if variance == "beta_tilde" else beta / beta_tilde
    of_x_0 = alpha_bar[:-1] * (beta / sigma2[1:]) ** 2 / (ratio * beta_tilde)
    squares = (x_0**2).sum(axis=1)
    kl = 0.5 * (NUM_DIMS * (np.log(ratio) + 1 / ratio - 1) + of_x_0 * squares[:, None])
    prior = 0.5 * (alpha_bar[-1] * (x_0**2 - 1) - np.log(sigma2[-1])).sum(axis=1)
    # Around 0 the bins of ± x_0 are alike, and of the last ones all but an edge is open.
    normal = stats.norm(0, np.sqrt(beta_tilde[0]))
    upper = normal.logcdf(half_bin - np.abs(x_0))
    lower = np.where(np.abs(x_0) == 1, -np.inf, normal.logcdf(-half_bin - np.abs(x_0)))
    reconstruction = -(upper + np.log1p(-np.exp(lower - upper))).sum(axis=1)
    total = prior + kl.sum(axis=1) + reconstruction

    bits = NUM_DIMS * np.log(2)
    expected = {
        "bits_per_dim": total.mean() / bits,
        "bits_per_dim_se": total.std(ddof=1) / np.sqrt(447) / bits,
        "prior": prior.mean() / bits,
        "diffusion": kl.sum(axis=1).mean() / bits,
        "reconstruction": reconstruction.mean() / bits,
    }
    # Terms are float32 sums of 64 numbers, at log-SNRs rounded to float32.
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name
    assert result["bits_per_dim_mc_se"] <= 1e-6 * result["bits_per_dim"]
    with np.load(tmp_path / "evaluation.npz") as arrays:
        np.testing.assert_allclose(arrays["kl"], kl.mean(axis=0) / bits, rtol=1e-5)
        kl_se = kl.std(axis=0, ddof=1) / np.sqrt(447) / bits
        np.testing.assert_allclose(arrays["kl_se"], kl_se, rtol=1e-4)
        np.testing.assert_allclose(arrays["log_snr"], log_snr, rtol=1e-12)
        np.testing.assert_allclose(arrays["bits_per_dim_per_example"], total / bits, rtol=1e-5)
        # The error of the guess 0 is the digits' own root mean square, in grey levels around 8.
        rmse = np.sqrt(((images - 8) ** 2).mean())
        np.testing.assert_allclose(arrays["x_0_rmse"], np.full(8, rmse), rtol=1e-5)


def test_the_main_job_wrote_what_the_design_asks_for(finished):
    result = strict_json((finished.workdir / "evaluation.json").read_text())
    numbers = ("bits_per_dim_se", "bits_per_dim_mc_se", "prior", "diffusion", "reconstruction")
    for name in ("bits_per_dim", *numbers):
        assert isinstance(result[name], float)
        assert result[name] > 0
    expected = {
        "num_examples": 447,
        "split": "test",
        "step": tiny.best_step(finished.workdir),
        "num_timesteps": 8,
        "seed": 0,
    }
    assert {name: result[name] for name in expected} == expected
    # The parts are what was summed, added up in another order, in float64 but for the sum over t.
    parts = result["prior"] + result["diffusion"] + result["reconstruction"]
    assert parts == pytest.approx(result["bits_per_dim"], rel=1e-6)
    lines = (finished.workdir / "evaluations.jsonl").read_text().splitlines()
    assert [strict_json(line) for line in lines] == [result]


def test_the_arrays_add_up_to_the_result(finished):
    result = json.loads((finished.workdir / "evaluation.json").read_text())
    with np.load(finished.workdir / "evaluation.npz") as arrays:
        shapes = {name: arrays[name].shape for name in arrays}
        assert shapes == {
            "t": (8,),
            "log_snr": (8,),
            "kl": (7,),
            "kl_se": (7,),
            "x_0_rmse": (8,),
            "bits_per_dim_per_example": (447,),
        }
        assert arrays["t"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        per_example = arrays["bits_per_dim_per_example"]
        assert per_example.dtype == np.float64
        assert per_example.mean() == pytest.approx(result["bits_per_dim"], rel=1e-12)
        se = per_example.std(ddof=1) / np.sqrt(447)
        assert se == pytest.approx(result["bits_per_dim_se"], rel=1e-12)
        assert arrays["kl"].sum() == pytest.approx(result["diffusion"], rel=1e-12)
        assert (arrays["kl"] > 0).all()
        # A model that has learned anything errs more where there is more noise.
        assert arrays["x_0_rmse"][0] < arrays["x_0_rmse"][-1] < 16


def test_the_result_is_one_line(finished):
    result = json.loads((finished.workdir / "evaluation.json").read_text())
    line = result_line(result)
    number = r"\d+\.\d{3,}"
    assert re.match(
        rf"test bits/dim {number} ± {number} "
        rf"\(prior {number}, diffusion {number}, reconstruction {number}\), 447 examples",
        line,
    )
    assert f"{result['bits_per_dim']:.4f} ± {result['bits_per_dim_se']:.4f} " in line
    assert "\n" not in line
    assert finished.output.strip().splitlines()[-1] == line


def test_terms_worse_than_uniform_pixels_are_said_in_the_line(finished):
    result = json.loads((finished.workdir / "evaluation.json").read_text())
    assert result["uniform_bits_per_dim"] == pytest.approx(np.log2(17))
    good = dict.fromkeys(("prior", "diffusion", "reconstruction"), 1.0)
    assert "worse" not in result_line(result | good | {"bits_per_dim": 3.0})
    line = result_line(result | good | {"bits_per_dim": 7.0, "reconstruction": 5.0})
    assert "warning: worse than the 4.0875 of uniform pixels (reconstruction: the first" in line
    assert "prior: " not in line
    assert "\n" not in line


def test_another_seed_lands_within_the_monte_carlo_error(tmp_path):
    """Other noise, the same images: only what depends on the noise changes."""
    workdir = tiny.untrained(tmp_path, tiny.config())
    one, other = (evaluate(tiny.config(seed=seed), workdir) for seed in (0, 1))
    difference = other["bits_per_dim"] - one["bits_per_dim"]
    spread = np.hypot(other["bits_per_dim_mc_se"], one["bits_per_dim_mc_se"])
    assert 0 < abs(difference) < 4 * spread
    assert other["prior"] == one["prior"]
    # The latest is in evaluation.json, and both are in the history.
    assert json.loads((workdir / "evaluation.json").read_text())["seed"] == 1
    lines = (workdir / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]


def test_one_example_has_no_standard_error(tmp_path, monkeypatch):
    """Null in the file, and a word in the line."""
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) % 17
    source = Source(1, (8, 8, 1), 17, lambda: (images, None))
    monkeypatch.setitem(splits.DATASETS, "one", lambda split: source)
    config = tiny.config(data__name="one")
    result = evaluate(config, tiny.untrained(tmp_path, config))
    assert "± unknown" in result_line(result)
    written = strict_json((tmp_path / "evaluation.json").read_text())
    assert written["bits_per_dim_se"] is None
    assert written["num_examples"] == 1
    assert "± unknown" in result_line(written)


@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_the_shortest_chains_are_written_and_drawn(num_timesteps, tmp_path):
    config = tiny.config(schedule__num_timesteps=num_timesteps)
    result = evaluate(config, tiny.untrained(tmp_path, config))
    assert strict_json((tmp_path / "evaluation.json").read_text()) == result
    with np.load(tmp_path / "evaluation.npz") as arrays:
        assert arrays["kl"].shape == arrays["kl_se"].shape == (num_timesteps - 1,)
    assert (tmp_path / "kl_per_timestep.png").exists()
    assert (tmp_path / "rate_distortion.png").exists()


def test_the_best_or_the_latest_weights_are_measured(tmp_path):
    config = tiny.config()
    good, bad = (tiny.state_of(config, scale) for scale in (0.0, 10.0))
    tiny.save(tmp_path, {5: (good, 1.0), 9: (bad, 2.0)})
    best = evaluate(config, tmp_path)
    latest = evaluate(tiny.config(evaluate__checkpoint="latest"), tmp_path)
    assert (best["step"], latest["step"]) == (5, 9)
    assert latest["bits_per_dim"] > best["bits_per_dim"] + 1


def test_a_checkpoint_can_be_measured_otherwise_than_it_was_trained(tmp_path):
    """At any T, on any schedule, with any Σ and decoder; what it predicts is its own."""
    workdir = tiny.untrained(tmp_path, tiny.config())
    record.record(tiny.config(), workdir)
    result = evaluate(
        tiny.config(
            schedule__name="cosine",
            schedule__num_timesteps=3,
            model__variance="beta",
            decoder__name="discretized_gaussian",
        ),
        workdir,
    )
    assert result["num_timesteps"] == 3
    before = tiny.files(workdir)
    with pytest.raises(ConfigError, match=r"model\.parameterization was 'v', now 'eps'"):
        evaluate(tiny.config(model__parameterization="eps"), workdir)
    assert tiny.files(workdir) == before


def test_an_evaluation_with_other_settings_leaves_the_main_jobs(tmp_path, capsys):
    workdir = tiny.untrained(tmp_path, tiny.config())
    record.record(tiny.config(), workdir)
    main = evaluate(tiny.config(), workdir)
    other = evaluate(tiny.config(evaluate__split="validation"), workdir)
    assert (other["split"], other["num_examples"]) == ("validation", 350)
    assert json.loads((workdir / "evaluation.json").read_text()) == main
    stems = {result["split"]: stem_of(workdir, result) for result in (main, other)}
    assert len(list((workdir / "evaluations").glob("*.json"))) == 2
    assert f"{stems['validation']}.json" in capsys.readouterr().out
    for result in (main, other):
        stem = stems[result["split"]]
        assert json.loads(stem.with_suffix(".json").read_text()) == result
        with np.load(stem.with_suffix(".npz")) as arrays:
            assert len(arrays["bits_per_dim_per_example"]) == result["num_examples"]
    record.forget_results(workdir)
    assert not (workdir / "evaluations").exists()
    assert not (workdir / "evaluation.json").exists()


def test_what_cannot_be_evaluated_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no checkpoint .*train first"):
        evaluate(tiny.config(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    workdir = tiny.untrained(tmp_path / "run", tiny.config())
    before = tiny.files(workdir)
    for overrides, message in (
        ({"network": "unet"}, "is of another architecture"),
        ({"evaluate__split": "tset"}, r"config\.evaluate\.split = 'tset' .*did you mean test"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(tiny.config(**overrides), workdir)
    assert tiny.files(workdir) == before
