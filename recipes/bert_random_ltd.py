"""BERT with random-LTD (Yao et al. 2022): each middle block runs on a random subset of the tokens, which grows to all.

python recipes/bert_random_ltd.py                                   # the technique, on Python's own sources
python recipes/bert_random_ltd.py --compare                         # and the same run without it, side by side
python recipes/bert_random_ltd.py --random_ltd.keep 0.5 --random_ltd.until 1.0 --random_ltd.stages 1  # half, throughout
"""

from lit_scale.callbacks import RandomLTD
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM

if __name__ == "__main__":
    run_recipe(
        BertMLM,
        TextDataModule,
        technique=RandomLTD,
        defaults={
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
        },
    )
