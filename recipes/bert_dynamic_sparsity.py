"""BERT with dynamic sparsity (RigL, Evci et al., ICML 2020): a quarter of the neurons and heads, regularly replaced.

python recipes/bert_dynamic_sparsity.py                           # the technique, on Python's own sources
python recipes/bert_dynamic_sparsity.py --compare                 # and the same run without it, side by side
python recipes/bert_dynamic_sparsity.py --dynamic_sparsity.granularity weight --dynamic_sparsity.density 0.2
"""

from lit_scale.callbacks import DynamicSparsity
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM

if __name__ == "__main__":
    run_recipe(
        BertMLM,
        TextDataModule,
        technique=DynamicSparsity,
        defaults={
            "trainer.max_steps": 1_000,
            "model.depth": 8,
            "model.width": 128,
            "model.num_heads": 4,
            "model.positions": "rotary",
            "model.init_std": 0.05,  # BERT's 0.02 at width 768, scaled by 1 / sqrt(width)
            "model.lr": 1e-3,
            "dynamic_sparsity.density": 0.25,  # in so short a run a narrow network learns as much per step
            "data.sequence_length": 64,
            "data.batch_size": 16,
            "data.max_val_sequences": 1024,
        },
    )
