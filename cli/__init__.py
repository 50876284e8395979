"""The `castile` command: one file a subcommand, and `main`, which gathers them.

Imports everything; nothing imports it.
"""
