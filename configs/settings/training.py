"""The settings of data, model and training."""

from configs.settings.declaration import (
    COUNT,
    COUNT_OR_NONE,
    LEVELS,
    NOT_NEGATIVE,
    POSITIVE,
    STEPS,
    STEPS_OR_NONE,
    Bool,
    Choice,
    Float,
    Group,
    Int,
    Name,
    Setting,
    Text,
    Tuple,
)


def data() -> Group:
    return Group(
        "The data set and how it is read.",
        name=Setting(
            "digits",
            Text(),
            "digits or photos (both embedded), folder (of image files), npz or idx (arrays, "
            "MNIST's format), or an image set of tensorflow-datasets, such as cifar10.",
        ),
        data_dir=Setting(
            "",
            Text(),
            "Folder or file of a folder, npz or idx set; else the directory of tensorflow-datasets "
            "(empty: its default).",
        ),
        splits=Group(
            "The name of each split: a tensorflow-datasets expression, a subfolder or the name of "
            "a .npz file. Embedded sets and idx have their own.",
            train=Setting("train", Text(), "The training split."),
            validation=Setting("validation", Text(), "The split that chooses the best checkpoint."),
            test=Setting("test", Text(), "The test split."),
        ),
        image_size=Setting(
            0,
            Int("[0, 16384]"),
            "Images of a folder or of tensorflow-datasets are cropped to their largest centred "
            "square and resized to this side with antialiasing (0: not resized).",
        ),
        channels=Setting(3, Choice(1, 3), "Of a folder: 3 for colour or 1 for grey."),
        skip_corrupt=Setting(
            False, Bool(), "Leave out unreadable images of a folder; every image is decoded once."
        ),
        held_out=Setting(
            0.1,
            Float("(0, 0.5)"),
            "Share of an unsplit folder or npz that becomes validation; the test split has the "
            "same share.",
        ),
        split_seed=Setting(0, Int("[0, 2^64)"), "Seed of that split."),
        stream=Setting(
            "auto",
            Choice("auto", "always", "never"),
            "Whether training reads batches from disk (always), holds the set on the device "
            "(never), or chooses by its decoded size (auto). The order of examples is the same.",
        ),
        memory_limit_mb=Setting(
            1024, COUNT_OR_NONE, "Decoded size in MiB above which auto streams."
        ),
        workers=Setting(
            4, Int("[0, 1024]"), "Processes that decode a streamed set (0: one thread)."
        ),
        prefetch=Setting(2, Int("[1, 1024]"), "Batches that each of them decodes in advance."),
        flip=Setting(
            False, Bool(), "Mirror training images left to right, each with probability 1/2."
        ),
    )


def schedule() -> Group:
    return Group(
        "The noise schedule of the forward process q.",
        name=Setting(
            "linear_beta",
            Choice("diffusion.schedules:SCHEDULES", "learned"),
            "Which of the groups below is used.",
        ),
        num_timesteps=Setting(
            1000,
            LEVELS,
            "T: noise levels, in training and in the bound. A table of native_timesteps values "
            "of β is respaced to a smaller T and interpolated to a larger one.",
        ),
        linear_beta=Group(
            "β rises linearly (DDPM).",
            native_timesteps=Setting(1000, LEVELS, "Length of the table of β."),
            beta_start=Setting(1e-4, Float("(0, 1)"), "β at the least noisy level."),
            beta_end=Setting(0.02, Float("(0, 1)"), "β at the noisiest level."),
        ),
        cosine=Group(
            "ᾱ is a squared cosine (iDDPM, with native_timesteps=4000).",
            native_timesteps=Setting(1000, LEVELS, "Length of the table of β."),
            offset=Setting(0.008, NOT_NEGATIVE, "The offset s, in units of time."),
        ),
        sigmoid=Group(
            "ᾱ is a sigmoid (Jabri et al. 2022).",
            native_timesteps=Setting(1000, LEVELS, "Length of the table of β."),
            start=Setting(-3.0, Float(), "Argument of the sigmoid at time 0."),
            end=Setting(3.0, Float(), "Argument of the sigmoid at time 1."),
            temperature=Setting(1.0, POSITIVE, "Both arguments are divided by it."),
        ),
        linear_log_snr=Group(
            "The log-SNR falls linearly.",
            max=Setting(10.0, Float(), "Log-SNR of the least noisy level."),
            min=Setting(-10.0, Float(), "Log-SNR of the noisiest level."),
        ),
        betas=Group(
            "An explicit table.",
            betas=Setting((), Tuple(Float("(0, 1)")), "β_1 … β_N."),
        ),
        learned=Group(
            "A monotone network between two ends, trained for the least variance of the loss.",
            max=Setting(10.0, Float(), "Log-SNR of the least noisy level, at the start."),
            min=Setting(-10.0, Float(), "Log-SNR of the noisiest level, at the start."),
            features=Setting(64, Int("[1, 10^6]"), "Logistic units of the network."),
            train_ends=Setting(
                False, Bool(), "Whether the ends are trained by the bound, or stay."
            ),
        ),
    )


def model() -> Group:
    return Group(
        "The network and what its output means.",
        name=Setting(
            "unet", Choice("experiments.harness.setup.definition:MODELS"), "Architecture."
        ),
        parameterization=Setting(
            "eps",
            Choice("diffusion.reverse:PARAMETERIZATIONS"),
            "The quantity that the network predicts.",
        ),
        variance=Setting(
            "beta_tilde",
            Choice("diffusion.variances:VARIANCES"),
            "Σ_θ: the posterior's variance (beta_tilde), the forward step's (beta), learned "
            "between these two (learned_range, iDDPM) or freely (learned_diagonal). A learned one "
            "doubles the network's output.",
        ),
        class_conditional=Setting(False, Bool(), "Whether the network receives labels."),
        dtype=Setting(
            "float32",
            Choice("float32", "bfloat16"),
            "Precision of the network in training. Parameters, norms, losses, evaluation and "
            "sampling are in float32.",
        ),
        remat=Setting(
            False, Bool(), "Recompute each block for the gradient: less memory, more arithmetic."
        ),
        unet=Group(
            "DDPM's U-Net.",
            channels=Setting(128, Int("[4, 65536]"), "Channels at full resolution."),
            channel_multipliers=Setting(
                (1, 2, 2, 2),
                Tuple(Float("[1, 1024]"), min_length=1),
                "Channels at each resolution, as multiples; each resolution is half of the one "
                "before.",
            ),
            num_res_blocks=Setting(2, Int("[1, 1000]"), "Residual blocks at each resolution."),
            attention_resolutions=Setting(
                (16,),
                Tuple(Int("[1, 16384]")),
                "Heights of the feature maps whose blocks are followed by self-attention.",
            ),
            down_attention_resolutions=Setting(
                (),
                Tuple(Int("[1, 16384]")),
                "Heights of those that have self-attention on the way down only.",
            ),
            up_attention_resolutions=Setting(
                (),
                Tuple(Int("[1, 16384]")),
                "Heights of those that have self-attention on the way up only.",
            ),
            dropout=Setting(0.1, Float("[0, 1)"), "Probability that an activation is dropped."),
            num_groups=Setting(32, Int("[1, 65536]"), "Groups of the group norms."),
            norm_epsilon=Setting(1e-6, POSITIVE, "Added to the variance in the group norms."),
            scale_shift=Setting(
                False,
                Bool(),
                "Whether the noise level scales and shifts activations (iDDPM), or is added.",
            ),
            head_channels=Setting(
                0, Int("[0, 65536]"), "Channels of an attention head; 0: a single head."
            ),
            middle_attention=Setting(
                "normalized",
                Choice("normalized", "unnormalized", "none"),
                "Attention at the lowest resolution, between down and up: after a group norm "
                "(normalized), without one, or none.",
            ),
            middle_divisor=Setting(
                1.0, POSITIVE, "Divisor of the sums that the blocks between down and up return."
            ),
            residual_resampling=Setting(
                False,
                Bool(),
                "Whether residual blocks halve and double the resolution (ADM), or convolutions.",
            ),
            symmetric_downsampling=Setting(
                False,
                Bool(),
                "Whether strided convolutions are padded on all sides, or at the bottom and right "
                "only (DDPM).",
            ),
            center_input=Setting(False, Bool(), "Whether the network receives 2 x_t − 1."),
            frequency_shift=Setting(
                1.0,
                Float("[0, 1]"),
                "s of the frequencies 10000^(−k/(channels/2 − s)) of the embedding.",
            ),
            cosines_first=Setting(
                False, Bool(), "Whether the embedding's cosines come before its sines."
            ),
            fourier_exponents=Setting(
                (),
                Tuple(Int("[0, 30]")),
                "For each entry n, channels sin(2ⁿ π x) and cos(2ⁿ π x) beside the image; "
                "() as in DDPM.",
            ),
            noise_input=Setting(
                "log_snr",
                Choice("log_snr", "ddpm_timestep"),
                "Input of the noise-level embedding: linear in the log-SNR (any schedule, any T), "
                "or t − 1 on the schedule's native levels (ddpm_timestep).",
            ),
        ),
    )


def decoder() -> Group:
    return Group(
        "The decoder p(x_0 | x_1).",
        name=Setting(
            "discretized_gaussian",
            Choice("diffusion.decoders:DECODERS"),
            "discretized_gaussian (DDPM) or categorical (VDM), for grey levels; continuous data "
            "have a Gaussian one of variance 1/SNR_1.",
        ),
        scaling=Setting(
            "endpoints",
            Choice("diffusion.decoders:SCALINGS"),
            "Grey levels as data: endpoints (x/127.5 − 1 for bytes) or midpoints (2(k + ½)/K − 1).",
        ),
        discretized_gaussian=Group(
            variance=Setting(
                "beta_tilde",
                Choice("diffusion.decoders:FIRST_VARIANCES"),
                "σ_1²: β̃_2 (beta_tilde) or β_1 (beta).",
            ),
        ),
        categorical=Group("It has no options."),
    )


def train() -> Group:
    return Group(
        "Training.",
        objective=Setting(
            "simple",
            Choice("diffusion.objectives:OBJECTIVES"),
            "simple (DDPM's L_simple), vlb (the bound), hybrid (iDDPM's, for a learned Σ_θ), or a "
            "weighting over log-SNRs.",
        ),
        hybrid=Group(vlb_weight=Setting(0.001, NOT_NEGATIVE, "Weight of the bound.")),
        min_snr=Group(gamma=Setting(5.0, POSITIVE, "SNR at which the weight is clipped.")),
        p2=Group(
            k=Setting(1.0, POSITIVE, "k of 1/(k + SNR)^gamma."),
            gamma=Setting(1.0, Float(), "gamma of 1/(k + SNR)^gamma."),
        ),
        sigmoid=Group(bias=Setting(2.0, Float(), "Shift of the log-SNR.")),
        time=Setting(
            "discrete",
            Choice("discrete", "continuous"),
            "The loss at the T levels (discrete), or as T → ∞ (continuous).",
        ),
        timesteps=Setting(
            "stratified",
            Choice("diffusion.timesteps:TIMES", "importance"),
            "How t is drawn within a batch; importance is stratified over probabilities that "
            "follow the last ten losses at each t.",
        ),
        label_dropout=Setting(
            0.1,
            Float("[0, 1]"),
            "Probability that a training label is withheld, so that a class-conditional network "
            "is an unconditional one too (Ho and Salimans 2022).",
        ),
        batch_size=Setting(128, Int("[1, 10^7]"), "Examples in a step."),
        accumulate=Setting(
            1,
            Int("[1, 10^6]"),
            "Parts of a batch that are computed one after another, for memory; those of a small "
            "network on a CPU at once, a core for each, which is faster.",
        ),
        steps_per_dispatch=Setting(
            1,
            Int("[1, 10^6]"),
            "Training steps in one call of an accelerator. It divides num_steps and every *_every.",
        ),
        num_steps=Setting(1000, STEPS, "Training steps."),
        optimizer=Setting("adam", Choice("adam", "adamw"), "The optimizer."),
        learning_rate=Setting(2e-4, NOT_NEGATIVE, "Learning rate after the warm-up."),
        schedule_learning_rate=Setting(
            1e-2, NOT_NEGATIVE, "Constant learning rate of a learned schedule, by Adam."
        ),
        beta2=Setting(0.999, Float("[0, 1)"), "Decay of Adam's second moment."),
        weight_decay=Setting(0.0, NOT_NEGATIVE, "Weight decay of adamw."),
        warmup_steps=Setting(
            0, STEPS_OR_NONE, "Steps in which the learning rate rises from 0; at most num_steps."
        ),
        decay=Setting(
            "constant",
            Choice("constant", "cosine"),
            "Learning rate after the warm-up: constant, or a cosine to 0 at num_steps.",
        ),
        gradient_clip=Setting(1.0, NOT_NEGATIVE, "Largest global norm of a gradient (0: any)."),
        ema_decay=Setting(
            0.9999,
            Float("[0, 1)"),
            "Decay of the averaged weights, approached as (1 + step)/(10 + step).",
        ),
        init_from=Setting(
            "",
            Text(),
            "Work directory of another run whose best averaged weights this run starts from; "
            "empty: random weights.",
        ),
        log_every=Setting(100, STEPS, "Steps between two lines of metrics.jsonl."),
        checkpoint_every=Setting(
            1000,
            STEPS,
            "Steps between two checkpoints, each with a quick bound on validation, which chooses "
            "the best one.",
        ),
        sample_every=Setting(1000, STEPS, "Steps between two pictures of samples."),
        sample_timesteps=Setting(100, LEVELS, "Levels that these samples step through."),
        keep_checkpoints=Setting(3, COUNT, "Latest checkpoints that are kept, beside the best."),
        validation_timesteps=Setting(
            16, LEVELS, "Timesteps per example of the quick bound, the same at every checkpoint."
        ),
        skip_nonfinite=Setting(
            0,
            STEPS_OR_NONE,
            "Steps with a loss, gradient or parameter that is not finite which a run may leave "
            "out; the next one stops it.",
        ),
        allow_changes=Setting(
            (),
            Tuple(Name()),
            "Settings that may differ from those of the resumed run, as in "
            "('train.learning_rate',) or ('data.',); config_changes.jsonl records the changes. "
            "With 'data.' a run is also measured if its training images were replaced.",
        ),
    )


def devices() -> Group:
    return Group(
        "How arrays lie on several devices.",
        fsdp=Setting(
            1,
            Int("[1, 10^6]"),
            "Devices over which parameters and optimizer state are split in training. Evaluation "
            "and sampling hold the parameters whole on each device.",
        ),
    )


def profile() -> Group:
    return Group(
        "A trace of some training steps for TensorBoard or Perfetto.",
        first_step=Setting(10, STEPS_OR_NONE, "First step, counted from the start or resumption."),
        num_steps=Setting(0, STEPS_OR_NONE, "How many steps; 0: no trace."),
    )
