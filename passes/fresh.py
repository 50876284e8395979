"""Names that nothing has yet."""

from __future__ import annotations


def fresh(base: str, taken: set[str]) -> str:
    """The base itself, or with the least number from 2 on that makes it a new name; it is ``taken`` from then on."""
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}{number}"
    taken.add(name)
    return name
