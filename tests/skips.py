"""A pytest plugin: `--no-skips-but REASONS` fails a run that skipped a test for any other reason.

CI installs what the tests need, so a skip there is a claim that nobody checked. REASONS are separated by semicolons.
"""

import pytest

OPTION = "--no-skips-but"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, metavar="REASONS", help="fail if a test was skipped for another reason; '' expects none")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexpected_reasons(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason in unexpected_reasons(config):
        terminalreporter.line(f"UNEXPECTED SKIP: {reason}", red=True)


def unexpected_reasons(config: pytest.Config) -> list[str]:
    expected = config.getoption(OPTION)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if expected is None or reporter is None:  # a worker of pytest-xdist has no reporter
        return []
    patterns = [pattern.strip() for pattern in expected.split(";") if pattern.strip()]
    reasons = {report.longrepr[2] for report in reporter.stats.get("skipped", [])}
    return sorted(reason for reason in reasons if not any(pattern in reason for pattern in patterns))
