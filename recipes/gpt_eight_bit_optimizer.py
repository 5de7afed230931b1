"""GPT with 8-bit AdamW (Dettmers et al., ICLR 2022): each moment of the optimizer is stored in one byte.

python recipes/gpt_eight_bit_optimizer.py                          # the technique, on Python's own sources
python recipes/gpt_eight_bit_optimizer.py --compare                # and the same run with 32-bit state, side by side
python recipes/gpt_eight_bit_optimizer.py --data.corpus my_text/ --model.width 768 --model.depth 12
"""

from lit_scale.callbacks import EightBitOptimizer
from lit_scale.cli import run_recipe
from lit_scale.datamodules import TextDataModule
from lit_scale.models import GPT

if __name__ == "__main__":
    run_recipe(
        GPT,
        TextDataModule,
        technique=EightBitOptimizer,
        defaults={
            "trainer.max_steps": 300,
            "model.depth": 6,
            "model.width": 256,  # so that embeddings and vectors, whose state stays in 32 bits, are below 2%
            "model.num_heads": 8,
            "model.positions": "rotary",
            "model.init_std": 0.035,  # GPT-2's 0.02 is for 768 channels and more; scaled by 1 / sqrt(width)
            "model.lr": 1e-3,
            "data.mask_rate": 0.0,
            "data.sequence_length": 512,
            "data.batch_size": 4,
            "data.max_val_sequences": 128,
        },
    )
