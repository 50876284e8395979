"""The printers: a tile program in, source text out, deterministic and readable; and what runs it.

`targets` says which there are. For CPUs: `cpp` and its layers with `tile.h`, `compiler` and `build` (the cache of
libraries), `runtime` (arguments checked, calls). For GPUs: `triton` and its layers, `triton_build` (cross-compiling,
resources, launches), `triton_interpret` and its process. `standalone` prints a file that needs no castile.

Imports `ir`.
"""
