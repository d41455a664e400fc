"""The outcomes of diffusers' tests with our UNets beside the stock run: counts, differences, verdicts, and a page.

A verdict comes from the first entry of ``verdicts.json`` whose patterns match the test, the mode and the error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VERDICTS = Path(__file__).parent / "verdicts.json"
NEEDS_HUB = re.compile(
    "traffic has been disabled|OfflineModeIsEnabled|huggingface.co|to have a file named|fully cached"
)
UNJUDGED, BUG = "unjudged", "BUG"
Tests = Mapping[str, Mapping[str, Any]]  # test -> outcome, error, quantized, left; as the plugin writes them


def read_verdicts(file: Path = VERDICTS) -> list[dict[str, str]]:
    """Entries of "verdict" and "reason", with regular expressions "test", "mode" and "error" (default: any)."""
    entries: list[dict[str, str]] = json.loads(file.read_text())
    return entries


def needs_hub(test: Mapping[str, Any]) -> bool:
    """True if a test failed for want of a download."""
    return test["outcome"] == "failed" and bool(NEEDS_HUB.search(test["error"]))


def counts(tests: Tests) -> dict[str, int]:
    """The number of tests of each outcome, that need the hub, and in which at least one UNet was quantized."""
    numbers = dict(Counter("hub" if needs_hub(test) else test["outcome"] for test in tests.values()))
    return {"tests": len(tests), **numbers, "with_quantized": sum(bool(t.get("quantized")) for t in tests.values())}


def differences(stock: Tests, ours: Tests, mode: str, verdicts: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The tests whose outcome is not that of the stock run, each with a verdict and its reason."""
    rows = []
    for name in {**stock, **ours}:
        before, after = (tests.get(name, {"outcome": "not run"}) for tests in (stock, ours))
        if before["outcome"] != after["outcome"]:
            error = after.get("error", "")
            verdict, reason = _verdict(name, mode, error or after["outcome"], verdicts)
            row = {"test": name, "mode": mode, "stock": before["outcome"], "ours": after["outcome"]}
            rows.append(row | {"error": error, "verdict": verdict, "reason": reason})
    return rows


def _verdict(test: str, mode: str, error: str, verdicts: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    for entry in verdicts:
        facts = {"test": test, "mode": mode, "error": error}
        if all(re.search(entry.get(name, ""), fact) for name, fact in facts.items()):
            return entry["verdict"], entry["reason"]
    return UNJUDGED, ""


def is_clean(report: Mapping[str, Any]) -> bool:
    """True if no difference is a bug or without a verdict."""
    rows = [row for module in report["modules"].values() for row in module["differences"]]
    return not any(row["verdict"] in (UNJUDGED, BUG) for row in rows)


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown: a row for each module, the verdicts with their reasons, a row for each difference."""
    machine = report["environment"]
    modules = report["modules"]
    rows = [row for module in modules.values() for row in module["differences"]]
    lines = [
        "# diffusers' own tests with our UNets",
        "",
        f"`make upstream DIFFUSERS=<checkout>` wrote this page on {machine['date']}: tests of diffusers "
        f"{report['tests_version']}, library versions {_listed(machine['versions'])}, {machine['cpu_model']}, "
        f"{machine['threads']} thread. Tests that need the hub are left out of passed and failed.",
        "",
        "| module | mode | passed | failed | skipped | need the hub | with quantized UNets | differ from stock |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, module in modules.items():
        for mode, numbers in module["counts"].items():
            differ = sum(row["mode"] == mode for row in module["differences"])
            cells = [numbers.get(outcome, 0) for outcome in ("passed", "failed", "skipped", "hub", "with_quantized")]
            lines.append(_row([name, mode, *cells, "" if mode == "stock" else differ]))
    lines += ["", "| verdict | reason | quantized | fused |", "|---|---|---|---|"]
    kinds = dict.fromkeys((row["verdict"], row["reason"]) for row in rows)
    for kind in kinds:
        found = Counter(row["mode"] for row in rows if (row["verdict"], row["reason"]) == kind)
        lines.append(_row([*kind, found["quantized"], found["fused"]]))
    lines += ["", "| test | mode | stock | ours | error | verdict |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(_row([row["test"], row["mode"], row["stock"], row["ours"], row["error"][:100], row["verdict"]]))
    return "\n".join([*lines, ""])


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _row(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
