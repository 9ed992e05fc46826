from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from capacity.chips import CHIPS, Host, host_of
from capacity.configs import hosts_of, workload_of
from capacity.cycles import CycleCount
from capacity.flops import FlopCount
from capacity.kernels import ASSUMED_SHARE, SHARES, bundles, loop_regions
from capacity.libtpu import pinned, version
from capacity.models import architecture_of, configurations, presets, shapes_of
from capacity.program_cost import cycles_by_part, part_of
from cluster.cli import UserError
from tests import one_file
from tests.published import CHECKPOINTS, FLOW_CHECKPOINTS, XL_CHECKPOINTS

V5E = CHIPS["v5e"]


@pytest.mark.parametrize(
    ("sold", "chip", "chips"),
    [("v4-8", "v4", 4), ("v5litepod-1", "v5e", 1), ("v5litepod-8", "v5e", 8), ("v5p-8", "v5p", 4), ("v6e-4", "v6e", 4)],
)
def test_a_host_is_named_as_google_sells_it(sold: str, chip: str, chips: int) -> None:
    host = host_of(sold)
    assert host == Host(CHIPS[chip], chips)
    assert host.accelerator_type == sold


@pytest.mark.parametrize("wrong", ["v5litepod-16", "v4-16", "v4-7", "v9-4", "v5e", "", "v6e-2"])
def test_an_unknown_host_is_refused_with_the_known_ones(wrong: str) -> None:
    with pytest.raises(ValueError, match="v4-8, v5litepod-1, v5litepod-4, v5litepod-8, v5p-8, v6e-1, v6e-4, v6e-8"):
        host_of(wrong)


def test_clocks_follow_from_peaks() -> None:
    assert {name: round(chip.clock / 1e6) for name, chip in CHIPS.items()} == {
        "v4": 1049,
        "v5e": 1503,
        "v5p": 1751,
        "v6e": 1751,
    }


def test_an_operation_belongs_to_its_innermost_scope() -> None:
    assert part_of("jit(step)/while/body/closed_call/transformer/self-attention/dot_general") == "self-attention"
    assert part_of("jit(step)/transformer/add") == "transformer"
    assert part_of("jit(step)/resnet.1/add") == part_of("") == "other"


def test_a_kernel_costs_its_padded_flops_at_70_percent_of_peak() -> None:
    count = CycleCount(
        cycles=Counter({"jit(f)/resnet/add": 1000}),
        kernels=Counter({"jit(f)/self-attention/pallas_call": 1}),
        kernel_cycles=Counter({"jit(f)/self-attention/pallas_call": 500}),
    )
    total = FlopCount(kernels={"self-attention/x": 7000.0 * V5E.flops_a_cycle})
    parts, notes = cycles_by_part(count, total, V5E, shards=1)
    assert parts == {"resnet": 1000, "self-attention": round(7000 / ASSUMED_SHARE)}
    assert notes == ["1 x kernel in self-attention beyond its padded products at 70 % of peak"]
    parts, _ = cycles_by_part(count, total, V5E, shards=2)
    assert parts["self-attention"] == round(3500 / ASSUMED_SHARE)


def test_a_kernel_costs_its_own_estimate_where_that_is_higher() -> None:
    count = CycleCount(
        kernels=Counter({"jit(f)/self-attention/k": 1}), kernel_cycles=Counter({"jit(f)/self-attention/k": 500})
    )
    parts, notes = cycles_by_part(count, FlopCount(kernels={"self-attention": 7.0 * V5E.flops_a_cycle}), V5E, shards=1)
    assert (parts, notes) == ({"self-attention": 500}, [])


def test_a_kernel_of_ours_costs_what_its_schedule_was_counted_at() -> None:
    count = CycleCount(kernels=Counter({"jit(f)/self-attention/attention-kernel-64/pallas_call": 1}))
    total = FlopCount(kernels={"self-attention/attention-kernel-64": 7000.0 * V5E.flops_a_cycle})
    parts, notes = cycles_by_part(count, total, V5E, shards=1)
    assert (parts, notes) == ({"self-attention": round(7000 / SHARES["attention-kernel-64"]["v5e"])}, [])


def test_a_kernels_bundles_are_counted_by_the_loops_around_them() -> None:
    text = """\
LB: loop body
     0   :  { %s1 = smov 0 }
   0x6 LB: > { %s2 = sadd.s32 1, %s1 }
   0x7   : >> { %v1 = vld [vmem:[#allocation2]] }
   0x8   : >> {}
   0x9   : > { %v2 = vst [vmem:[#allocation3]] }
"""
    assert bundles(text) == {0: 1, 1: 2, 2: 2}
    assert [(depth, len(lines)) for depth, lines in loop_regions(text)] == [(0, 1), (1, 1), (2, 2), (1, 1)]


def test_what_the_sum_leaves_out_is_noted() -> None:
    count = CycleCount(kernels=Counter({"k": 1}), unpriced=Counter({"all-gather": 3}), open_loops=2)
    _, notes = cycles_by_part(count, FlopCount(open_loops=1), V5E, shards=1)
    assert len(notes) == 3
    assert any("3 x all-gather" in note for note in notes)
    assert any("1 loops of unknown length" in note for note in notes)
    assert any("1 x kernel in other without a visible product" in note for note in notes)


@pytest.mark.parametrize(
    "name", ["stable-diffusion-v1-4", "stable-diffusion-v1-5", "stable-diffusion-2-1", *XL_CHECKPOINTS]
)
def test_presets_are_the_published_architectures(name: str) -> None:
    from app.diffusion.families.registry import recognise
    from app.diffusion.models.checkpoint_files import architecture

    assert name in presets()
    problems: list[str] = []
    _, ours = configurations(f"anyone/{name}", problems)
    published = (CHECKPOINTS | XL_CHECKPOINTS)[name]
    kind = recognise(published, problems)
    assert kind and architecture(kind, ours, {}, problems) == architecture(kind, published, {}, problems)
    assert kind.schedule(ours["scheduler"]) == kind.schedule(published["scheduler"])
    assert not problems


@pytest.mark.parametrize("name", FLOW_CHECKPOINTS)
def test_presets_of_flow_models_are_the_published_files(name: str) -> None:
    problems: list[str] = []
    _, ours = configurations(f"anyone/{name}", problems)
    assert {part: ours[part] for part in FLOW_CHECKPOINTS[name]} == FLOW_CHECKPOINTS[name]
    family = architecture_of(name)[1]
    assert not problems and not family.problems()


@pytest.mark.slow
def test_a_model_of_shapes_holds_no_weights() -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    checkpoint = shapes_of("demo", jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(checkpoint.networks["unet"]))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_a_model_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="one of demo, .*stable-diffusion-2-1, .*, got stable-difusion"):
        configurations("stable-difusion", [])


def test_libtpu_is_pinned_with_hashes() -> None:
    assert pinned().startswith(f"libtpu=={version()}")
    assert "--hash=sha256:" in pinned()


def test_buckets_and_steps_come_from_the_config() -> None:
    workload = workload_of(Path("configs/sd14.yaml"))
    assert workload.spec.model == "CompVis/stable-diffusion-v1-4"
    assert workload.spec.batch_buckets == (1, 2, 4, 8, 16)
    assert (workload.spec.dtype, workload.num_inference_steps, workload.guidance_scale) == ("bfloat16", 50, 7.5)
    open_defaults = workload.args.defaults.model_copy(update={"num_inference_steps": None, "guidance_scale": None})
    completed = replace(workload, args=workload.args.model_copy(update={"defaults": open_defaults}))
    assert (completed.num_inference_steps, completed.guidance_scale) == (20, 7.5)
    assert [host.accelerator_type for host in hosts_of("", Path("configs/cluster-v6e.yaml"))] == ["v6e-4"]
    assert [host.accelerator_type for host in hosts_of("v4-8, v6e-1", Path("none"))] == ["v4-8", "v6e-1"]
    with pytest.raises(UserError, match="TPU must be one host"):
        hosts_of("v5e", Path("none"))
    with pytest.raises(UserError, match="SIZE must be WIDTHxHEIGHT"):
        workload_of(Path("configs/sd14.yaml"), size="512")


def test_dollars_override_the_list() -> None:
    v5e, v6e = hosts_of("v5litepod-4,v6e-4", Path("none"), "v5e=0.5")
    assert (v5e.dollars_hour, v6e.dollars_hour) == (2.0, 4 * CHIPS["v6e"].dollars_hour)


@pytest.mark.parametrize("wrong", ["v5e", "v5e=", "v5e=-1", "v5e=nan", "v9=1", "v6e=1,v5litepod=2"])
def test_dollars_that_cannot_be_read_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="DOLLARS must be like"):
        hosts_of("v6e-4", Path("none"), wrong)


def test_one_file_is_described_by_its_header(tmp_path: Path) -> None:
    problems: list[str] = []
    file = one_file.write_one_file(tmp_path / "some.safetensors", "sd2")
    path, configs = configurations(str(file), problems)
    assert (path, problems) == (file, []) and configs["unet"]["attention_head_dim"] == [1, 2]
    assert configs["scheduler"]["prediction_type"] == "v_prediction"
