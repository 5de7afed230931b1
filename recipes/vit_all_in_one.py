"""ViT with three techniques at once: progressive stacking, resolution growing and dynamic sparsity.

python recipes/vit_all_in_one.py                         # the three techniques, on scikit-learn's scanned digits
python recipes/vit_all_in_one.py --compare               # and the same run without them, side by side
python recipes/vit_all_in_one.py --data.source 'shards/train-{000..009}.tar' --trainer.max_steps 20000
"""

from lit_scale.callbacks import DynamicSparsity, ProgressiveStacking, ResolutionGrowing
from lit_scale.cli import run_recipe
from lit_scale.datamodules import ImageDataModule
from lit_scale.models import ViTClassifier

if __name__ == "__main__":
    run_recipe(
        ViTClassifier,
        ImageDataModule,
        technique=[ProgressiveStacking, ResolutionGrowing, DynamicSparsity],
        defaults={
            "trainer.max_steps": 600,
            "progressive_stacking.stages": [[0.0, 0.5], [0.5, 1.0]],
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
