"""CSR against scipy, for random patterns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from tx.errors import TooLarge
from tx.tinker.wire import tensors


@given(rows=st.integers(0, 6), width=st.integers(1, 5), seed=st.integers(0, 1000), density=st.floats(0, 1))
def test_densify_agrees_with_scipy(rows, width, seed, density):
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 100, (rows, width)) * (rng.random((rows, width)) < density)
    csr = sparse.csr_array(dense)
    out = tensors.densify(
        csr.data.astype(np.int64), csr.indptr.astype(np.int64), csr.indices.astype(np.int64), [rows, width],
        "target_tokens", tensors.Budget(1000),
    )  # fmt: skip
    np.testing.assert_array_equal(out, dense)


def test_the_budget_is_shared_by_the_tensors_of_a_request():
    budget = tensors.Budget(10)
    budget.spend(6, "a")
    with pytest.raises(TooLarge, match=r"^b: "):
        budget.spend(6, "b")


def test_unlisted_cells_and_the_rows_of_listed_ones():
    crow, col = np.array([0, 1, 1, 3]), np.array([1, 0, 1])
    out = tensors.densify(np.array([5, 0, 7]), crow, col, [3, 2], "ids", tensors.Budget(6), unlisted=-1)
    assert out.tolist() == [[-1, 5], [-1, -1], [0, 7]]
    assert tensors.csr_rows(crow).tolist() == [0, 2, 2]
