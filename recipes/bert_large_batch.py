"""BERT with large batches (You et al., ICLR 2020): LAMB with 16 times the batch, the same data in 1/16 of the steps.

python recipes/bert_large_batch.py                        # the technique, on Python's own sources
python recipes/bert_large_batch.py --compare              # and AdamW with the small batch, on as many samples
python recipes/bert_large_batch.py --large_batch.optimizer own --large_batch.lr null      # AdamW, scaled by sqrt
"""

from lit_scale.callbacks import LargeBatch
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM

if __name__ == "__main__":
    run_recipe(
        BertMLM,
        TextDataModule,
        technique=LargeBatch,
        defaults={
            "trainer.max_epochs": 1,
            "trainer.limit_train_batches": 3_200,  # of one device: the length of a run whose sides differ in steps
            "trainer.callbacks": [{"class_path": "lit_scale.callbacks.GradientNoiseScale"}],
            "large_batch.times": 16,
            "large_batch.lr": 0.03,
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
