"""Counting collectives in optimized HLO, written by hand in the forms in which XLA writes it."""

import pytest

from benchmarks.hlo_collectives import Collective, Total, collectives, group_size, num_bytes, totals

HLO = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %row = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%row), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %all-reduce.1)
}

%inner_cond (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %while.2 = (s32[], /*index=1*/f32[8,4]{1,0}) while(%p), condition=%inner_cond, body=%inner, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %all-gather.1 = bf16[2,16]{1,0} all-gather(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
}

%outer_cond (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%i, %n), direction=LT
}

%unused (p: f32[8,4]) -> f32[8,4] {
  ROOT %all-reduce.9 = f32[8,4]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

%branch (p: f32[8,4]) -> f32[8,4] {
  ROOT %all-to-all.1 = (f32[2]{0}, f32[2]{0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

ENTRY %main_spmd (param.1: f32[8,4]) -> f32[8,4] {
  %param.1 = f32[8,4]{1,0} parameter(0), metadata={op_name="all-reduce(x)"}
  %while.1 = (s32[], f32[8,4]{1,0}) while(%init), condition=%outer_cond, body=%outer, \
backend_config={"known_trip_count":{"n":"2"}}
  %both = f32[8,4]{1,0} conditional(%which, %l, %r), branch_computations={%branch, %add}
  %grads = (f32[8,768]{1,0}, /*index=1*/pred[]) all-reduce(%g, %flag), replica_groups=mesh['data'=8,'tp'=1] {'data'}
  %alone = f32[64]{0} all-reduce(%h), replica_groups=mesh['data'=8,'tp'=1] {'tp'}, to_apply=%add
  %scatter = f32[10]{0} reduce-scatter(%g), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  %moved = u8[100]{0} collective-permute(%g), source_target_pairs={{0,1},{1,0}}
  ROOT %sum.1 = f32[8,4]{1,0} fusion(%alone, %both), kind=kLoop, calls=%add
}
"""


def test_every_collective_once_per_run_of_its_computation():
    assert collectives(HLO) == [
        Collective("all-reduce", 8 * 4 * 4, 8, 2 * 3),
        Collective("all-gather", 2 * 16 * 2, 4, 2),
        Collective("all-to-all", 2 * 2 * 4, 2),
        Collective("all-reduce", 8 * 768 * 4 + 1, 8),
        Collective("reduce-scatter", 10 * 4 * 2, 2),  # of the operand, twice what is left of it
        Collective("collective-permute", 100, 8),
    ]


def test_sums_by_kind():
    assert totals(HLO) == {
        "all-reduce": Total(7, 6 * 128 + 24577, (6 * 128 + 24577) * 2 * 7 / 8),
        "all-gather": Total(2, 2 * 64, 2 * 64 * 3 / 4),
        "all-to-all": Total(1, 16, 16 / 2),
        "reduce-scatter": Total(1, 80, 80 / 2),
        "collective-permute": Total(1, 100, 100),
    }


def test_bytes_of_shapes():
    assert num_bytes("(f32[8,128]{1,0}, bf16[4])") == 4104
    assert num_bytes("(f32[8,8]{1,0:T(8,128)}, /*index=5*/pred[3], s32[])") == 256 + 3 + 4
    assert num_bytes("f8e4m3fn[16]{0}") == 16
    assert num_bytes("token[]") == 0


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=2,'tp'=4] {'tp'}", 4),
        ("mesh['data'=2,'tp'=4] {'data','tp'}", 8),
        ("mesh['data'=1,'tp'=8] {'tp':(4)2}", 2),
    ],
)
def test_group_sizes(groups, size):
    assert group_size(f"  %x = f32[4] all-reduce(%y), channel_id=1, replica_groups={groups}, to_apply=%add", 8) == size


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="not known"):
        group_size("  %x = f32[4] all-reduce(%y), replica_groups=@somewhere", 8)
    with pytest.raises(ValueError, match="all-gather-start"):
        collectives("ENTRY %main (p: f32[4]) -> f32[8] {\n  %s = (f32[4], f32[8]) all-gather-start(%p)\n}\n")
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("HloModule empty\n")
