"""Masked autoencoder (He et al. 2022) whose encoder runs only over the visible quarter of the patches.

python recipes/mae_masked_token_skip.py                # the technique, on scanned digits; then a probe and fine-tuning
python recipes/mae_masked_token_skip.py --compare      # and with mask tokens in the encoder, side by side
python recipes/mae_masked_token_skip.py --data.source images/ --data.image_size 224 --model.patch_size 16
"""

from lit_scale.callbacks import MaskedTokenSkip
from lit_scale.cli import run_recipe
from lit_scale.datamodules import ImageDataModule
from lit_scale.models import MaskedAutoencoder

if __name__ == "__main__":
    run_recipe(
        MaskedAutoencoder,
        ImageDataModule,
        technique=MaskedTokenSkip,
        defaults={
            "trainer.max_steps": 1_000,
            "trainer.callbacks": [
                {"class_path": "lit_scale.models.ProbeAtEnd", "init_args": {"steps": 200, "lr": 4e-3}}
            ],
            "model.architecture": "vit_tiny_patch16_224",
            "model.patch_size": 4,
            "model.depth": 4,
            "model.width": 96,
            "model.num_heads": 3,
            "model.decoder_depth": 1,
            "model.decoder_width": 64,
            "model.decoder_heads": 4,
            "model.lr": 2e-3,
            "data.source": "digits",
            "data.image_size": 32,
            "data.batch_size": 64,
        },
    )
