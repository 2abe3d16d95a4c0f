"""``python -m clipfast``, which is also what ``torchrun -m clipfast`` starts on every rank."""

import signal
import sys

# Ctrl-C while commands are still being imported ends the process without a traceback
_handler = signal.getsignal(signal.SIGINT)
if _handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    from clipfast.cli import app
except ModuleNotFoundError as error:
    from clipfast.installation import what_is_missing

    # in a clone, nobody has installed what clipfast needs
    if not (words := what_is_missing(error)):
        raise
    sys.exit(f"error: {words}")

if _handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, _handler)
app(prog_name="clipfast")
