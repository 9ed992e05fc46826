"""What fits, what is said where something does not, and how many hosts a load needs, from made-up prices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from capacity.check import verdicts
from capacity.chips import host_of
from capacity.configs import Asked, asked_of
from capacity.hosts import Priced
from capacity.models import presets
from capacity.plan import MOST_HOSTS, cluster_fragment, plan, serve_fragment, write_fragments
from capacity.price import GIB
from capacity.pricing import Outcome
from capacity.served import NAMES
from cluster import ROOT
from cluster.cli import UserError
from cluster.config.lint import lint
from tests.capacity.test_pricing import PRICE

SIZE = (512, 512)
EVALUATIONS = 51


@pytest.fixture(scope="module")
def asked() -> Asked:
    return asked_of(ROOT / "configs" / "sd14.yaml")


def priced(rows_s: float = 0.01, fixed_s: float = 0.02, large_from: int = 1000, resident: float = 2 * GIB) -> Priced:
    """Steps take `fixed_s` and `rows_s` more for each row; those of `large_from` rows and more do not fit."""
    outcomes = {"encode": Outcome(replace(PRICE, seconds=0.002))}
    for rows in (1, 2, 4, 8, 16, 32):
        price = replace(PRICE, seconds=fixed_s + rows * rows_s, padded_cycles=1_000_000 * rows, shards=1)
        too_large = "Used 20.00G of 15.75G hbm." if rows >= large_from else ""
        outcomes[f"step 512x512 rows {rows}"] = Outcome(None if too_large else price, too_large)
    for images in (1, 2, 4):
        outcomes[f"decode 512x512 images {images}"] = Outcome(replace(PRICE, seconds=0.05 * images, padded_cycles=0))
    return Priced(host_of("v5litepod-4"), round(resident), outcomes)


def test_a_picture_costs_its_share_of_steps_a_decode_and_a_text(asked: Asked) -> None:
    rates = priced().rates(SIZE, (1, 2), EVALUATIONS, rows=2)
    assert [rate.images for rate in rates] == [1, 2]
    assert rates[0].image_s == pytest.approx(51 * 0.04 + 0.05 + 0.002)
    assert rates[1].image_s == pytest.approx(51 * 0.06 / 2 + 0.05 + 0.002)
    assert rates[0].padded_s == pytest.approx(51 * 2_000_000 / 4 / host_of("v5litepod-4").chip.clock)


def test_what_does_not_fit_is_told_with_the_largest_bucket_that_does(asked: Asked) -> None:
    said = verdicts(priced(large_from=16), asked)
    assert any("step 512x512 rows 16 does not fit: Used 20.00G of 15.75G" in one for one in said)
    assert said[-1] == "v5litepod-4: at 512x512 the largest of batch_buckets that fits is 4."
    assert verdicts(priced(), asked) == []


def test_what_fits_alone_may_not_fit_beside_the_weights(asked: Asked) -> None:
    said = verdicts(priced(resident=16 * GIB), asked)
    assert "16.00 GiB with all that lies beside it, of 15.75" in said[0]
    assert said[-1] == "v5litepod-4: at 512x512 no bucket fits."


def test_the_fewest_hosts_that_meet_the_target(asked: Asked) -> None:
    rate = 3.0
    found = plan(priced(), asked, EVALUATIONS, rate, slo_s=10.0)
    assert found.simulated is not None
    assert found.hosts >= rate / found.images_s
    assert found.simulated.percentile(95) <= 10.0 and not found.simulated.refused
    assert found.dollars_hour == pytest.approx(found.hosts * 4 * 1.20)
    assert found.slots == 2 * found.buckets[-1]
    tighter = plan(priced(), asked, EVALUATIONS, rate, slo_s=4.0)
    assert tighter.hosts > found.hosts


def test_larger_buckets_than_pay_are_left_out(asked: Asked) -> None:
    """Where a row costs the same in any bucket but the largest, which is slower."""
    host = priced(rows_s=0.01, fixed_s=0.0)
    slow = replace(PRICE, seconds=1.0)
    host = Priced(host.host, host.resident, {**host.outcomes, "step 512x512 rows 32": Outcome(slow)})
    assert plan(host, asked, EVALUATIONS, 0.1, slo_s=60).buckets[-1] < 16


def test_a_target_that_nothing_can_meet_says_why(asked: Asked) -> None:
    assert "a picture takes 2.09 s alone, more than the 1 s" in plan(priced(), asked, EVALUATIONS, 1.0, 1.0).why_not
    assert plan(priced(large_from=1), asked, EVALUATIONS, 1.0, 5.0).why_not == "its programs do not fit"
    assert plan(priced(), asked, EVALUATIONS, 1e4, 5.0).why_not == f"{MOST_HOSTS} hosts are not enough"


def merged(base: Any, change: Any) -> Any:
    """Mappings by key; lists of mappings by name, or by place."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}
    if isinstance(base, list) and isinstance(change, list) and all(isinstance(one, dict) for one in base + change):
        found = list(base)
        for place, one in enumerate(change):
            at = next((i for i, old in enumerate(base) if "name" in one and old.get("name") == one["name"]), place)
            found[at] = merged(found[at], one)
        return found
    return change


def test_the_fragments_make_files_that_the_linter_accepts(asked: Asked, tmp_path: Path) -> None:
    found = plan(priced(), asked, EVALUATIONS, 3.0, slo_s=10.0)
    folder = write_fragments(found, asked, 3.0, tmp_path)
    for name, base in (("serve_config.yaml", "configs/sd14.yaml"), ("cluster.yaml", "cluster.yaml")):
        fragment = yaml.safe_load((folder / name).read_text())
        whole = merged(yaml.safe_load((ROOT / base).read_text()), fragment)
        (tmp_path / name).write_text(yaml.safe_dump(whole))
    errors = [one for one in lint([tmp_path / "serve_config.yaml", tmp_path / "cluster.yaml"]) if one.error]
    assert not errors, [str(one) for one in errors]
    serve, cluster = serve_fragment(found, asked, 3.0), cluster_fragment(found)
    (application,) = serve["applications"]
    assert application["deployments"][0]["autoscaling_config"]["min_replicas"] == found.hosts
    assert cluster["available_node_types"]["ray_tpu"]["node_config"]["acceleratorType"] == "v5litepod-4"


def test_a_config_with_a_mistake_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("applications: 3\n")
    with pytest.raises(UserError):
        asked_of(tmp_path / "a.yaml")


def test_a_short_name_is_written_as_a_config_can_load_it(asked: Asked) -> None:
    from app.builders import locate

    found = plan(priced(), asked, EVALUATIONS, 1.0, slo_s=10.0)
    for short in NAMES:
        named = replace(asked, served=replace(asked.served, model=short))
        (application,) = serve_fragment(found, named, 1.0)["applications"]
        assert locate(application["args"]["model"])
    assert set(presets()) < set(NAMES)
