"""The command line that all scripts share: their help is their module's docstring, as it is written."""

from __future__ import annotations

import argparse


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """An empty parser; ``description`` keeps its lines."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
