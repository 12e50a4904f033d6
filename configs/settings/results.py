"""The settings of evaluation, sampling and the other experiments."""

from configs.settings.declaration import (
    COUNT,
    COUNT_OR_NONE,
    LEVELS,
    NOT_NEGATIVE,
    POSITIVE,
    STEPS,
    Bool,
    Choice,
    Float,
    Group,
    Int,
    Setting,
    Text,
    Tuple,
)

SPLIT = Choice("train", "validation", "test")
CHECKPOINT = Choice("best", "latest")
TOLERANCE = Float("(0, 1]")
SIGMA = Choice("", "diffusion.variances:VARIANCES", "analytic_isotropic", "analytic_diagonal")
SIGMA_HELP = (
    "Empty: the model's own. analytic_isotropic and analytic_diagonal are computed from the "
    "network's errors on the training data; a learned Σ_θ needs a network trained with it."
)
SAMPLERS = "diffusion.samplers.registry:SAMPLERS"
METHODS = "diffusion.flow.ode:METHODS"


def evaluate() -> Group:
    return Group(
        "The bound on a split.",
        split=Setting("test", SPLIT, "The split."),
        checkpoint=Setting("best", CHECKPOINT, "The best checkpoint on validation, or the latest."),
        batch_size=Setting(64, Int("[1, 10^7]"), "Examples in one call of the device."),
        chunk_size=Setting(
            16, Int("[1, 10^7]"), "Timesteps of each of these examples in one call."
        ),
        replicates=Setting(
            32,
            LEVELS,
            "Timesteps per example at which the noise is drawn twice, to measure the Monte-Carlo "
            "error.",
        ),
        variance=Setting("", SIGMA, f"Σ_θ of the bound. {SIGMA_HELP}"),
        labels=Setting(
            True,
            Bool(),
            "Of a class-conditional model: the bound on log p(x | y) given labels (True), or on "
            "log p(x) with labels withheld (False).",
        ),
        target=Setting(
            0.0,
            NOT_NEGATIVE,
            "0: the full sum over t. Else the Monte-Carlo error in bits/dim to reach with a few "
            "timesteps per example, drawn where the noise is.",
        ),
        max_evaluations=Setting(
            0, Int("[0, 10^15]"), "Most network evaluations to spend on that target; 0: any number."
        ),
        pilot=Setting(
            2,
            LEVELS,
            "Timesteps per example in the pilot for that target, each with two evaluations, of at "
            "most 1000 examples.",
        ),
        also=Setting(
            (),
            Tuple(Choice("continuous", "k_sample", "ode", "quality")),
            "Further estimates for the same checkpoint: the bound as T → ∞ (continuous), the "
            "importance-weighted bound of K trajectories (k_sample), the flow's likelihood (ode), "
            "and sample quality (quality).",
        ),
        k_sample=Group(
            num_samples=Setting(8, Int("[1, 10^6]"), "K: trajectories per example."),
            num_timesteps=Setting(50, LEVELS, "T of these trajectories."),
        ),
        ode=Group(
            num_steps=Setting(0, COUNT_OR_NONE, "0: adaptive; else steps of a fixed grid, even."),
            tolerance=Setting(1e-5, TOLERANCE, "Tolerance of an adaptive solve."),
            max_steps=Setting(1000, COUNT, "Most steps of an adaptive solve."),
            method=Setting("tsit5", Choice(METHODS), "Runge-Kutta method of diffrax."),
            trace=Setting(
                "hutchinson",
                Choice("hutchinson", "exact"),
                "Trace of the Jacobian: Hutchinson's estimate, or one derivative a dimension.",
            ),
            probes=Setting(2, Int("[1, 10^6]"), "Probe vectors of Hutchinson's estimate."),
            dequantization=Setting(
                "noise",
                Choice("noise", "uniform"),
                "Through the model's first latent and decoder (noise), or uniform over a pixel's "
                "bin.",
            ),
        ),
    )


def sample() -> Group:
    return Group(
        "Samples and their pictures.",
        num_samples=Setting(64, COUNT, "How many samples."),
        batch_size=Setting(64, Int("[1, 10^7]"), "Samples in one call of the device."),
        checkpoint=Setting("best", CHECKPOINT, "The best checkpoint on validation, or the latest."),
        num_timesteps=Setting(
            0, Int("[0, 10^7]"), "Levels to step through; 0: all T of the schedule."
        ),
        spacing=Setting(
            "uniform",
            Choice("diffusion.spacing:SPACINGS", "bound_optimal"),
            "Spacing of the levels: uniform is in the schedule's time; bound_optimal is computed "
            "by --experiment=spacing.",
        ),
        karras=Group(rho=Setting(7.0, POSITIVE, "ρ of Karras et al. (2022).")),
        sampler=Setting(
            "ancestral",
            Choice(SAMPLERS),
            "ddim is deterministic at eta = 0; heun has order 2 and two evaluations a step; "
            "dpm_solver_pp_3m_published has the paper's coefficients, of order 2; adaptive solves "
            "the probability flow with diffrax, reproducible to its tolerance; langevin is "
            "annealed.",
        ),
        ddim=Group(eta=Setting(0.0, Float("[0, 1]"), "0: deterministic; 1: DDPM's noise.")),
        euler=churn(),
        heun=churn(),
        unipc=Group(
            order=Setting(2, Choice(1, 2, 3), "Order of the predictor."),
            variant=Setting("bh2", Choice("diffusion.samplers.unipc:VARIANTS"), "B(h)."),
        ),
        adaptive=Group(
            tolerance=Setting(1e-5, TOLERANCE, "Tolerance of each sample."),
            max_steps=Setting(1000, COUNT, "Most steps of the solve."),
            method=Setting("tsit5", Choice(METHODS), "Runge-Kutta method of diffrax."),
        ),
        langevin=Group(
            num_steps=Setting(10, Int("[1, 10^6]"), "Langevin moves at each level."),
            snr=Setting(0.3, Float("(0, 1)"), "Signal-to-noise ratio of each move."),
        ),
        corrector=Group(
            "Langevin moves before each step of any sampler.",
            num_steps=Setting(0, Int("[0, 10^6]"), "How many; 0: none."),
            snr=Setting(0.16, Float("(0, 1)"), "Signal-to-noise ratio of each move."),
        ),
        variance=Setting("", SIGMA, f"Σ_θ of ancestral sampling. {SIGMA_HELP}"),
        x_0_treatment=Setting(
            "none",
            Choice("diffusion.samplers.treatments:X_0_TREATMENTS"),
            "What is done to x̂_0: dynamic is Imagen's thresholding.",
        ),
        labels=Setting(
            (),
            Tuple(Int("[0, 2^31)")),
            "Of a class-conditional model: the classes to sample, in turn; (): all of them.",
        ),
        guidance=Group(
            "Classifier-free guidance.",
            scale=Setting(
                1.0, Float(), "1: the conditional model, 0: the unconditional one, above 1: guided."
            ),
            min_log_snr=Setting(-100.0, Float(), "Lowest log-SNR at which it acts."),
            max_log_snr=Setting(100.0, Float(), "Highest log-SNR at which it acts."),
            rescale=Setting(0.0, Float("[0, 1]"), "Rescaling of Lin et al. (2024)."),
            scales=Setting(
                (0.0, 1.0, 2.0, 4.0, 8.0),
                Tuple(Float(), min_length=1),
                "Scales of the picture that `also` may ask for.",
            ),
        ),
        also=Setting(
            (),
            Tuple(Choice("inpaint", "interpolate", "encode", "guidance", "sweep")),
            "Further pictures: inpainting, interpolation and encoding (to noise and back) of test "
            "images, several guidance scales, quality by sampler and number of steps (sweep).",
        ),
        inpaint=Group(
            known=Setting(
                "left",
                Text(),
                "Known part of the image: left, right, top, bottom, border, or a .npy file that is "
                "true where the image is known.",
            ),
            num_samples=Setting(4, Int("[1, 10^6]"), "Samples of each image."),
            num_timesteps=Setting(100, LEVELS, "Levels to step through."),
            num_resamplings=Setting(10, Int("[1, 10^6]"), "Times that each step is made."),
        ),
        interpolate=Group(
            columns=Setting(9, Int("[2, 10^4]"), "Images of a row, both ends included."),
            num_timesteps=Setting(100, LEVELS, "Levels to step through."),
        ),
        encode=Group(
            num_timesteps=Setting(100, LEVELS, "Levels to step through."),
            iterations=Setting(3, Int("[1, 10^6]"), "Fixed-point iterations of each step."),
        ),
        sweep=Group(
            samplers=Setting((), Tuple(Choice(SAMPLERS)), "The samplers; (): every one."),
            num_timesteps=Setting(
                (5, 10, 20, 50, 100), Tuple(LEVELS, min_length=1), "Numbers of levels."
            ),
        ),
        strip_rows=Setting(4, Int("[1, 10^4]"), "Rows of the pictures that show x_t on its way."),
        strip_columns=Setting(11, Int("[1, 10^4]"), "Columns of these pictures."),
    )


def churn() -> Group:
    return Group(
        "Each step first raises the noise (Karras et al. 2022).",
        churn=Setting(
            0.0,
            Float(f"[0, {2**0.5 - 1}]"),
            "Share by which the noise is raised: S_churn over the number of steps.",
        ),
        churn_min=Setting(0.0, NOT_NEGATIVE, "Lowest σ/α at which it is raised."),
        churn_max=Setting(1e9, NOT_NEGATIVE, "Highest σ/α at which it is raised."),
        churn_noise=Setting(1.0, NOT_NEGATIVE, "Scale of the added noise (S_noise)."),
    )


def quality() -> Group:
    return Group(
        "Sample quality, in a sweep and where `evaluate.also` names it.",
        features=Setting(
            "",
            Choice("", "experiments.harness.sampling.features:FEATURES"),
            "Features of an image: a small classifier, trained on first use, or pixels; empty: "
            "the data set's own.",
        ),
        split=Setting("train", SPLIT, "The data that samples are compared with."),
        num_samples=Setting(1000, Int("[100, 10^9]"), "How many samples."),
        neighbors=Setting(3, Int("[1, 10^6]"), "Neighbours in precision and recall."),
        max_pairs=Setting(
            10000,
            Int("[100, 10^7]"),
            "Most samples, and most data, in kernel distance, precision and recall.",
        ),
        classifier=Group(
            seed=Setting(0, Int("[0, 2^32)"), "Seed of the classifier."),
            num_steps=Setting(600, STEPS, "Training steps."),
            batch_size=Setting(128, Int("[1, 10^7]"), "Examples in a step."),
            learning_rate=Setting(3e-3, POSITIVE, "Peak learning rate."),
        ),
    )


def variance() -> Group:
    return Group(
        "--experiment=variance: the cost of each estimator of the bound.",
        split=Setting("test", SPLIT, "The split."),
        checkpoint=Setting("best", CHECKPOINT, "The best checkpoint on validation, or the latest."),
        examples=Setting(64, Int("[2, 10^9]"), "Examples: the first of the split."),
        draws=Setting(
            256, Int("[2, 10^7]"), "Timesteps of each example, where an estimator draws one."
        ),
        num_samples=Setting(4, Int("[1, 10^6]"), "K of the K-sample bound."),
        num_timesteps=Setting(100, Int("[2, 10^7]"), "T of the Gaussian in closed form."),
    )


def analytic() -> Group:
    return Group(
        "An analytic Σ_θ: the network's errors on the training split.",
        levels=Setting(
            65, Int("[2, 10^6]"), "Noise levels, equally spaced over the schedule, with both ends."
        ),
        examples=Setting(1000, COUNT, "Most examples, drawn from the whole split."),
    )


def sigma() -> Group:
    return Group(
        "--experiment=sigma: the bound of one network by T and Σ_θ.",
        num_timesteps=Setting(
            (10, 25, 50, 100, 1000),
            Tuple(Int("[2, 10^7]"), min_length=1, distinct=True),
            "The values of T.",
        ),
        split=Setting("test", SPLIT, "The split."),
        checkpoint=Setting("best", CHECKPOINT, "The best checkpoint on validation, or the latest."),
        draws=Setting(
            2,
            Int("[2, 10^6]"),
            "Independent noises of each example and t; their spread is the Monte-Carlo error.",
        ),
    )


def spacing() -> Group:
    return Group(
        "--experiment=spacing: the bound of one network by number of levels and their spacing.",
        num_timesteps=Setting(
            (10, 25, 50),
            Tuple(Int("[2, 10^7]"), min_length=1, distinct=True),
            "The numbers of levels.",
        ),
        candidates=Setting(
            1000,
            Int("[2, 10^7]"),
            "Levels, equally spaced over the schedule, from which the best are chosen.",
        ),
        variance=Setting("", SIGMA, f"Σ_θ. {SIGMA_HELP}"),
        split=Setting("test", SPLIT, "The split."),
        checkpoint=Setting("best", CHECKPOINT, "The best checkpoint on validation, or the latest."),
        draws=Setting(2, Int("[2, 10^6]"), "Independent noises of each example and t."),
    )


def compress() -> Group:
    return Group(
        "--experiment=compress: images as a file, without loss, at the rate of the bound.",
        split=Setting("test", SPLIT, "The split to compress."),
        images=Setting(
            "",
            Text(),
            "Folder of images to compress in its place, all of the model's shape; empty: none.",
        ),
        num_images=Setting(0, COUNT_OR_NONE, "How many, the first ones; 0: all."),
        decompress=Setting(
            "",
            Text(),
            "Compressed file to decompress instead, to a .npz file beside it; empty: none.",
        ),
        checkpoint=Setting("best", CHECKPOINT, "The best checkpoint on validation, or the latest."),
        order=Setting(
            "bit_swap",
            Choice("diffusion.coding:ORDERS"),
            "bit_swap codes one transition after another (13.10), and borrows about two latents an "
            "image; bb_ans codes by the posterior (13.26), and borrows all T.",
        ),
        num_timesteps=Setting(50, LEVELS, "T: noise levels, each a network evaluation an image."),
        spacing=Setting(
            "uniform",
            Choice("diffusion.spacing:SPACINGS", "bound_optimal"),
            "Spacing of the levels, as for samples.",
        ),
        variance=Setting("", SIGMA, f"Σ_θ. {SIGMA_HELP}"),
        bins_per_std=Setting(
            8.0,
            Float("[0.25, 64]"),
            "Bins of a level's grid in the least standard deviation that codes there.",
        ),
        batch_size=Setting(
            16, Int("[1, 10^6]"), "Images coded side by side; each takes initial bits."
        ),
        verify=Setting(
            True, Bool(), "Decode the file before it is written under its name, and compare."
        ),
    )


def diffusers() -> Group:
    return Group(
        "Pipelines of diffusers: --experiment=import and --experiment=export.",
        source=Setting(
            "",
            Text(),
            "What import reads: the folder of a saved pipeline, or of a UNet2DModel alone.",
        ),
        target=Setting("", Text(), "The new folder that export writes a pipeline to."),
        checkpoint=Setting("best", CHECKPOINT, "The exported checkpoint."),
    )


def report() -> Group:
    return Group(
        "--experiment=report: a page of what work directories hold.",
        file=Setting(
            "", Text(), "The page; empty: report.html in the first of the work directories."
        ),
    )
