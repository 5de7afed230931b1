"""The clock: the cost of a run in FLOPs and in reference seconds, which do not depend on the load of the machine."""

from lit_scale.cost.meter import CostMeter, charge, charge_run, resident_peak
from lit_scale.cost.record import hardware, versions, write_json

__all__ = ["CostMeter", "charge", "charge_run", "hardware", "resident_peak", "versions", "write_json"]
