"""The engine on devices that dispatch in every way a real one may, on a virtual clock: it costs the device next to
nothing, and what it measures is right. benchmarks/device_modes.py measures the same in real time."""

import pytest

from benchmarks.device_modes import figures_of, modes, started
from benchmarks.paced import Pace

PACES = {name: pace for name, pace in modes(quick=False).items() if pace.cold == 1 and not pace.hiccup_s}
CHANGING = {name: pace for name, pace in modes(quick=False).items() if name not in PACES}


@pytest.mark.parametrize("pace", PACES.values(), ids=PACES)
def test_warm_up_measures_the_device(pace: Pace) -> None:
    pipeline = started(pace, virtual=True)
    assert pipeline.dispatch_cost.blocks == pace.blocks
    if not pace.blocks:
        assert pipeline.dispatch_cost.host_s == pytest.approx(pace.host_s)
    for rows in pipeline.row_buckets:
        assert pipeline.step_s[pipeline.size, rows] == pytest.approx(pace.step(rows))
        assert pipeline.launch_s[pipeline.size, rows] == pytest.approx(pace.launch_s + pace.blocks * pace.host_s)


@pytest.mark.parametrize("name", [*PACES, *CHANGING])
def test_lone_requests_and_full_queues_take_what_the_bare_verbs_take(name: str) -> None:
    pace = (PACES | CHANGING)[name]
    figures = figures_of(name, pace, tries=3, virtual=True)
    for figure in figures:
        assert figure.met, figure.ratios
