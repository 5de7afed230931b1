"""ViT with importance sampling (Katharopoulos and Fleuret 2018): a third of each large batch, sampled by gradient norm.

python recipes/vit_importance_sampling.py                    # scanned digits, about nine in ten are zeros
python recipes/vit_importance_sampling.py --compare          # and the same run without it, side by side
python recipes/vit_importance_sampling.py --task text        # BERT on Python's own sources
"""

from lit_scale.callbacks import ImportanceSampling
from lit_scale.cli import run_recipe
from lit_scale.datamodules import ImageDataModule, TextDataModule
from lit_scale.models import BertMLM, ViTClassifier

IMAGES = {
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
}
TEXT = {
    "trainer.max_steps": 1_000,
    "model.depth": 8,
    "model.width": 128,
    "model.num_heads": 4,
    "model.positions": "rotary",
    "model.init_std": 0.05,  # BERT's 0.02 at width 768, scaled by 1 / sqrt(width)
    "model.lr": 1e-3,
    "data.sequence_length": 64,
    "data.batch_size": 16,
    "data.max_val_sequences": 1024,
}

if __name__ == "__main__":
    run_recipe(
        ViTClassifier,
        ImageDataModule,
        technique=ImportanceSampling,
        defaults=IMAGES,
        tasks={"text": (BertMLM, TextDataModule, TEXT)},
    )
