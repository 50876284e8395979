"""The algebra: pure functions `Cascade -> Cascade`, listed in one flat pipeline.

`count` counts passes over each rank, `separate` and `stabilise` derive fewer, `predicate` reads Iverson brackets,
`fuse` and `tile` group Einsums into kernels and map them.

Imports `ir`.
"""
