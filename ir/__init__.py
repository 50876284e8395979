"""The intermediate representation: what a cascade and a tile program are, mean and look like.

Frozen values (`cascade`, `ops`, `device`, `tile`), their text form (`parse`, `print`), their rules (`verify`,
`errors`), their meaning (`evaluate`, the float64 oracle) and their cost (`footprint`).

Imports nothing of castile outside `ir`, and neither torch nor Triton.
"""
