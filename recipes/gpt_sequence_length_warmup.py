"""GPT with sequence-length warm-up (Li et al., NeurIPS 2022): an eighth of the length at first, doubled three times.

python recipes/gpt_sequence_length_warmup.py                          # the technique, on Python's own sources
python recipes/gpt_sequence_length_warmup.py --compare                # and the same run without it, side by side
python recipes/gpt_sequence_length_warmup.py --data.corpus my_text/ --model.depth 12 --trainer.max_steps 20000
"""

from lit_scale.callbacks import SequenceLengthWarmup
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import GPT

if __name__ == "__main__":
    run_recipe(
        GPT,
        TextDataModule,
        technique=SequenceLengthWarmup,
        defaults={
            "trainer.max_steps": 600,
            "model.depth": 4,
            "model.width": 128,
            "model.num_heads": 4,
            "model.positions": "rotary",
            "model.init_std": 0.05,  # GPT-2's 0.02 is for 768 channels and more; scaled by 1 / sqrt(width)
            "model.lr": 2e-3,
            "data.mask_rate": 0.0,
            "data.sequence_length": 512,
            "data.batch_size": 4,
            "data.max_val_sequences": 128,
        },
    )
