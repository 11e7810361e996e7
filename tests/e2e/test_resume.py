"""Save, load, resume with the real SDK: a resumed run continues exactly where the saved one would have."""

import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.test_two_tenants import example
from tests.support.server import BASE_MODEL

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning")
"""Loading into an existing client goes away in a later SDK; today's clients still do it."""

DATA = [example(1, 9), example(2, 30)]


def step(training: tinker.TrainingClient) -> float:
    result = training.forward_backward(DATA, "cross_entropy")
    adam = types.AdamParams(learning_rate=5e-3, weight_decay=0.01, beta2=0.99, eps=1e-8)
    training.optim_step(adam).result()
    return result.result().metrics["loss:sum"]


@pytest.fixture(scope="module")
def uninterrupted(service: tinker.ServiceClient) -> tuple[list[float], tinker.TrainingClient, str]:
    """Losses of six steps, the client that made them, and its checkpoint after the third."""
    training = service.create_lora_training_client(BASE_MODEL, rank=5, seed=3, user_metadata={"why": "resume"}).result()
    losses = [step(training) for _ in range(3)]
    path = training.save_state("after-three").result().path
    losses += [step(training) for _ in range(3)]
    return losses, training, path


def test_training_is_deterministic(service, uninterrupted):
    training = service.create_lora_training_client(BASE_MODEL, rank=5, seed=3).result()
    assert [step(training) for _ in range(3)] == uninterrupted[0][:3]


def test_create_from_state_with_optimizer_continues_exactly(service, uninterrupted):
    losses, _, path = uninterrupted
    training = service.create_training_client_from_state_with_optimizer(path).result()
    assert [step(training) for _ in range(3)] == losses[3:]
    info = training.get_info()
    assert info.model_data.model_name == BASE_MODEL
    assert info.lora_rank == 5


def test_another_session_may_resume(server, uninterrupted):
    losses, _, path = uninterrupted
    with tinker.ServiceClient(base_url=server.url) as other:
        training = other.create_training_client_from_state_with_optimizer(path).result()
        assert step(training) == losses[3]


def test_load_state_with_optimizer_rewinds_the_same_client(uninterrupted):
    losses, training, path = uninterrupted
    training.load_state_with_optimizer(path).result()
    assert [step(training) for _ in range(3)] == losses[3:]


def test_without_optimizer_the_weights_come_back_and_the_moments_do_not(service, uninterrupted):
    losses, _, path = uninterrupted
    training = service.create_training_client_from_state(path).result()
    resumed = [step(training) for _ in range(3)]
    assert resumed[0] == losses[3]
    assert resumed[1:] != losses[4:]


def test_unfinished_gradients_are_not_loaded_over(service, uninterrupted):
    """Loading replaces the model whole: gradients accumulated before the load do not leak into the next step."""
    losses, _, path = uninterrupted
    training = service.create_lora_training_client(BASE_MODEL, rank=5, seed=99).result()
    training.forward_backward([example(7, 20)], "cross_entropy").result()
    training.load_state_with_optimizer(path).result()
    assert [step(training) for _ in range(3)] == losses[3:]


def test_a_named_sampler_checkpoint_keeps_its_moment(service, uninterrupted):
    _, training, _ = uninterrupted
    prompt = types.ModelInput.from_ints([5, 6, 7, 8])
    path = training.save_weights_for_sampler("moment").result().path
    before = service.create_sampling_client(model_path=path).result().compute_logprobs(prompt).result()
    step(training)
    after = service.create_sampling_client(model_path=path).result().compute_logprobs(prompt).result()
    live = training.save_weights_and_get_sampling_client().result().compute_logprobs(prompt).result()
    assert before == after
    assert np.abs(np.array(live[1:]) - np.array(after[1:])).max() > 1e-3
    assert len(before) == 4
    assert before[0] is None


def test_an_existing_checkpoint_is_not_overwritten_by_accident(uninterrupted):
    _, training, path = uninterrupted
    with pytest.raises(tinker.RequestFailedError, match=r"after-three|overwrite"):
        training.save_state("after-three").result()
    assert training.save_state("after-three", overwrite=True).result().path == path


def test_listings_show_the_run_and_its_checkpoints(server, uninterrupted):
    _, training, path = uninterrupted
    rest = tinker.RestClient(base_url=server.url)
    run = rest.get_training_run(training.get_info().model_id).result()
    assert run.base_model == BASE_MODEL
    assert run.is_lora
    assert run.lora_rank == 5
    assert run.user_metadata == {"why": "resume"}
    listed = {checkpoint.tinker_path for checkpoint in rest.list_checkpoints(run.training_run_id).result().checkpoints}
    assert path in listed
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank) == (BASE_MODEL, 5)
