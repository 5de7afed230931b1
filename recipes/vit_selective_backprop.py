"""ViT with selective backprop (Jiang et al. 2019): half of every second batch in the second half, by large losses.

python recipes/vit_selective_backprop.py                     # scanned digits, about nine in ten are zeros
python recipes/vit_selective_backprop.py --compare           # and the same run without it, side by side
python recipes/vit_selective_backprop.py --selective_backprop.start 0 --selective_backprop.interrupt 0
"""

from lit_scale.callbacks import SelectiveBackprop
from lit_scale.cli import run_recipe
from lit_scale.datamodules import ImageDataModule
from lit_scale.models import ViTClassifier

if __name__ == "__main__":
    run_recipe(
        ViTClassifier,
        ImageDataModule,
        technique=SelectiveBackprop,
        defaults={
            "trainer.max_steps": 1_500,
            "model.depth": 4,
            "model.width": 64,
            "model.num_heads": 4,
            "model.patch_size": 4,
            "model.init_std": 0.07,  # ViT's 0.02 at width 768, scaled by 1 / sqrt(width)
            "model.lr": 1e-3,
            "data.imbalance": 100,
            "data.val_fraction": 0.2,
            "data.max_val_images": 2_000,
            "data.augmentation": "none",
            "data.image_size": 16,
            "data.batch_size": 16,
        },
    )
