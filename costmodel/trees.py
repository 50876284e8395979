"""Decision trees as arrays: how a trained model is kept, checked and asked.

XGBoost makes the trees, and its loader may crash on a file that was tampered with. So none of its files is ever read:
a model is a few arrays of numbers, each checked before it is used, and NumPy walks them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import InputError, UsageError

Array = Any

# A node: the feature that it asks for, where a row goes whose feature is below ``value`` and where one goes whose
# feature is not. A leaf is its own child on both sides, and ``value`` is what it says.
NODE = np.dtype([("feature", "<i4"), ("below", "<i4"), ("above", "<i4"), ("value", "<f4")])

MOST_NODES, MOST_TREES, DEEPEST = 1 << 21, 100_000, 64

# Rows that are walked at a time.
_ROWS = 512


@dataclass(frozen=True, slots=True)
class Trees:
    """Ensembles of trees: ``nodes`` ``[N]`` of `NODE`, and for each ensemble the places of its roots and what is added
    to the sum of its leaves."""

    nodes: Array
    roots: tuple[Array, ...]
    bases: tuple[float, ...]
    depth: int

    def predict(self, rows: Array) -> Array:
        """What each ensemble says, ``[ensembles, N]``, of rows ``[N, F]``."""
        rows = np.asarray(rows, dtype=np.float32)
        found = np.empty((len(self.roots), len(rows)))
        feature, below, above, value = (np.ascontiguousarray(self.nodes[n]) for n in NODE.names or ())
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            lines = np.arange(len(part))[:, None]
            for i, (roots, base) in enumerate(zip(self.roots, self.bases, strict=True)):
                at = np.broadcast_to(roots, (len(part), len(roots)))
                for _ in range(self.depth):
                    at = np.where(part[lines, feature[at]] < value[at], below[at], above[at])
                found[i, start : start + len(part)] = base + value[at].sum(axis=1, dtype=np.float64)
        return found

    def to_bytes(self) -> bytes:
        """The roots of all ensembles, then the nodes; `trees_of` reads them."""
        places: bytes = np.concatenate(self.roots).astype("<i4").tobytes()
        return places + bytes(self.nodes.tobytes())


def trees_of(raw: bytes, counts: Sequence[int], bases: Sequence[float], features: int) -> Trees:
    """The trees of `to_bytes`: ``counts`` trees in each ensemble. Raises `InputError` for bytes that are none."""
    head = 4 * sum(counts)
    count, rest = divmod(len(raw) - head, NODE.itemsize)
    if sum(counts) > MOST_TREES or not 0 < count <= MOST_NODES or rest:
        raise InputError("the trees are of another size than is said of them")
    places = np.frombuffer(raw, "<i4", sum(counts))
    nodes = np.frombuffer(raw, NODE, count, head)
    here = np.arange(count)
    leaf = (nodes["below"] == here) & (nodes["above"] == here)
    # Children come after their parents, so that no walk returns.
    inner = (nodes["below"] > here) & (nodes["above"] > here) & (nodes["below"] < count) & (nodes["above"] < count)
    asked = (nodes["feature"] >= 0) & (nodes["feature"] < features)
    sound = np.all((leaf | inner) & asked & np.isfinite(nodes["value"])) and np.all((places >= 0) & (places < count))
    if not (sound and np.all(np.isfinite(bases))):
        raise InputError("the trees are damaged")
    ends = np.cumsum(counts)
    roots = tuple(places[end - n : end] for end, n in zip(ends, counts, strict=True))
    return Trees(nodes, roots, tuple(map(float, bases)), _depth(nodes, places, leaf))


def _depth(nodes: Array, roots: Array, leaf: Array) -> int:
    """How many questions a walk asks at most."""
    front = np.unique(roots)
    for depth in range(DEEPEST):
        front = front[~leaf[front]]
        if not len(front):
            return depth
        front = np.unique(np.concatenate([nodes["below"][front], nodes["above"][front]]))
    raise InputError("the trees are too deep", expected=f"at most {DEEPEST} questions")


def trees_from(boosters: Sequence[Any], rows: Array, said: Sequence[Array]) -> Trees:
    """The trees of XGBoost's boosters, each an ensemble. ``said`` is what they predict for ``rows``: what an ensemble
    adds to its leaves follows from it, and that the trees were understood."""
    parts: list[Array] = []
    roots: list[Array] = []
    size = 0
    for booster in boosters:
        model = json.loads(bytes(booster.save_raw("json")))["learner"]["gradient_booster"]["model"]
        places = []
        for tree in model["trees"]:
            nodes = _nodes(tree)
            for side in ("below", "above"):
                nodes[side] += size
            places.append(size)
            parts.append(nodes)
            size += len(nodes)
        roots.append(np.array(places, dtype="<i4"))
    made = Trees(np.concatenate(parts), tuple(roots), (0.0,) * len(roots), DEEPEST)
    apart = np.asarray(said, dtype=float) - made.predict(rows)
    bases = apart.mean(axis=1)
    if np.abs(apart - bases[:, None]).max(initial=0.0) > 1e-3:
        raise UsageError("this version of xgboost writes trees that castile does not understand",
                         hint="pip install 'xgboost-cpu<4'")  # fmt: skip
    return trees_of(made.to_bytes(), [len(r) for r in roots], bases.tolist(), np.asarray(rows).shape[1])


def _nodes(tree: dict[str, Any]) -> Array:
    """The nodes of one of XGBoost's trees, parents before their children."""
    left, right = np.array(tree["left_children"]), np.array(tree["right_children"])
    order, at = [0], 0
    while at < len(order):
        if left[order[at]] >= 0:
            order += [int(left[order[at]]), int(right[order[at]])]
        at += 1
    new = {old: i for i, old in enumerate(order)}
    nodes = np.zeros(len(order), NODE)
    for i, old in enumerate(order):
        leaf = left[old] < 0
        sides = (i, i) if leaf else (new[int(left[old])], new[int(right[old])])
        nodes[i] = (0 if leaf else tree["split_indices"][old], *sides, tree["split_conditions"][old])
    return nodes
