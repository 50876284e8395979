"""What a mapping will cost, before it is run.

`features` are read off footprint, device and mapping; `model` learns how far above the roofline a mapping lies; `data/`
holds rows of measured kernels and the model trained on them, which `shipped` reads.

Imports `ir`.
"""
