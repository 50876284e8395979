"""The printers: a tile program in, source text out, deterministic and readable.

Not filled yet. Here belong `triton` (Triton for GPUs), `cpp` with `tile.h` (C++17 for CPUs) and `runtime`
(build cache, launch, argument checks).

Imports `ir`.
"""
