"""ViT with resolution growing: images of half the side for half of the run, then of three quarters, then full size.

python recipes/vit_resolution_growing.py                     # the technique, on scikit-learn's scanned digits
python recipes/vit_resolution_growing.py --compare           # and the same run without it, side by side
python recipes/vit_resolution_growing.py --data.source 'shards/train-{000..009}.tar' --trainer.max_steps 20000
"""

from lit_scale.callbacks import ResolutionGrowing
from lit_scale.cli import run_recipe
from lit_scale.datamodules import ImageDataModule
from lit_scale.models import ViTClassifier

if __name__ == "__main__":
    run_recipe(
        ViTClassifier,
        ImageDataModule,
        technique=ResolutionGrowing,
        defaults={
            "trainer.max_steps": 600,
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
