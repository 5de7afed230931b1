"""BERT with three techniques at once: progressive stacking, token dropping and dynamic sparsity.

python recipes/bert_all_in_one.py                        # the three techniques, on Python's own sources
python recipes/bert_all_in_one.py --compare              # and the same run without them, side by side
python recipes/bert_all_in_one.py --token_dropping.keep 0.5 --data.corpus my_text/
"""

from lit_scale.callbacks import DynamicSparsity, ProgressiveStacking, TokenDropping
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM

if __name__ == "__main__":
    run_recipe(
        BertMLM,
        TextDataModule,
        technique=[ProgressiveStacking, TokenDropping, DynamicSparsity],
        defaults={
            "trainer.max_steps": 1_000,
            "token_dropping.keep": 0.25,
            "token_dropping.before": 2,  # the blocks that stacking begins with learn little from a quarter
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
