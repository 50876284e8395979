"""A graph of fixed sizes, run with little between its kernels.

Between two products of matrices Python finds nothing of its own left in the caches, and what takes it 5 µs elsewhere
takes 50 there. So the first call of a graph is recorded: what the graph makes on its way gets a place in the arena,
views of that are made once, and a kernel is left with one call, whose arguments are filled in but for the addresses of
what comes from outside. Whatever is not foreseen, another layout of an input or a call from within a call, goes the
general way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from ..codegen.runtime import thread_count
from .arena import Arena, Plan
from .partition import Region
from .record import Record, Recorder
from .region import RegionCall

ARENA = Arena()


class Fixed:
    """A graph of fixed sizes as a callable of its inputs.

    ``products`` are kernels for products that torch has too: which of the two runs is raced when the graph is recorded.
    ``general`` is the same graph, for what is not foreseen.
    """

    def __init__(
        self,
        gm: GraphModule,
        calls: Sequence[tuple[Region, RegionCall]],
        products: Sequence[tuple[Region, RegionCall]],
        general: Callable[..., Any],
        plan: Plan,
    ) -> None:
        self.gm = gm
        self.calls = [call for _, call in calls]
        self.products = {region.nodes[0]: call for region, call in products}
        self.general = general
        self.plan = plan
        self.refused = False
        self._own = threading.local()

    def __call__(self, *args: Any) -> Any:
        if ARENA.busy or self.refused:
            return self.general(*args)
        ARENA.busy = True
        try:
            record: Record | None = getattr(self._own, "record", None)
            if record is None or record.memory is not ARENA.memory:
                return self._record(args)
            if record.fits(args):
                return record.run(record.kept, thread_count(), *args)
        finally:
            ARENA.busy = False
        return self.general(*args)

    def _record(self, args: Sequence[Any]) -> Any:
        recorder = Recorder(self.gm, self.calls, self.products, self.plan, ARENA.of(self.plan.bytes), args)
        results = recorder.results()
        self.refused = recorder.surprised
        self._own.record = recorder.record
        return results
