"""``python -m retrograd.cli``."""

from retrograd.cli import app

app()
