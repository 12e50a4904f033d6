"""Every setting with its default. A config of a data set starts from here and says what differs.

Override any of them on the command line, as in `--config.train.batch_size=64`. The config is
locked: a name that is not listed here is an error.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The settings that all experiments share, locked: a name that is not here is an error."""
    config = ConfigDict(
        {
            "seed": 0,
            "data": _data(),
            "schedule": _schedule(),
            "model": _model(),
            "decoder": _decoder(),
            "train": _train(),
            "devices": _devices(),
            "profile": _profile(),
            "evaluate": _evaluate(),
            "sample": _sample(),
            "quality": _quality(),
            "variance": _variance(),
            "analytic": _analytic(),
            "sigma": _sigma(),
            "spacing": _spacing(),
        }
    )
    return config.lock()


def _data() -> dict:
    return {
        # digits or photos (both embedded), folder (of image files), npz or idx (arrays, MNIST's
        # format), or any image set of tensorflow-datasets, such as cifar10.
        "name": "digits",
        # The folder or file of the three formats; or where tensorflow-datasets looks (empty: its
        # default directory).
        "data_dir": "",
        # What each split is called: a tensorflow-datasets expression, or the name of a subfolder or
        # of a .npz file. Embedded sets and idx have their own.
        "splits": {"train": "train", "validation": "validation", "test": "test"},
        # Images are cropped to their largest centred square, and resized to this side with
        # antialiasing: a folder's, and those of tensorflow-datasets (0: as they are).
        "image_size": 0,
        # Of a folder: 3 for colour or 1 for grey.
        "channels": 3,
        # Leave out images that cannot be read, and say how many. Finding them decodes every one.
        "skip_corrupt": False,
        # Of a folder or npz that is not split: the share that becomes validation, and again test.
        "held_out": 0.1,
        "split_seed": 0,
        # Whether training reads batches ahead from disk (always), holds the set on the device
        # (never), or chooses by its decoded size (auto). The order is the same.
        "stream": "auto",
        "memory_limit_mb": 1024,
        # Processes that decode a streamed set (0: a thread), and batches that each is ahead.
        "workers": 4,
        "prefetch": 2,
        # Mirror training images left to right, each with probability ½.
        "flip": False,
    }


def _schedule() -> dict:
    return {
        # Which of the groups below is used: linear_beta, cosine, sigmoid, linear_log_snr, betas or
        # learned.
        "name": "linear_beta",
        # T: noisy levels, in training and in the bound. A table of native_timesteps β's is respaced
        # to a smaller T, and to a larger one interpolated: for iDDPM's cosine of 4000, set both.
        "num_timesteps": 1000,
        "linear_beta": {"native_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
        "cosine": {"native_timesteps": 1000, "offset": 0.008},
        "sigmoid": {"native_timesteps": 1000, "start": -3.0, "end": 3.0, "temperature": 1.0},
        "linear_log_snr": {"max": 10.0, "min": -10.0},
        "betas": {"betas": ()},  # an explicit table
        # A monotone network between two ends, trained for the least variance of the loss; the ends
        # stay where they are, or are trained by the bound.
        "learned": {"max": 10.0, "min": -10.0, "features": 64, "train_ends": False},
    }


def _model() -> dict:
    return {
        "name": "unet",
        # What the network predicts: eps, x_0, v or score.
        "parameterization": "eps",
        # Σ_θ: beta_tilde (the posterior's variance), beta (the forward step's), learned_range
        # (between the two, iDDPM's) or learned_diagonal; learned ones double the network's output.
        "variance": "beta_tilde",
        # Whether the network is given each example's label.
        "class_conditional": False,
        # What the network computes in where it is trained: float32 or bfloat16. Parameters, norms
        # and losses are in float32, and so is all of an evaluation and of sampling.
        "dtype": "float32",
        # Compute each block again for the gradient rather than keep what it made: less memory.
        "remat": False,
        "unet": {
            "channels": 128,
            "channel_multipliers": (1, 2, 2, 2),
            "num_res_blocks": 2,
            "attention_resolutions": (16,),
            "dropout": 0.1,
            "num_groups": 32,
            # Channels sin(2ⁿ π x), cos(2ⁿ π x) beside the image for each n given; () as in DDPM.
            "fourier_exponents": (),
            # What the embedding is fed: log_snr (linear in it; any schedule, any T), or
            # ddpm_timestep (t − 1 on the schedule's native levels, as DDPM's own network).
            "noise_input": "log_snr",
        },
    }


def _decoder() -> dict:
    return {
        # discretized_gaussian (DDPM) or categorical (VDM).
        "name": "discretized_gaussian",
        # Grey levels as data: endpoints (x/127.5 − 1 for bytes) or midpoints (2(k + ½)/K − 1).
        "scaling": "endpoints",
        # σ_1²: beta_tilde (β̃_2) or beta (β_1).
        "discretized_gaussian": {"variance": "beta_tilde"},
        "categorical": {},
    }


def _train() -> dict:
    return {
        # simple (DDPM's L_simple), vlb (the bound), hybrid (iDDPM's, for a learned Σ_θ), or a
        # weighting over log-SNRs: min_snr, truncated, p2, sigmoid.
        "objective": "simple",
        "hybrid": {"vlb_weight": 0.001},
        "min_snr": {"gamma": 5.0},
        "p2": {"k": 1.0, "gamma": 1.0},
        "sigmoid": {"bias": 2.0},
        # The loss at the T levels (discrete), or as T → ∞ (continuous).
        "time": "discrete",
        # How t is drawn within a batch: uniform, stratified, or importance (stratified, over
        # probabilities that follow the last ten losses at each t).
        "timesteps": "stratified",
        # The probability with which a training label is withheld, so that one class-conditional
        # network is an unconditional one too (Ho and Salimans 2022).
        "label_dropout": 0.1,
        "batch_size": 128,
        # Into how many parts a batch is taken apart, one after another, for want of memory.
        "accumulate": 1,
        # Training steps that an accelerator is given at once; it divides every `_every`.
        "steps_per_dispatch": 1,
        "num_steps": 1000,
        "optimizer": "adam",  # or adamw
        "learning_rate": 2e-4,
        "schedule_learning_rate": 1e-2,  # of a learned schedule, by Adam, constant
        "beta2": 0.999,
        "weight_decay": 0.0,  # adamw only
        "warmup_steps": 0,
        "decay": "constant",  # or cosine, to zero at num_steps
        "gradient_clip": 1.0,  # global norm; 0: none
        "ema_decay": 0.9999,  # approached as (1 + step)/(10 + step)
        # Work directory of another run whose best EMA weights to start from. Not a resume.
        "init_from": "",
        "log_every": 100,
        # Checkpoint, quick bound on validation (which chooses the best checkpoint), and samples.
        "checkpoint_every": 1000,
        "sample_every": 1000,
        "sample_timesteps": 100,
        "keep_checkpoints": 3,
        # Timesteps per example of the quick bound, the same ones at every check.
        "validation_timesteps": 16,
        # Steps whose loss, gradient or new parameters are not finite that a run may leave out,
        # before such a step stops it.
        "skip_nonfinite": 0,
        # Settings that may differ from those of the run that is resumed, by name, as in
        # ("train.learning_rate",); what changed at which step goes to config_changes.jsonl.
        "allow_changes": (),
    }


def _devices() -> dict:
    return {
        # Over how many devices parameters and optimizer state are split in training; 1: each has
        # all of them. An evaluation or samples take the parameters, in float32, whole on each.
        "fsdp": 1,
    }


def _profile() -> dict:
    """A trace of some training steps, for TensorBoard or Perfetto; num_steps = 0: none.

    The first step is counted from where the run begins, or goes on.
    """
    return {"first_step": 10, "num_steps": 0}


def _evaluate() -> dict:
    return {
        "split": "test",
        "checkpoint": "best",  # best (on validation) or latest
        "batch_size": 64,  # examples at once
        "chunk_size": 16,  # timesteps at once, for each of them
        # Timesteps per example at which the noise is drawn twice, to measure the Monte-Carlo error.
        "replicates": 32,
        # Σ_θ of the bound; empty: the model's own. beta_tilde, beta, analytic_isotropic or
        # analytic_diagonal (worked out from errors on the training data), or the learned one.
        "variance": "",
        # Of a class-conditional model: the bound on log p(x | y) given each example's label y, or
        # with labels withheld that on log p(x).
        "labels": True,
        # 0: the full sum over t. Else the Monte-Carlo error (bits/dim) to reach with a few
        # timesteps per example, drawn where the noise is; and the most network evaluations to
        # spend on it (0: no limit), of which a pilot takes twice `pilot` an example.
        "target": 0.0,
        "max_evaluations": 0,
        "pilot": 4,
        # More to report of the same checkpoint: continuous (the bound as T → ∞), k_sample (the
        # importance-weighted bound of K trajectories), ode (the flow's likelihood), quality
        # (of samples as `sample` draws them).
        "also": (),
        "k_sample": {"num_samples": 8, "num_timesteps": 50},
        "ode": {
            "num_steps": 0,  # 0: adaptive, to the tolerance; else a fixed grid of so many steps
            "tolerance": 1e-5,
            "max_steps": 1000,
            "method": "tsit5",  # or heun, dopri8
            "trace": "hutchinson",  # or exact: one derivative a dimension
            "probes": 2,
            # noise: through the model's first latent and decoder; uniform: over a pixel's bin.
            "dequantization": "noise",
        },
    }


def _sample() -> dict:
    return {
        "num_samples": 64,
        "batch_size": 64,
        "checkpoint": "best",
        # Levels to step through; 0: all T of the schedule. Which ones: uniform (in the schedule's
        # time), quadratic, log_snr, karras, or bound_optimal (found by --experiment=spacing).
        "num_timesteps": 0,
        "spacing": "uniform",
        "karras": {"rho": 7.0},
        # ancestral, ddim (deterministic at eta = 0), euler, heun (order 2, two evaluations a step),
        # dpm_solver_pp_2m, dpm_solver_pp_3m (and dpm_solver_pp_3m_published, with the paper's
        # coefficients, of order 2), dpm_solver_pp_2m_sde, unipc, adaptive (the probability flow by
        # diffrax, each sample to a tolerance, and so reproducible to a tolerance only) or langevin
        # (annealed).
        "sampler": "ancestral",
        "ddim": {"eta": 0.0},
        # churn: how far each step first raises the noise, as a share (Karras's S_churn over the
        # number of steps), where churn_min <= sigma/alpha <= churn_max.
        "euler": _churn(),
        "heun": _churn(),
        "unipc": {"order": 2, "variant": "bh2"},
        "adaptive": {"tolerance": 1e-5, "max_steps": 1000, "method": "tsit5"},
        # Moves at each level, and the signal-to-noise ratio of each.
        "langevin": {"num_steps": 10, "snr": 0.3},
        # Langevin moves before each step of any sampler; 0: none.
        "corrector": {"num_steps": 0, "snr": 0.16},
        "variance": "",  # Σ_θ of ancestral sampling, as in `evaluate`
        "x_0_treatment": "none",  # or clip, or dynamic (Imagen's thresholding)
        # Of a class-conditional model: the classes to sample, in turn; (): all of them.
        "labels": (),
        "guidance": {
            "scale": 1.0,  # classifier-free; 1: the conditional model, 0: the unconditional one
            "min_log_snr": -100.0,  # where it acts
            "max_log_snr": 100.0,
            "rescale": 0.0,  # Lin et al.'s, from 0 to 1
            "scales": (0.0, 1.0, 2.0, 4.0, 8.0),  # of the picture that `also` may ask for
        },
        # More to make, each with a picture: inpaint, interpolate, encode (of test images, to noise
        # and back), guidance (several scales), sweep (quality by sampler and number of steps).
        "also": (),
        "inpaint": {
            "known": "left",  # or right, top, bottom, border; or a .npy file, true where known
            "num_samples": 4,  # of each image
            "num_timesteps": 100,
            "num_resamplings": 10,
        },
        "interpolate": {"columns": 9, "num_timesteps": 100},
        "encode": {"num_timesteps": 100, "iterations": 3},
        "sweep": {"samplers": (), "num_timesteps": (5, 10, 20, 50, 100)},  # (): every sampler
        # Rows and columns of the strips that show x_t on its way.
        "strip_rows": 4,
        "strip_columns": 11,
    }


def _churn() -> dict:
    return {"churn": 0.0, "churn_min": 0.0, "churn_max": 1e9, "churn_noise": 1.0}


def _quality() -> dict:
    """Of sample quality, in a sweep and where `evaluate.also` names it."""
    return {
        "features": "",  # classifier (small, trained on first use) or pixels; empty: as fits
        "split": "train",  # what samples are held against
        "num_samples": 1000,
        "neighbors": 3,  # of precision and recall
        # Kernel distance, precision and recall compare at most so many samples with as many data.
        "max_pairs": 10000,
        "classifier": {"seed": 0, "num_steps": 600, "batch_size": 128, "learning_rate": 3e-3},
    }


def _variance() -> dict:
    """Of --experiment=variance: what each estimator of the bound costs."""
    return {
        "split": "test",
        "checkpoint": "best",
        "examples": 64,  # the first of the split
        "draws": 256,  # timesteps of each, where an estimator takes one
        "num_samples": 4,  # K of the K-sample bound
        "num_timesteps": 100,  # T of the Gaussian in closed form
    }


def _analytic() -> dict:
    """Of an analytic Σ_θ: how the network's errors are measured on the training split."""
    return {
        "levels": 65,  # noise levels, equally spaced over the schedule, both ends included
        "examples": 1000,  # at most, from anywhere in the split
    }


def _sigma() -> dict:
    """Of --experiment=sigma: the bound of one network by T and Σ_θ."""
    return {
        "num_timesteps": (10, 25, 50, 100, 1000),
        "split": "test",
        "checkpoint": "best",
        "draws": 2,  # independent noises of each example and t; their spread is the error told
    }


def _spacing() -> dict:
    """Of --experiment=spacing: the bound of one network by number of levels and their spacing."""
    return {
        "num_timesteps": (10, 25, 50),
        "candidates": 1000,  # levels, equally spaced over the schedule, that the best are among
        "variance": "",  # Σ_θ, as in `evaluate`
        "split": "test",
        "checkpoint": "best",
        "draws": 2,  # as in `sigma`
    }
