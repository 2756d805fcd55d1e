"""``python -m qoq``."""

from qoq.cli import main

if __name__ == "__main__":
    main()
