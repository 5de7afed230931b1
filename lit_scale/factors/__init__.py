"""What reaches into any model or run, one part for each factor of a run's cost.

    steps x samples x tokens x blocks x weights x bytes

A part knows how to lower its factor; a callback decides when and how much.
"""
