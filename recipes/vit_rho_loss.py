"""ViT with RHO-loss (Mindermann et al. 2022): the half of each double batch whose loss can be reduced most.

python recipes/vit_rho_loss.py                               # scanned digits, a fifth with a wrong class
python recipes/vit_rho_loss.py --compare                     # and the same run without it, side by side
python recipes/vit_rho_loss.py --rho_loss.irreducible other.ckpt

A small model is trained first, on the fifth of the images that the run does not use; it estimates the irreducible loss.
"""

from lit_scale.callbacks import RhoLoss
from lit_scale.cli import run_recipe
from lit_scale.datamodules import ImageDataModule
from lit_scale.models import ViTClassifier

if __name__ == "__main__":
    run_recipe(
        ViTClassifier,
        ImageDataModule,
        technique=RhoLoss,
        defaults={
            "trainer.max_steps": 600,
            "rho_loss.share": 0.5,  # better than the paper's 0.1 at equal FLOPs, see docs/rho_loss.md
            "model.depth": 4,
            "model.width": 64,
            "model.num_heads": 4,
            "model.patch_size": 4,
            "model.init_std": 0.07,  # ViT's 0.02 at width 768, scaled by 1 / sqrt(width)
            "model.lr": 1e-3,
            "data.label_noise": 0.2,
            "data.part": [0.0, 0.8],
            "data.val_fraction": 0.2,
            "data.max_val_images": 2_000,
            "data.augmentation": "none",
            "data.image_size": 16,
            "data.batch_size": 16,
        },
        first=(
            "rho_loss.irreducible",
            {
                "data.part": [0.8, 1.0],
                "model.depth": 2,
                "model.width": 32,
                "model.init_std": 0.1,
                "trainer.callbacks": "null",  # those of the command line are meant for the run itself
            },
        ),
    )
