"""BERT with token dropping (Hou et al., ACL 2022): the middle blocks run on the hardest quarter of the tokens only.

python recipes/bert_token_dropping.py                               # the technique, on Python's own sources
python recipes/bert_token_dropping.py --compare                     # and the same run without it, side by side
python recipes/bert_token_dropping.py --token_dropping.keep 0.5 --token_dropping.before 0.5     # as in the paper
"""

from lit_scale.callbacks import TokenDropping
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM

if __name__ == "__main__":
    run_recipe(
        BertMLM,
        TextDataModule,
        technique=TokenDropping,
        defaults={
            "trainer.max_steps": 1_000,
            "token_dropping.keep": 0.25,  # and earlier than in the paper: see the variants in docs/token_dropping.md
            "token_dropping.before": 2,
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
