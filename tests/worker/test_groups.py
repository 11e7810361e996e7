"""``tx.worker.groups``: which requests are refused, and how a group's rows come together."""

import numpy as np
import pytest

from tests.worker.sampler import CONTEXT, EOS, detokenize, prompt_of, request_of
from tx.errors import InvalidInput
from tx.types import Cells, SampleRequest, SamplingParams
from tx.worker.groups import Group, check
from tx.worker.scoring import PromptScores


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
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs"),
        ({"topk_sample_logprobs": 1025}, "topk_sample_logprobs"),
        ({"topk_sample_logprobs": 20, "num_samples": 2048, "params": SamplingParams()}, "topk_sample_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 4}, "prompt_logprobs_last_n"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
        ({"target_prompt_logprobs": Cells(np.full((3, 2), -1))}, "target_prompt_logprobs"),
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
    longest = 512 - 4 if params.max_tokens is None else min(params.max_tokens, 512 - 4)
    check(SampleRequest(prompt_of(4), 2**24 // 1024 // longest, params, topk_sample_logprobs=1024), 2048, CONTEXT)


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


def topk_of(num_tokens, width=8, start=0):
    ids = start + np.arange(num_tokens * width, dtype=np.int64).reshape(num_tokens, width)
    return ids, -ids / 10


def test_the_best_beside_each_token_are_kept_with_it():
    request = SampleRequest(prompt_of(10), 2, SamplingParams(max_tokens=5), topk_sample_logprobs=3)
    group = group_of(request)
    group.push(1, [5, 6], [-1.0, -2.0], topk_of(2))
    group.push(0, [1, 2, 3, 4, 5], [-0.5] * 5, topk_of(5, start=100))
    group.push(1, [EOS[0], 8], [-3.0, -4.0], topk_of(2, start=1000))
    first, second = (sequence.topk for sequence in group.result().sequences)
    assert first.token_ids.shape == first.logprobs.shape == (5, 3)
    assert second.token_ids.tolist() == [[0, 1, 2], [8, 9, 10], [1000, 1001, 1002]]  # none of what follows the stop
    np.testing.assert_array_equal(second.logprobs, np.float32(-second.token_ids / 10))
    assert (second.token_ids.dtype, second.logprobs.dtype) == (np.int32, np.float32)


def test_a_restarted_row_forgets_its_best_too():
    group = group_of(SampleRequest(prompt_of(10), 1, SamplingParams(max_tokens=2), topk_sample_logprobs=1))
    group.push(0, [1], [-1.0], topk_of(1))
    group.restart(0)
    group.push(0, [2, 3], [-1.0, -1.0], topk_of(2, start=50))
    assert group.result().sequences[0].topk.token_ids.tolist() == [[50], [58]]


def test_the_best_are_absent_unless_asked_for_and_never_forgotten():
    plain = group_of(request_of(prompt_of(10), max_tokens=1))
    plain.push(0, [1], [-1.0], topk_of(1))  # another row of the batch asked
    assert plain.result().sequences[0].topk is None
    group = group_of(SampleRequest(prompt_of(10), 1, SamplingParams(max_tokens=2), topk_sample_logprobs=1))
    with pytest.raises(ValueError, match="none have come"):
        group.push(0, [1], [-1.0])


def test_the_result_has_the_prompts_scores_and_what_was_cached():
    request = request_of(prompt_of(3), prompt_logprobs=True, max_tokens=1)
    group = group_of(request)
    group.scoring.take(0, PromptScores(np.array([[[-1.0], [-2.0]]], np.float32)))
    group.cached_tokens = 2
    group.push(0, [1], [-1.0])
    result = group.result()
    np.testing.assert_array_equal(result.prompt_logprobs, np.array([np.nan, -1, -2], np.float32))
    assert result.prompt_cache_hit_tokens == 2
    assert group_of(request_of(prompt_of(3))).scoring is None


def test_the_limit_is_what_the_context_leaves():
    assert group_of(request_of(prompt_of(500), max_tokens=100)).limit == 12
    assert group_of(request_of(prompt_of(500))).limit == 12
    assert group_of(request_of(prompt_of(500), max_tokens=3)).limit == 3


def test_seeds_of_any_sign_become_64_bits():
    assert group_of(request_of([1], seed=-1)).seed == (2**32 - 1, 2**32 - 1)
    assert group_of(request_of([1], seed=2**40 + 5)).seed == (2**8, 5)
