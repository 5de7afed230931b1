"""Modules that change models and runs, at least one for each factor of a run's cost.

    steps x samples x tokens x blocks x weights x bytes

A module can lower its factor in any network or run; a callback decides when and by how much.
"""
