"""`python -m castile` is the `castile` command."""

from castile.cli.main import main

if __name__ == "__main__":
    main()
