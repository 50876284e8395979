"""What a mapping will cost, before it is run.

Not filled yet. Here belong `features` (footprint, device, compile-time resources), `model` (a learned model over an
analytic roofline) and `data/` (rows of profiled runs, per device).

Imports `ir`.
"""
