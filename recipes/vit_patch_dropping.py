"""ViT with patch dropping (FLIP, Li et al. 2023): a quarter of the patches, then a short training on all of them.

python recipes/vit_patch_dropping.py                         # the technique, on scikit-learn's scanned digits
python recipes/vit_patch_dropping.py --compare               # and the same run without it, side by side
python recipes/vit_patch_dropping.py --patch_dropping.fraction 0.5 --patch_dropping.tune 0.2
"""

from lit_scale.callbacks import PatchDropping
from lit_scale.cli import run_recipe
from lit_scale.datamodules import ImageDataModule
from lit_scale.models import ViTClassifier

if __name__ == "__main__":
    run_recipe(
        ViTClassifier,
        ImageDataModule,
        technique=PatchDropping,
        defaults={
            "trainer.max_steps": 600,
            "patch_dropping.fraction": 0.75,  # better than 0.5 at equal FLOPs, see docs/patch_dropping.md
            "model.depth": 6,
            "model.width": 128,
            "model.num_heads": 4,
            "model.patch_size": 4,
            "model.init_std": 0.05,  # ViT's 0.02 at width 768, scaled by 1 / sqrt(width)
            "model.lr": 1e-3,
            "data.image_size": 32,
            "data.batch_size": 32,
        },
    )
