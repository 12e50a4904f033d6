import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness.errors import ConfigError, RunError
from experiments.harness.workdir import checkpoints, record
from experiments.harness.workdir.checkpoints import Checkpoints
from tests.experiments import tiny


class State(NamedTuple):
    step: Any
    params: Any
    ema_params: Any
    opt_state: Any


OPTIMIZERS = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "sgd": optax.sgd(1e-3, momentum=0.9),
}


def make_state(width=4, optimizer="adamw", dtype=jnp.float32, seed=0):
    """Random bits, NaNs and negative zeros among them: what casts and compressors would change."""
    rng = np.random.default_rng(seed)

    def bits(shape, dtype):
        dtype = np.dtype(dtype)
        raw = rng.integers(0, 256, size=(*shape, dtype.itemsize), dtype=np.uint8)
        return jnp.asarray(raw.view(dtype)[..., 0])

    params = {
        "conv": {"kernel": bits((3, width), dtype), "bias": bits((width,), jnp.bfloat16)},
        "norm": {},
        "counts": [bits((), jnp.int32), bits((5,), jnp.uint8)],
    }
    ema_params = jax.tree.map(lambda x: x[..., ::-1] if x.ndim else x, params)
    return State(jnp.int32(7), params, ema_params, OPTIMIZERS[optimizer].init(params))


def small_state(value):
    return {"step": jnp.int32(value), "params": {"w": jnp.full((2,), value, jnp.float32)}}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("describe", [lambda state: state, abstract])
def test_a_restored_state_is_the_saved_one_bit_for_bit(tmp_path, describe):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(7, describe(state))
    tiny.assert_bit_equal(restored, state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))


def test_a_relative_work_directory_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/a") as checkpoints:
        checkpoints.save(1, small_state(1))
    with Checkpoints(tmp_path / "runs" / "a", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_a_numpy_leaf_comes_back_as_numpy(tmp_path):
    state = {"w": np.arange(3.0), "b": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(1, state)
    tiny.assert_bit_equal(restored, state)
    assert isinstance(restored["w"], np.ndarray)
    assert isinstance(restored["b"], jax.Array)


def test_the_state_may_be_donated_or_overwritten_once_save_has_returned(tmp_path):
    # Large enough that writing takes longer than the steps below.
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    on_device, on_host = jnp.zeros((1024, 1024)), np.zeros((512, 1024))
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"device": on_device, "host": on_host})
            for _ in range(5):
                on_device = advance(on_device)
                on_host += 1
            jax.block_until_ready(on_device)
        for step in range(3):
            saved = checkpoints.restore(step, {"device": on_device, "host": on_host})
            np.testing.assert_array_equal(saved["device"], 5 * step)
            np.testing.assert_array_equal(saved["host"], 5 * step)


def test_the_last_few_and_the_best_are_kept(tmp_path):
    validations = [3.0, 1.0, 2.0, None, 5.0, float("nan"), None]
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step, validation in enumerate(validations):
            checkpoints.save(step, small_state(step), validation)
        assert checkpoints.steps() == [1, 4, 5, 6]
        assert checkpoints.best_step() == 1
    # A resumed run knows the metrics of the run before it.
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        assert checkpoints.best_step() == 1
        checkpoints.save(7, small_state(7), validation=1.5)
        assert checkpoints.steps() == [1, 5, 6, 7]
        checkpoints.save(8, small_state(8), validation=0.5)
        assert (checkpoints.steps(), checkpoints.best_step()) == ([6, 7, 8], 8)
        assert checkpoints.latest_step() == 8
        np.testing.assert_array_equal(checkpoints.restore(6, small_state(0))["params"]["w"], 6)


@pytest.mark.parametrize(
    ("validations", "best"),
    [
        ([None, float("nan"), float("-inf"), None], None),  # none is finite
        ([2.0, 1.0, 1.0, 4.0], 2),  # the later of equals
    ],
)
def test_the_best_has_the_lowest_finite_metric(validations, best, tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.best_step() is None
        assert checkpoints.latest_step() is None
        for step, validation in enumerate(validations):
            checkpoints.save(step, small_state(step), validation)
        assert checkpoints.best_step() == best
        assert checkpoints.steps() == [2, 3]


def test_a_step_that_is_saved_already_is_left_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(3, small_state(3), validation=1.0)
        assert not checkpoints.save(3, small_state(4), validation=2.0)
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.save(3, small_state(5))
        np.testing.assert_array_equal(checkpoints.restore(3, small_state(0))["params"]["w"], 3)


def test_a_part_is_restored_without_knowing_the_rest(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        ema_params = checkpoints.restore(7, abstract(state.ema_params), "ema_params")
        step = checkpoints.restore(7, state.step, "step")
    tiny.assert_bit_equal(ema_params, state.ema_params)
    assert step == 7


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        (make_state(width=6), "params/conv/kernel is (3, 4) float32 there and (3, 6) float32 here"),
        (
            make_state(dtype=jnp.bfloat16),
            "params/conv/kernel is (3, 4) float32 there and (3, 4) bfloat16 here",
        ),
        (make_state(optimizer="sgd"), "is absent there and (4,) bfloat16 here"),
        (
            make_state()._replace(ema_params={}),
            "ema_params/conv/kernel is (3, 4) float32 there and absent here",
        ),
    ],
)
def test_another_architecture_is_one_clear_line_and_never_a_cast(tmp_path, like, difference):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, make_state())
        with pytest.raises(ConfigError) as error:
            checkpoints.restore(7, like)
        with pytest.raises(ConfigError, match=r"ema_params/conv/kernel is \(3, 4\) .* \(3, 5\)"):
            checkpoints.restore(7, make_state(width=5).params, "ema_params")
        with pytest.raises(ConfigError, match="ema/w is absent there"):
            checkpoints.restore(7, {"w": jnp.ones(3)}, "ema")
    message = str(error.value)
    assert difference in message
    assert message.startswith(f"workdir={tmp_path}: the checkpoint at step 7")
    assert "\n" not in message
    assert len(message) < 500


def test_a_work_directory_without_checkpoints_says_to_train_first(tmp_path):
    for workdir in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match=f"init_from={workdir} holds no .*train first"):
            Checkpoints(workdir, read_only=True, setting="init_from")
        assert not (tmp_path / "missing").exists()
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_a_missing_step_lists_the_steps_there_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ConfigError, match="train first"):
            checkpoints.restore(1, small_state(0))
        for step in (10, 20):
            checkpoints.save(step, small_state(step))
        with pytest.raises(ConfigError, match=r"step=15: .* has checkpoints at steps 10, 20"):
            checkpoints.restore(15, small_state(0))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match=r"workdir=.*run cannot be written"):
        Checkpoints(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "run\\1"])
def test_a_directory_where_nothing_could_be_restored_is_refused_at_once(name, tmp_path):
    """orbax takes the path for a pattern."""
    for refuse in (
        lambda: record.check(tiny.config(), tmp_path / name),
        lambda: Checkpoints(tmp_path / name),
    ):
        with pytest.raises(ConfigError, match="give another directory"):
            refuse()
    assert not list(tmp_path.iterdir())


def test_each_checkpoint_is_opened_once_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "check_path", lambda *_: None)
    with (
        pytest.raises(RunError, match="step 1 could not be written"),
        Checkpoints(tmp_path / "run[1]") as writer,
    ):
        writer.save(1, small_state(1))


def test_a_reader_touches_nothing_and_a_killed_save_is_no_checkpoint(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, state, validation=1.0)
        checkpoints.save(2, state, validation=2.0)
    directory = tmp_path / "checkpoints"
    unfinished = [directory / f"{step}.orbax-checkpoint-tmp" for step in (3, 4)]
    for path in unfinished:
        shutil.copytree(directory / "2" / "default", path / "default")
    before = tiny.files(tmp_path)
    with Checkpoints(tmp_path, keep_last=1, read_only=True) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, 1)
        tiny.assert_bit_equal(checkpoints.restore(2, state), state)
        with pytest.raises(RuntimeError, match="read_only"):
            checkpoints.save(3, state)
    assert tiny.files(tmp_path) == before
    # The run that goes on clears up and saves one of those steps again.
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(3, state)
        tiny.assert_bit_equal(checkpoints.restore(3, state), state)
    assert not any(path.exists() for path in unfinished)


def test_a_checkpoint_removed_while_it_is_read_is_a_clear_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small_state(1))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints" / "1")
        with pytest.raises(ConfigError, match="step 1 was removed while it was being read"):
            checkpoints.restore(1, small_state(0))
