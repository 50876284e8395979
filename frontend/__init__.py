"""PyTorch: a `torch.compile` backend, and what it reads.

Not filled yet. Here belong `fx` (ATen graphs to cascades), `sdpa` (attention calls) and `backend`.

Imports everything but `cli`. The only package that may use SymPy, which comes with torch.
"""
