"""Samples: which noise they come from, what is done to them, and the pictures of the way."""

import itertools

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from diffusion.forward import example_noise
from diffusion.samplers import base, ddpm
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.processes import cores
from experiments.harness.sampling.draw import START, STRETCH, Drawer, stretches
from experiments.harness.seeds import STREAMS, stream
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.trained import load
from experiments.sample import sample, strip_levels
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def read_png(path):
    """uint8 [h, w]: digits are grey."""
    return np.round(matplotlib.image.imread(path) * 255).astype(np.uint8)


def rows_of_tiles(path, rows):
    """The picture of a strip without its captions, as 8×8 tiles [row, column, h, w]."""
    table = read_png(path)[-(rows * 65 - 1) :]
    columns = (table.shape[1] + 1) // 65
    assert table.shape == (rows * 65 - 1, columns * 65 - 1)
    table = np.pad(table, ((0, 1), (0, 1))).reshape(rows, 65, columns, 65)
    tiles = table.transpose(0, 2, 1, 3)[:, :, :64, :64]
    # Each pixel of a digit is drawn as 8 × 8.
    assert (tiles == tiles[:, :, ::8, ::8].repeat(8, axis=2).repeat(8, axis=3)).all()
    return tiles[:, :, ::8, ::8]


def grey(levels):
    """Grey levels 0 … 16 as bytes."""
    return np.round(np.asarray(levels, np.float64) * 255 / 16).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    """Random weights of the convolution, the same in every process."""
    return tiny.state_of(tiny.config(), scale=0.3).ema_params


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """A work directory that holds these weights. Shared: copy it before writing to it."""
    return tiny.untrained(tmp_path_factory.mktemp("untrained"), tiny.config(), scale=0.3, step=3)


def draw(config, params, n, num_timesteps=8, record=()):
    definition = define_model(config)
    levels = definition.schedule.levels(num_timesteps)
    return Drawer(config, definition)(params, levels, n, record, config.sample.strip_rows)


def test_the_main_job_wrote_samples_as_grey_levels(finished):
    with np.load(finished.workdir / "samples" / "samples.npz") as saved:
        samples, x_0 = saved["samples"], saved["x_0"]
        assert saved["seed"] == 0
        assert saved["step"] == tiny.best_step(finished.workdir)
    assert (samples.shape, samples.dtype) == ((6, 8, 8, 1), np.uint8)
    assert samples.max() <= 16
    # To the nearest of the levels, which are an eighth apart on [−1, 1].
    nearest = np.clip(np.round((np.float64(x_0) + 1) * 8), 0, 16)
    assert (samples == nearest).all()


def test_the_main_job_drew_its_samples(finished):
    """Six of them in two rows of three, at 8 × 8 pixels a pixel and a line between."""
    directory = finished.workdir / "samples"
    with np.load(directory / "samples.npz") as saved:
        x_0 = saved["x_0"]
    tiles = rows_of_tiles(directory / "samples.png", rows=2)
    shown = np.clip(np.round((x_0 + 1) * 127.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(tiles.reshape(6, 8, 8), shown[..., 0])


def test_the_strips_show_the_way_down_and_up(finished):
    directory = finished.workdir / "samples"
    # Levels 8, 6, 3, 1 and the sample; for each of two samples, x_t over x̂_0.
    down = rows_of_tiles(directory / "reverse.png", rows=4)
    assert down.shape[1] == 5
    with np.load(directory / "samples.npz") as saved:
        shown = np.clip(np.round((saved["x_0"][:2] + 1) * 127.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(down[0::2, -1], shown[..., 0])
    np.testing.assert_array_equal(down[1::2, -1], shown[..., 0])
    # Two test digits and levels 1, 3, 6, 8: ever further from where they came from.
    up = rows_of_tiles(directory / "forward.png", rows=2)
    assert up.shape[1] == 5
    digits = splits.load("digits", "test").images[:2, :, :, 0]
    np.testing.assert_array_equal(up[:, 0], grey(digits))
    distance = np.abs(up.astype(float) - up[:, :1]).mean(axis=(0, 2, 3))
    assert (np.diff(distance) > 0).all()


@pytest.mark.parametrize(("n", "batch_size"), [(3, 4), (7, 7), (7, 2), (1, 1), (2, 100)])
def test_a_sample_does_not_depend_on_those_around_it(model, n, batch_size):
    config = tiny.config()
    expected = draw(config, model, 8, record=(8, 3))
    config.sample.batch_size = batch_size
    samples = draw(config, model, n, record=(8, 3))
    assert samples.x_0.shape == (n, 8, 8, 1)
    # Eight steps that each round at 2⁻²⁴, in another order for another batch.
    size = np.abs(expected.x_0).max()
    np.testing.assert_allclose(samples.x_0, expected.x_0[:n], rtol=0, atol=1e-5 * size)
    # The way is kept for the first two samples, fewer if there are no more.
    shown = min(n, 2)
    for way, expected_way in ((samples.x_t, expected.x_t), (samples.x_0_hat, expected.x_0_hat)):
        assert way.shape == (2, shown, 8, 8, 1)
        size = np.abs(expected_way).max()
        np.testing.assert_allclose(way, expected_way[:, :shown], rtol=0, atol=1e-5 * size)


def test_the_cores_of_a_cpu_draw_the_samples_of_one(model, monkeypatch):
    """Two batches of 32, in halves, the second not full."""
    config = tiny.config(sample__batch_size=32)
    whole, halves = [], []
    for number, drawn in ((1, whole), (2, halves)):
        monkeypatch.setattr(cores, "num_cores", lambda number=number: number)
        drawn.extend(draw(config, model, 40, record=(8, 3)))
    for a, b in zip(halves, whole, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_samples_differ_from_one_another_and_from_those_of_another_seed(model):
    samples = draw(tiny.config(), model, 6).x_0
    other = draw(tiny.config(seed=1), model, 6).x_0
    both = np.concatenate([samples, other]).reshape(12, -1)
    distances = np.abs(both[:, None] - both).max(axis=-1)
    assert (distances[~np.eye(12, dtype=bool)] > 0.1).all()


def test_purposes_draw_from_streams_of_their_own():
    keys = [
        tuple(jax.random.key_data(stream(seed, purpose)).tolist())
        for seed in (0, 1, -1, 2**31 - 1)
        for purpose in STREAMS
    ]
    assert len(set(keys)) == len(keys) == 4 * len(STREAMS)


def test_one_level_is_one_prediction_from_noise(model):
    """With T = 1 the sample is x̂_0(x_1), where x_1 is the sample's first noise."""
    config = tiny.config()
    samples = draw(config, model, 5, num_timesteps=1)
    definition = define_model(config)
    noise = example_noise(stream(0, "sample"), np.arange(5), (8, 8, 1))
    x_1, log_snr = noise(jnp.full(5, START)), jnp.full(5, -5.0)
    expected = definition.model(model).reverse.predict("x_0", x_1, log_snr)
    np.testing.assert_allclose(samples.x_0, expected, rtol=1e-4, atol=1e-5)


def test_the_way_starts_at_the_noise_and_ends_at_the_prediction(model):
    config = tiny.config()
    samples = draw(config, model, 2, record=(8, 1))
    noise = example_noise(stream(0, "sample"), np.arange(2), (8, 8, 1))
    np.testing.assert_allclose(samples.x_t[0], noise(jnp.full(2, START)), rtol=1e-6)
    fewer = draw(config, model, 2, num_timesteps=3, record=(3,))
    np.testing.assert_array_equal(fewer.x_t[0], samples.x_t[0])
    # p(x_0 | x_1) is replaced by its mean: x̂_0 at the last level is the sample.
    np.testing.assert_array_equal(samples.x_0_hat[1], samples.x_0)


def test_the_schedule_is_respaced_to_the_levels_asked_for(workdir, tmp_path):
    """All of them by default; ends are kept, so that λ runs from −5 to 8 however many there are."""
    default, eight, three = (
        sample(tiny.config(sample__num_timesteps=n), tiny.copy(workdir, tmp_path / str(n)))
        for n in (0, 8, 3)
    )
    np.testing.assert_array_equal(default, eight)
    assert (three != eight).any()
    # Three levels are 3, 2, 1, and every one of them is shown.
    assert rows_of_tiles(tmp_path / "3" / "copy/samples/reverse.png", rows=4).shape[1] == 4


def test_clipping_keeps_the_samples_in_range(workdir, tmp_path):
    made = {}
    for treatment in ("none", "clip"):
        copy = tiny.copy(workdir, tmp_path / treatment)
        samples = sample(tiny.config(sample__x_0_treatment=treatment), copy)
        assert samples.max() <= 16
        with np.load(copy / "samples" / "samples.npz") as saved:
            made[treatment] = saved["x_0"]
            np.testing.assert_array_equal(saved["samples"], samples)
    assert np.abs(made["none"]).max() > 1.01
    assert np.abs(made["clip"]).max() <= 1


@pytest.mark.parametrize("treatment", ["none", "clip"])
def test_samples_far_from_the_data_are_said_with_a_remedy(model, treatment, capsys):
    """An ε that is wrong at cosine's last level, where √ᾱ is 1e-3 or less, is divided by it."""
    config = tiny.config(
        schedule__name="cosine", model__parameterization="eps", sample__x_0_treatment=treatment
    )
    x_0 = draw(config, model, 2).x_0
    out = capsys.readouterr().out
    if treatment == "clip":
        assert "warning" not in out
        return
    largest = np.abs(x_0).max()
    assert largest > 100
    assert f"samples by ancestral at 8 levels reach {largest:,.4g} where data end at ±1 (" in out
    assert "take more levels, or set config.sample.x_0_treatment to 'clip' or 'dynamic'" in out
    assert "config.model.parameterization = 'v' (it is 'eps' now)" in out
    assert out.count("\n") == 1


def test_samplers_spacings_and_correctors_change_the_way(workdir):
    """From one noise all end elsewhere; but at η = 1 DDIM is ancestral sampling with β̃."""
    ways = {
        "ancestral": {},
        "noisy ddim": {"sampler": "ddim", "ddim__eta": 1.0},
        "ddim": {"sampler": "ddim"},
        "dpm": {"sampler": "dpm_solver_pp_2m"},
        "quadratic": {"spacing": "quadratic"},
        "karras": {"spacing": "karras"},
        "karras 3": {"spacing": "karras", "karras__rho": 3.0},
        "corrected": {"corrector__num_steps": 1},
        "churned": {"sampler": "euler", "euler__churn": 0.2},
    }
    made = {}
    for way, overrides in ways.items():
        config = tiny.config(**{f"sample__{name}": value for name, value in overrides.items()})
        run = load(config, workdir, writes=False)
        samples = Drawer(config, run.definition)(run.params, run.levels(5), 4)
        made[way] = samples.x_0
        assert (samples.evaluations == (10 if way == "corrected" else 5)).all()
    # Of order one, at five steps of a network that was hardly trained: rounding is amplified.
    np.testing.assert_allclose(made["noisy ddim"], made["ancestral"], rtol=1e-3, atol=1e-3)
    del made["noisy ddim"]
    for one, other in itertools.combinations(made, 2):
        assert np.abs(made[one] - made[other]).max() > 1e-3, (one, other)


def test_one_program_serves_any_levels_and_any_recording(model):
    """Compiled once; the levels of a run longer than one stretch are all stepped through."""
    config = tiny.config()
    definition = define_model(config)
    drawer = Drawer(config, definition)
    run, traces = drawer._run_stretch, []
    drawer._advance = jax.jit(lambda *args: traces.append(1) or run(*args))
    made = {}
    for num_timesteps, record in ((8, ()), (8, (8, 3, 1)), (3, ()), (40, ()), (40, (17, 40, 1))):
        levels = definition.schedule.levels(num_timesteps)
        made[num_timesteps, record] = drawer(model, levels, 3, record, rows=3)
    assert len(traces) == 1
    for (num_timesteps, record), of in made.items():
        assert (of.evaluations == num_timesteps).all()
        np.testing.assert_array_equal(of.x_0, made[num_timesteps, ()].x_0)
        assert len(of.x_t) == len(of.x_0_hat) == len(record)
    # What the scan of the library makes in one piece.
    sampler = ddpm.ancestral(definition.model(model))
    noise = example_noise(stream(0, "sample"), np.arange(3), (8, 8, 1))
    levels = definition.schedule.levels(40)
    x_T = noise(jnp.full(3, START))
    whole = jax.jit(lambda: base.sample(sampler, levels, noise, 3, (17, 40, 1), x_T))()
    of = made[40, (17, 40, 1)]
    for ours, theirs in zip(of, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(whole.x_0).max())


@pytest.mark.parametrize("last", [1, 2, STRETCH, STRETCH + 1, 1000])
def test_stretches_cover_every_level_once(last):
    """And one that is recorded is stepped from by itself."""
    for record in ((), (1,), (last,), tuple({1, last // 2 + 1, last})):
        runs = stretches(last, record)
        stepped = [t for top, bottom in runs for t in range(top, bottom, -1)]
        assert stepped == list(range(last, 0, -1))
        assert all(0 < top - bottom <= STRETCH for top, bottom in runs)
        assert {(t, t - 1) for t in record} <= set(runs)
    with pytest.raises(ValueError, match=rf"recorded levels lie in 1 … {last}"):
        stretches(last, (last + 1,))


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 10, 11, 1000, 10**6])
@pytest.mark.parametrize("columns", [1, 2, 11])
def test_strips_show_levels_from_first_to_last(num_timesteps, columns):
    levels = strip_levels(num_timesteps, columns)
    assert len(levels) == min(columns, num_timesteps)
    assert (np.diff(levels) < 0).all()
    if columns > 1:
        assert (levels[0], levels[-1]) == (num_timesteps, 1)
    if len(levels) > 2:
        # Evenly, but for rounding to whole levels.
        assert np.ptp(np.diff(levels)) <= 1


@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_strips_of_short_chains_repeat_no_level(num_timesteps, workdir, tmp_path):
    config = tiny.config(schedule__num_timesteps=num_timesteps, sample__strip_columns=11)
    copy = tiny.copy(workdir, tmp_path)
    sample(config, copy)
    for name, rows in (("reverse.png", 4), ("forward.png", 2)):
        tiles = rows_of_tiles(copy / "samples" / name, rows)
        assert tiles.shape[1] == num_timesteps + 1


def test_a_single_sample_and_more_rows_than_samples(workdir, tmp_path):
    config = tiny.config(sample__num_samples=1, sample__strip_rows=3)
    copy = tiny.copy(workdir, tmp_path)
    assert sample(config, copy).shape == (1, 8, 8, 1)
    assert rows_of_tiles(copy / "samples" / "samples.png", rows=1).shape[1] == 1
    assert rows_of_tiles(copy / "samples" / "reverse.png", rows=2).shape[1] == 5
    assert rows_of_tiles(copy / "samples" / "forward.png", rows=3).shape[1] == 5


def test_what_cannot_be_sampled_is_named_and_nothing_is_written(workdir, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no checkpoint .*train first"):
        sample(tiny.config(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    before = tiny.files(workdir)
    for overrides, message in (
        ({"network": "unet"}, "is of another architecture"),
        ({"sample__num_timesteps": -1}, r"config\.sample\.num_timesteps = -1"),
        ({"sample__spacing": "bound_optimal"}, r"run first python main\.py --experiment=spacing"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample(tiny.config(**overrides), workdir)
    assert tiny.files(workdir) == before
