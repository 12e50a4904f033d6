"""Guidance of exact models, whose guided score or posterior is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.reverse import PARAMETERIZATIONS, Reverse, convert
from diffusion.samplers import base, ddpm, guidance, solvers
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

NAMES = list(PARAMETERIZATIONS)
WEIGHTS = np.array([0.3, 0.7])
CLASSES = distributions.Mixture(
    WEIGHTS,
    np.array([[-1.0, 0.4, 0.0], [0.8, -0.2, 0.3]]),
    np.array([np.diag([0.2, 0.5, 0.4]), [[0.6, 0.2, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 0.5]]]),
)
EACH = [distributions.normal(CLASSES.means[k], CLASSES.covariances[k]) for k in range(2)]

LOG_SNR = np.linspace(-7.0, 7.0, 12)
X_T = np.random.default_rng(0).normal(size=(12, 3))
LABELS = np.arange(12) % 2


def class_denoiser(x_t, log_snr, condition=None):
    """E[x_0 | x_t], or E[x_0 | x_t, class] of the class that a condition in 0, 1 names."""
    if condition is None:
        return CLASSES.denoiser(x_t, log_snr)
    first, second = (data.denoiser(x_t, log_snr) for data in EACH)
    return jnp.where(jnp.asarray(condition)[:, None] == 0, first, second)


def class_model(name, variance="beta_tilde", extra=None):
    """As a model that predicts `name`, and says `extra` of its variance."""

    def denoiser(x_t, log_snr, condition=None):
        prediction = convert(class_denoiser(x_t, log_snr, condition), x_t, log_snr, "x_0", name)
        if extra is None:
            return prediction
        said = jnp.full_like(prediction, 0.0 if condition is None else extra)
        return jnp.concatenate([prediction, said], axis=-1)

    return problems.without_decoder(Reverse(denoiser, name, variance)).given(LABELS)


def predict(model, target="x_0", log_snr=LOG_SNR):
    return jax.jit(lambda: model.reverse.predict(target, X_T, log_snr))()


def class_log_prob(x_t, x_0_hat, log_snr):
    """log p(class | x_t), by Bayes' rule: a classifier of noisy vectors, which ignores x̂_0."""
    del x_0_hat
    of_class = jnp.stack([data.noised_log_prob(x_t, log_snr) for data in EACH], axis=1)
    posterior = jax.nn.log_softmax(of_class + np.log(WEIGHTS), axis=1)
    return jnp.take_along_axis(posterior, jnp.asarray(LABELS)[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_the_guided_score_is_that_of_the_sharpened_posterior(name, scale, float64):
    """∇ log [p(x_t) p(y | x_t)^w], by differentiating the densities; in each parameterisation."""

    @jax.jit
    def expected():
        def log_density(x):
            tilted = scale * class_log_prob(x, None, LOG_SNR)
            return jnp.sum(CLASSES.noised_log_prob(x, LOG_SNR) + tilted)

        return jax.grad(log_density)(jnp.asarray(X_T))

    guided = guidance.classifier_free(class_model(name), scale)
    np.testing.assert_allclose(predict(guided, "score"), expected(), rtol=1e-7, atol=1e-9)


def test_at_scale_one_it_is_the_conditional_model_at_its_cost():
    model = class_model("v")
    assert guidance.classifier_free(model, 1.0, (-1.0, 1.0), 0.7) is model
    np.testing.assert_array_equal(guidance.evaluations_at(LOG_SNR, 1.0), 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_guides_between_its_ends_and_nowhere_else(name, float64):
    """Also where rows are at different levels, as they are here. The ends belong to it."""
    model = class_model(name)
    low, high = LOG_SNR[3], LOG_SNR[8]
    within = predict(guidance.classifier_free(model, 3.0, (low, high)))
    everywhere, nowhere = predict(guidance.classifier_free(model, 3.0)), predict(model)
    np.testing.assert_allclose(within[3:9], everywhere[3:9], rtol=1e-9)
    for rows in (slice(0, 3), slice(9, None)):
        np.testing.assert_allclose(within[rows], nowhere[rows], rtol=1e-9)
    assert np.abs(everywhere - nowhere).max(axis=1).min() > 1e-5


def test_outside_the_interval_the_unconditional_model_is_not_evaluated():
    """Calls are counted as the program runs, and are what `evaluations_at` says."""
    calls = []

    def denoiser(x_t, log_snr, condition=None):
        jax.debug.callback(lambda: calls.append(1))
        return class_denoiser(x_t, log_snr, condition)

    interval = -2.0, 3.0
    model = problems.without_decoder(Reverse(denoiser, "x_0", condition=LABELS))
    sampler = ddpm.ddim(guidance.classifier_free(model, 2.0, interval))
    levels = schedules.linear_log_snr(6.0, -6.0).levels(13)
    noise = problems.constant(X_T.astype(np.float32))
    jax.block_until_ready(jax.jit(lambda: base.sample(sampler, levels, noise, 12).x_0)())
    jax.effects_barrier()
    counts = np.asarray(guidance.evaluations_at(levels.log_snr[1:], 2.0, interval))
    assert len(calls) == counts.sum() == 13 + 6  # −2, −1 … 3


def test_rescaling_restores_the_conditionals_standard_deviation(float64):
    """At φ = 1 of every example; below it the standard deviation is linear in φ."""
    model = class_model("v")

    def deviation(guided):
        found = jax.jit(lambda: guided.reverse.outputs(X_T, LOG_SNR).prediction)()
        return np.std(found, axis=1)

    conditional, plain, half, whole = (
        deviation(of)
        for of in (
            model,
            guidance.classifier_free(model, 4.0),
            guidance.classifier_free(model, 4.0, rescale=0.5),
            guidance.classifier_free(model, 4.0, rescale=1.0),
        )
    )
    assert np.abs(plain / conditional - 1).max() > 0.1
    np.testing.assert_allclose(whole, conditional, rtol=1e-12)
    np.testing.assert_allclose(half, (plain + conditional) / 2, rtol=1e-12)


def test_rescaling_leaves_constant_predictions_and_their_gradients_finite():
    """One coordinate has no standard deviation, and an example of zeros has none either."""
    reverse = Reverse(lambda x, l, c=None: x * (1.0 if c is None else 2.0), "x_0", condition=1)
    guided = guidance.classifier_free(problems.without_decoder(reverse), 3.0, rescale=1.0)

    def total(x):
        return guided.reverse.predict("x_0", x, jnp.zeros(len(x))).sum()

    for x in (jnp.ones((2, 1)), jnp.zeros((2, 4))):
        value, gradient = jax.value_and_grad(total)(x)
        assert np.isfinite(value)
        np.testing.assert_allclose(gradient, 4.0)  # 1 + 3 (2 − 1)


@pytest.mark.parametrize("variance", ["learned_range", "learned_diagonal"])
def test_a_learned_variance_stays_the_conditional_models(variance, float64):
    extra = 0.3  # and 0 of the unconditional model
    for make in (
        lambda model: guidance.classifier_free(model, 3.0, rescale=0.5),
        lambda model: guidance.by_log_prob(model, class_log_prob, 2.0),
    ):
        with_extra, without = (
            jax.jit(make(class_model("eps", *of)).reverse.outputs)(X_T, LOG_SNR)
            for of in ((variance, extra), ("beta", None))
        )
        assert without.extra is None
        np.testing.assert_array_equal(with_extra.extra, extra)
        np.testing.assert_allclose(with_extra.prediction, without.prediction, rtol=1e-12)


def test_an_interval_goes_from_low_to_high():
    with pytest.raises(ValueError, match="lower log-SNR"):
        guidance.classifier_free(class_model("eps"), 2.0, (1.0, -1.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_noisy_classifiers_gradient_turns_the_model_into_the_classs_own(name, float64):
    """p(x_t) p(y | x_t) = p(x_t, y). And at another scale it is classifier-free guidance."""
    model = class_model(name)
    unconditional = model.given(None)
    guided = guidance.by_log_prob(unconditional, class_log_prob)
    conditional = class_denoiser(X_T, LOG_SNR, LABELS)
    np.testing.assert_allclose(predict(guided), conditional, rtol=1e-7, atol=1e-9)
    threefold = guidance.by_log_prob(unconditional, class_log_prob, 3.0)
    by_itself = guidance.classifier_free(model, 3.0)
    np.testing.assert_allclose(predict(threefold), predict(by_itself), rtol=1e-7, atol=1e-8)


# Data N(m, C) of which y = A x_0 + noise of covariance R was seen.
PRIOR = distributions.normal(
    np.array([0.3, -0.2, 0.1]), np.array([[1.0, 0.4, 0.1], [0.4, 0.8, -0.2], [0.1, -0.2, 0.5]])
)
SEEN, SEEN_NOISE, Y = (
    np.array([[1.0, -0.5, 0.2], [0.0, 1.0, 1.0]]),
    np.diag([0.1, 0.3]),
    [0.9, -0.4],
)


def prior(name):
    """The prior's model, with a condition that it ignores."""
    return problems.without_decoder(problems.predicting(PRIOR, name)).given(LABELS)


def posterior():
    """p(x_0 | y), in information form: precisions add."""
    precision = np.linalg.inv(PRIOR.covariance)
    of_y = SEEN.T @ np.linalg.inv(SEEN_NOISE)
    covariance = np.linalg.inv(precision + of_y @ SEEN)
    return distributions.normal(covariance @ (precision @ PRIOR.mean + of_y @ Y), covariance)


def log_likelihood(x_t, x_0_hat, log_snr):
    """log p(y | x_t) = log N(y; A x̂_0, A Cov(x_0 | x_t) Aᵀ + R): a function of x̂_0 and λ."""
    del x_t

    def of_one(x_0_hat, log_snr):
        snr = jnp.exp(log_snr)
        left = jnp.linalg.inv(jnp.linalg.inv(PRIOR.covariance) + snr * jnp.eye(3))
        covariance = SEEN @ left @ SEEN.T + SEEN_NOISE
        return jax.scipy.stats.multivariate_normal.logpdf(
            jnp.asarray(Y), SEEN @ x_0_hat, covariance
        )

    return jax.vmap(of_one)(x_0_hat, jnp.asarray(log_snr))


@pytest.mark.parametrize("name", NAMES)
def test_a_likelihood_of_the_prediction_gives_the_posteriors_denoiser(name, float64):
    """At every level: the gradient of log p(y | x_t) goes through x̂_0(x_t)."""
    log_snr = np.linspace(-12.0, 12.0, 12)
    guided = guidance.by_log_prob(prior(name), log_likelihood)
    expected = posterior().denoiser(X_T, log_snr)
    np.testing.assert_allclose(predict(guided, log_snr=log_snr), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_guided_predictions_are_finite_at_the_ends_of_the_schedule(name):
    log_snr = np.repeat(np.array([-20.0, 20.0], np.float32), 6)
    for guided in (
        guidance.classifier_free(class_model(name), 3.0, rescale=0.7),
        guidance.by_log_prob(prior(name), log_likelihood),
    ):
        assert np.all(np.isfinite(predict(guided, log_snr=log_snr)))


def test_guided_samples_have_the_posteriors_moments(float64):
    """The flow is x_0 = a + B x_T: its mean a and covariance B Bᵀ, from four starts."""
    guided = guidance.by_log_prob(prior("v"), log_likelihood)
    starts = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    levels = schedules.linear_log_snr(12.0, -12.0).levels(200)
    sampler = solvers.dpm_solver_pp_2m(guided)
    ends = np.asarray(
        jax.jit(lambda: base.sample(sampler, levels, jnp.zeros_like, 4, x_T=starts).x_0)()
    )
    responses = ends[1:] - ends[0]
    truth = posterior()
    # A second-order solver at 200 steps of 0.12.
    np.testing.assert_allclose(ends[0], truth.mean, atol=0.01)
    np.testing.assert_allclose(responses.T @ responses, truth.covariance, atol=0.01)
