"""The argument parser of all scripts: the help text is the module's docstring, with its line breaks."""

from __future__ import annotations

import argparse


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """An empty parser; the help keeps the line breaks of ``description``."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
