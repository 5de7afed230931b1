"""BERT whose masks join later (Liao et al., EMNLP 2022): masked positions run through the last quarter of the blocks.

python recipes/bert_mask_later.py                                   # the technique, on Python's own sources
python recipes/bert_mask_later.py --compare                         # and the same run without it, side by side
python recipes/bert_mask_later.py --compare --data.mask_rate 0.4    # more masks, of which it saves more
"""

from lit_scale.callbacks import MaskLater
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM

if __name__ == "__main__":
    run_recipe(
        BertMLM,
        TextDataModule,
        technique=MaskLater,
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
