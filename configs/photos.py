"""Crops, 32×32×3, of photographs that scikit-learn and scikit-image ship: nothing to download.

    python main.py --config=configs/photos.py --workdir=runs/photos

A real 8-bit, three-channel run offline: 50,000 crops of four photographs to train on, 1,000 of
another to choose the checkpoint, 2,000 of two others to test. So few photographs are no benchmark,
and the error over crops says nothing of other photographs; there are no labels and no published
results. The ends of the log-SNR and the Fourier features are VDM's for 256 levels (Kingma et al.
2021); the network is small enough for a CPU, of which two cores do some 55 images a second (80
minutes).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A narrow U-Net trained on the bound."""
    config = base.get_config()
    config.data.update(name="photos", flip=True)
    config.schedule.name = "linear_log_snr"
    config.schedule.linear_log_snr = {"max": 13.3, "min": -5.0}
    config.model.parameterization = "v"
    config.model.unet.update(
        channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        num_groups=8,
        # Periods of 2 grey levels and 1, which are 1/128 apart.
        fourier_exponents=(7, 8),
    )
    config.decoder.update(name="categorical", scaling="midpoints")
    config.train.update(
        objective="vlb",
        batch_size=128,
        num_steps=2_000,
        learning_rate=1e-3,
        warmup_steps=100,
        decay="cosine",
        ema_decay=0.995,
        log_every=50,
        checkpoint_every=500,
        sample_every=1_000,
    )
    config.evaluate.target = 0.005
    return config
