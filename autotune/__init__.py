"""The tuner: finds the mapping of a kernel that is fastest on a device, and right.

`space` (the mappings of a kernel), `probe` (what a device can do), `measure` and `worker` (processes of their own),
`search` and `surrogate`, `records` (what was measured, in SQLite) and `exchange` (its other forms), `tuner`, and
`offline` for devices that are not here.

Imports `ir`, `passes`, `codegen` and `costmodel`.
"""
