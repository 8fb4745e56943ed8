"""The last word of a golden run: `golden: n passed, m not built` (cases, each in float64 and float32)."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    cases: dict[str, set[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "golden":
                    cases.setdefault(str(value), set()).add(outcome)
    if not cases:
        return
    missing = sorted(case for case, outcomes in cases.items() if outcomes == {"skipped"})
    failed = sorted(case for case, outcomes in cases.items() if outcomes & {"failed", "error"})
    if missing:
        terminalreporter.write_line(f"not yet built: {', '.join(sorted({case.split('/')[0] for case in missing}))}")
    for case in failed:
        terminalreporter.write_line(f"golden case failed: {case.partition('/')[2]}")
    passed = len(cases) - len(missing) - len(failed)
    terminalreporter.write_line(f"golden: {passed} passed, {len(missing)} not built")
