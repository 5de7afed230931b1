"""The clock: FLOPs by formula, prices by replay, and no trace of either in the run that is measured."""
