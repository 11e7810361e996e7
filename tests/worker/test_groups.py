"""``tx.worker.groups``: which requests are refused, and how a group's rows come together."""

import numpy as np
import pytest

from tests.worker.sampler import CONTEXT, EOS, detokenize, prompt_of, request_of
from tx.errors import InvalidInput
from tx.types import SampleRequest, SamplingParams
from tx.worker.groups import Group, check


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": np.zeros(0, np.int32)}, "prompt"),
        ({"prompt": np.array([5, 2048])}, "prompt"),
        ({"prompt": np.array([-1])}, "prompt"),
        ({"prompt": np.array([1.5])}, "prompt"),
        ({"prompt": np.zeros(CONTEXT, np.int32)}, "prompt"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 10**9}, "num_samples"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({"topk_prompt_logprobs": 2049}, "topk_prompt_logprobs"),
        ({"params": SamplingParams(max_tokens=0)}, "sampling_params.max_tokens"),
        ({"params": SamplingParams(temperature=-0.1)}, "sampling_params.temperature"),
        ({"params": SamplingParams(temperature=float("nan"))}, "sampling_params.temperature"),
        ({"params": SamplingParams(temperature=float("inf"))}, "sampling_params.temperature"),
        ({"params": SamplingParams(top_p=0.0)}, "sampling_params.top_p"),
        ({"params": SamplingParams(top_p=1.1)}, "sampling_params.top_p"),
        ({"params": SamplingParams(top_k=0)}, "sampling_params.top_k"),
        ({"params": SamplingParams(top_k=-2)}, "sampling_params.top_k"),
        ({"params": SamplingParams(seed=2**63)}, "sampling_params.seed"),
        ({"params": SamplingParams(stop_token_ids=(-1,))}, "sampling_params.stop"),
        ({"params": SamplingParams(stop_strings=("",))}, "sampling_params.stop"),
    ],
)
def test_wrong_requests_name_their_field(changes, field):
    arguments = {"prompt": prompt_of(4), "num_samples": 1, "params": SamplingParams(max_tokens=1)} | changes
    with pytest.raises(InvalidInput) as caught:
        check(SampleRequest(**arguments), 2048, CONTEXT)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(seed=-(2**63), temperature=0.0, top_k=10**6, top_p=1e-9),
        SamplingParams(seed=2**63 - 1, max_tokens=10**9, stop_token_ids=(0, 10**12), stop_strings=("\n",)),
    ],
)
def test_the_ends_of_every_range_are_accepted(params):
    check(SampleRequest(prompt_of(CONTEXT - 1), 1, params), 2048, CONTEXT)
    check(SampleRequest(np.array([2047]), 4096, params, True, 2048), 2048, CONTEXT)


def group_of(request):
    return Group(7, request, None, max_context=CONTEXT, eos_token_ids=EOS, detokenize=detokenize)


def test_rows_end_one_by_one_and_the_result_has_them_in_order():
    group = group_of(request_of(prompt_of(10), 2, max_tokens=5))
    assert (group.position(1), group.last_token(1)) == (9, group.prompt[-1])
    assert not group.push(1, [5, 6], [-1.0, -2.0])
    assert (group.position(1), group.last_token(1)) == (11, 6)
    assert group.push(1, [EOS[0], 8], [-3.0, -4.0])
    assert not group.done
    assert group.push(0, [1, 2, 3, 4, 5], [-0.5] * 5)
    assert group.done
    first, second = group.result().sequences
    assert (first.tokens.tolist(), first.stop_reason) == ([1, 2, 3, 4, 5], "length")
    assert (second.tokens.tolist(), second.stop_reason) == ([5, 6, EOS[0]], "stop")
    assert second.logprobs.tolist() == [-1.0, -2.0, -3.0]


def test_a_restarted_row_forgets_its_tokens():
    group = group_of(request_of(prompt_of(10), 2, max_tokens=5))
    group.push(0, [1, 2], [-1.0, -1.0])
    group.restart(0)
    assert group.position(0) == 9
    assert group.push(0, [3, 4, 5, 6, 7], [-2.0] * 5)
    assert len(group.logprobs[0]) == 5


def test_the_limit_is_what_the_context_leaves():
    assert group_of(request_of(prompt_of(500), max_tokens=100)).limit == 12
    assert group_of(request_of(prompt_of(500))).limit == 12
    assert group_of(request_of(prompt_of(500), max_tokens=3)).limit == 3


def test_seeds_of_any_sign_become_64_bits():
    assert group_of(request_of([1], seed=-1)).seed == (2**32 - 1, 2**32 - 1)
    assert group_of(request_of([1], seed=2**40 + 5)).seed == (2**8, 5)
