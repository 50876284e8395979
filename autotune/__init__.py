"""The tuner: finds the mapping of a kernel that is fastest on a device, and right.

Not filled yet. Here belong `space` (the mappings of a kernel), `probe` (what a device can do), `measure` (worker
processes), `search`, `records` (what was measured, in SQLite) and `tuner`.

Imports `ir`, `passes`, `codegen` and `costmodel`.
"""
