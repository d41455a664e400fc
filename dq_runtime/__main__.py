"""``python -m dq_runtime`` is the command ``dq-runtime``."""

from __future__ import annotations

from dq_runtime.cli.app import app

if __name__ == "__main__":
    app(prog_name="dq-runtime")
