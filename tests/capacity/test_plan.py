"""The planner and the sentences of the check, from made-up costs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from capacity import planner
from capacity.check_report import images_of_steps, verdicts
from capacity.chips import host_of
from capacity.compile_pool import CompileOutcome
from capacity.configs import Workload, workload_of
from capacity.fragments import cluster_fragment, serve_fragment, write_fragments
from capacity.host_costs import HostCosts
from capacity.model_names import MODEL_NAMES
from capacity.models import presets
from capacity.planner import MOST_HOSTS, Plan, plan_hosts
from capacity.program_cost import GIB
from cluster import ROOT
from cluster.cli import UserError
from cluster.config.lint import lint
from tests.capacity.test_compile_pool import COST

SIZE = (512, 512)
EVALUATIONS = 51
RATE = 3.0


@pytest.fixture(scope="module")
def workload() -> Workload:
    return workload_of(ROOT / "configs" / "sd14.yaml")


@pytest.fixture(scope="module")
def plan(workload: Workload) -> Plan:
    """Of a load as short as it may be."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(planner, "LOAD_S", 60.0)
        return plan_hosts(host_costs(), workload, EVALUATIONS, RATE, slo_s=10.0)


def host_costs(
    rows_s: float = 0.01, fixed_s: float = 0.02, large_from: int = 1000, resident: float = 2 * GIB
) -> HostCosts:
    """Steps take `fixed_s` and `rows_s` more for each row; those of `large_from` rows and more do not fit."""
    outcomes = {"encode": CompileOutcome(replace(COST, seconds=0.002))}
    for rows in (1, 2, 4, 8, 16, 32):
        cost = replace(COST, seconds=fixed_s + rows * rows_s, padded_cycles=1_000_000 * rows, shards=1)
        too_large = "Used 20.00G of 15.75G hbm." if rows >= large_from else ""
        outcomes[f"step 512x512 rows {rows}"] = CompileOutcome(None if too_large else cost, too_large)
    for images in (1, 2, 4):
        outcomes[f"decode 512x512 images {images}"] = CompileOutcome(
            replace(COST, seconds=0.05 * images, padded_cycles=0)
        )
    return HostCosts(host_of("v5litepod-4"), round(resident), outcomes)


def test_a_picture_costs_its_share_of_steps_a_decode_and_a_text(workload: Workload) -> None:
    throughputs = host_costs().throughputs(SIZE, (1, 2), EVALUATIONS, rows=2)
    assert [throughput.images for throughput in throughputs] == [1, 2]
    assert throughputs[0].image_s == pytest.approx(51 * 0.04 + 0.05 + 0.002)
    assert throughputs[1].image_s == pytest.approx(51 * 0.06 / 2 + 0.05 + 0.002)
    assert throughputs[0].padded_s == pytest.approx(51 * 2_000_000 / 4 / host_of("v5litepod-4").chip.clock)


def test_without_guidance_twice_as_many_pictures_share_a_step(workload: Workload) -> None:
    spec = replace(workload.spec, batch_buckets=(1, 2), decode_buckets=(1, 2))
    workload = replace(workload, spec=spec)
    assert images_of_steps(workload, rows=2) == (1, 2)
    assert images_of_steps(workload, rows=1) == (1, 2, 4)
    assert [throughput.images for throughput in host_costs().throughputs(SIZE, (1, 2, 4), EVALUATIONS, rows=1)] == [
        1,
        2,
        4,
    ]


def test_what_does_not_fit_is_reported_with_the_largest_bucket_that_does(workload: Workload) -> None:
    sentences = verdicts(host_costs(large_from=16), workload)
    assert any("step 512x512 rows 16 does not fit: Used 20.00G of 15.75G" in sentence for sentence in sentences)
    assert sentences[-1] == "v5litepod-4: at 512x512 the largest of batch_buckets that fits is 4."
    assert verdicts(host_costs(), workload) == []


def test_what_fits_alone_may_not_fit_beside_the_weights(workload: Workload) -> None:
    sentences = verdicts(host_costs(resident=16 * GIB), workload)
    assert "16.00 GiB with all that lies beside it, of 15.75" in sentences[0]
    assert sentences[-1] == "v5litepod-4: at 512x512 no bucket fits."


@pytest.mark.slow
def test_the_fewest_hosts_that_meet_the_target(plan: Plan, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.simulated is not None
    assert plan.hosts >= RATE / plan.images_s
    assert plan.simulated.percentile(95) <= 10.0 and not plan.simulated.refused
    assert plan.dollars_hour == pytest.approx(plan.hosts * 4 * 1.20)
    assert plan.slots == 2 * plan.buckets[-1]
    monkeypatch.setattr(planner, "LOAD_S", 60.0)
    tighter = plan_hosts(host_costs(), workload, EVALUATIONS, RATE, slo_s=4.0)
    assert tighter.hosts > plan.hosts


@pytest.mark.slow
def test_larger_buckets_than_pay_are_left_out(workload: Workload) -> None:
    """Where a row costs the same in any bucket but the largest, which is slower."""
    host = host_costs(rows_s=0.01, fixed_s=0.0)
    slow = replace(COST, seconds=1.0)
    host = HostCosts(host.host, host.resident, {**host.outcomes, "step 512x512 rows 32": CompileOutcome(slow)})
    assert plan_hosts(host, workload, EVALUATIONS, 0.1, slo_s=60).buckets[-1] < 16


def test_a_target_that_nothing_can_meet_says_why(workload: Workload) -> None:
    assert (
        "a picture takes 2.09 s alone, more than the 1 s"
        in plan_hosts(host_costs(), workload, EVALUATIONS, 1.0, 1.0).why_not
    )
    assert plan_hosts(host_costs(large_from=1), workload, EVALUATIONS, 1.0, 5.0).why_not == "its programs do not fit"
    assert plan_hosts(host_costs(), workload, EVALUATIONS, 1e4, 5.0).why_not == f"{MOST_HOSTS} hosts are not enough"


def merged(base: Any, change: Any) -> Any:
    """Mappings by key; lists of mappings by name, or by place."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}
    if isinstance(base, list) and isinstance(change, list) and all(isinstance(item, dict) for item in base + change):
        result = list(base)
        for place, item in enumerate(change):
            index = next((i for i, old in enumerate(base) if "name" in item and old.get("name") == item["name"]), place)
            result[index] = merged(result[index], item)
        return result
    return change


@pytest.mark.slow
def test_the_fragments_make_files_that_the_linter_accepts(plan: Plan, workload: Workload, tmp_path: Path) -> None:
    folder = write_fragments(plan, workload, RATE, tmp_path)
    for name, base in (("serve_config.yaml", "configs/sd14.yaml"), ("cluster.yaml", "cluster.yaml")):
        fragment = yaml.safe_load((folder / name).read_text())
        whole = merged(yaml.safe_load((ROOT / base).read_text()), fragment)
        (tmp_path / name).write_text(yaml.safe_dump(whole))
    findings = lint([tmp_path / "serve_config.yaml", tmp_path / "cluster.yaml"])
    errors = [finding for finding in findings if finding.error]
    assert not errors, [str(error) for error in errors]
    serve, cluster = serve_fragment(plan, workload, RATE), cluster_fragment(plan)
    (application,) = serve["applications"]
    assert application["deployments"][0]["autoscaling_config"]["min_replicas"] == plan.hosts
    assert cluster["available_node_types"]["ray_tpu"]["node_config"]["acceleratorType"] == "v5litepod-4"


def test_a_config_with_a_mistake_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("applications: 3\n")
    with pytest.raises(UserError):
        workload_of(tmp_path / "a.yaml")


@pytest.mark.slow
def test_a_short_name_is_written_as_a_config_can_load_it(plan: Plan, workload: Workload) -> None:
    from app.builders import locate

    for short in MODEL_NAMES:
        named = replace(workload, spec=replace(workload.spec, model=short))
        (application,) = serve_fragment(plan, named, RATE)["applications"]
        assert locate(application["args"]["model"])
    assert set(presets()) < set(MODEL_NAMES)
