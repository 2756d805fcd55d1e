"""The command line, one module per verb; a verb imports what it needs when it is called.

app        the verbs put together        terminal   errors, JSON, progress
options    options that verbs share
"""

import sys


def main() -> None:
    """Entry point of ``qoq``: runs a verb and leaves with its status (130 after Ctrl-C)."""
    try:
        from qoq.cli.app import app

        app(prog_name="qoq")
    except KeyboardInterrupt:
        sys.exit(130)
