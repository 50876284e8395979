"""PyTorch: a `torch.compile` backend, and what it reads.

`aten` and `sdpa` say what operations mean, in terms of `values`; `fx` makes a cascade of a region of a graph; `able`
says which nodes have one, `partition` which regions there are; `region` runs one; `tuning` tunes them; `rest` is what
Inductor compiles; `backend` is what `torch.compile` calls; `explain` tells what became of a model.

Imports everything but `cli`. The only package that may use SymPy, which comes with torch.
"""
