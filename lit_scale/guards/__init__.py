"""Guards for any Trainer and LightningModule: finite updates, reproducible randomness, preemption, safe checkpoints.

    Trainer(callbacks=[StepSeed(seed=1), FiniteGuard(), PreemptionGuard()], plugins=[SafeCheckpointIO()])

Each works without the others and without the rest of the package. None adds anything to a checkpoint.
"""

from lit_scale.guards.checkpoints import (
    CheckpointError,
    CheckpointWriteError,
    SafeCheckpointIO,
    check_writable,
    load_checkpoint,
)
from lit_scale.guards.finite import FiniteGuard, NonFiniteError
from lit_scale.guards.preemption import PreemptionGuard, shield_worker
from lit_scale.guards.step_seed import StepSeed

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "FiniteGuard",
    "NonFiniteError",
    "PreemptionGuard",
    "SafeCheckpointIO",
    "StepSeed",
    "check_writable",
    "load_checkpoint",
    "shield_worker",
]
