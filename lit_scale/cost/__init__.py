"""The clock: what a run costs in FLOPs and in reference seconds, whatever the machine did meanwhile."""

from lit_scale.cost.meter import CostMeter, charge, charge_run, resident_peak
from lit_scale.cost.record import hardware, versions, write_json

__all__ = ["CostMeter", "charge", "charge_run", "hardware", "resident_peak", "versions", "write_json"]
