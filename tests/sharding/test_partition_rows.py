"""Plain jit with rows on several devices: halos, and what is gathered instead."""

import pytest
from cases import any_implementation
from jax.sharding import PartitionSpec as P
from meshes import CONTRACTIONS, MESH, assert_right, dense, make_mesh, sent

# Rows on several devices.

# Each of 16 rows, to a number of rows that four devices divide too.
ROWS = {
    "same": {},
    "strided": {"window_strides": (2, 1)},
    "dilated": {"rhs_dilation": (2, 1)},
    "strided and dilated": {"window_strides": (2, 2), "rhs_dilation": (2, 1)},
    "valid": {"padding": "VALID", "rhs_dilation": (2, 1)},
    "cropped": {"padding": [(-2, 0), (0, 0)]},
    "input dilated": {"padding": [(2, 1), (1, 1)], "lhs_dilation": (2, 1)},
}


@pytest.mark.parametrize("more", list(ROWS.values()), ids=list(ROWS))
def test_sharded_rows_exchange_halos_only(more):
    case = dense("rows", (2, 16, 6, 8), (3, 3, 2, 12), groups=4, **more)
    specs = (P(None, "data"), P(), P(None, "data"))
    row = 4 * 2 * 6 * 8
    for contraction in CONTRACTIONS:
        found = sent(case, contraction, MESH, specs)
        halos = [c for c in found if c.kind == "collective-permute"]
        assert 1 <= len(halos) <= 3
        # A kernel that reaches over 5 rows needs 4 of the neighbours', and as the blocks of the
        # output shift against those of the input, a few more.
        assert sum(c.nbytes for c in halos) <= (7 if case.out[1] == 12 else 4) * row
        others = [c.kind for c in found if c not in halos]
        assert others == (["all-reduce"] if contraction == "wgrad" else [])
    assert_right(case, MESH, specs)


@pytest.mark.parametrize("more", list(ROWS.values()), ids=list(ROWS))
def test_rows_that_the_axis_does_not_divide(more):
    case = dense("uneven rows", (2, 18, 6, 8), (3, 3, 2, 12), groups=4, **more)
    assert_right(case, MESH, (P(None, "data"), P(), P(None, "data")))


@any_implementation
def test_rows_columns_and_groups_sharded_together(implementation):
    mesh = make_mesh(rows=2, columns=2, group=2)
    case = dense("an image in tiles", (2, 8, 6, 8), (3, 3, 2, 12), groups=4)
    tiles = P(None, "rows", "columns", "group")
    kernel = P(None, None, None, "group")
    assert {c.kind for c in sent(case, "fprop", mesh, (tiles, kernel, tiles))} == {
        "collective-permute"
    }
    assert_right(case, mesh, (tiles, kernel, tiles), implementation)


def test_a_halo_from_beyond_the_neighbour():
    case = dense("far", (1, 16, 4, 4), (7, 1, 1, 4), groups=4, rhs_dilation=(2, 1))
    mesh = make_mesh(data=8)
    rows = P(None, "data")
    # Six rows before and six after, from three devices on each side.
    halos = sent(case, "fprop", mesh, (rows, P(), rows))
    assert [c.kind for c in halos] == ["collective-permute"] * 6
    assert_right(case, mesh, (rows, P(), rows))


def test_rows_over_axes_in_another_order_than_the_mesh():
    case = dense("crosswise", (1, 16, 4, 4), (3, 3, 1, 4), groups=4)
    rows = P(None, ("group", "data"))
    assert_right(case, MESH, (rows, P(), rows))


def test_rows_out_of_step_with_their_dilation_are_gathered():
    # Blocks of three output rows begin at rows of the input and at gaps between them, in turn.
    more = {"padding": [(0, -1), (1, 1)], "lhs_dilation": (2, 1)}
    case = dense("out of step", (1, 8, 4, 4), (3, 3, 1, 4), groups=4, **more)
    mesh, specs = make_mesh(data=4), (P(None, "data"), P(), P(None, "data"))
    assert "all-gather" in {c.kind for c in sent(case, "fprop", mesh, specs)}
    assert_right(case, mesh, specs)
