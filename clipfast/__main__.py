"""``python -m clipfast``, which is also what ``torchrun -m clipfast`` starts on every rank."""

from clipfast.cli import app

app(prog_name="clipfast")
