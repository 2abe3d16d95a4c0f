"""``python -m clipfast``, which is also what ``torchrun -m clipfast`` starts on every rank."""

import signal

# Ctrl-C while commands are still being imported ends the process without a traceback
_handler = signal.getsignal(signal.SIGINT)
if _handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from clipfast.cli import app  # noqa: E402

if _handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, _handler)
app(prog_name="clipfast")
