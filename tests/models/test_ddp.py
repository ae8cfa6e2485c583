"""DistributedDataParallel over gloo: two processes give the gradients of one that sees both batches."""

from __future__ import annotations

import copy
import sys
import traceback

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

BATCHES = (0, 1)


def loss_of(name, model, rank, **kwargs):
    from wavlm_cases import labels_for, ragged_mask, waveforms

    config = getattr(model, "module", model).config
    labels = labels_for(name, config, seed=rank)
    return model(waveforms(seed=rank), attention_mask=ragged_mask(600, 400 + 50 * rank), labels=labels).loss


def build(name, how):
    from wavlm_cases import fast_model, plain_model, small_config, subject

    config = small_config("large" if name == "WavLMForXVector" else "base")
    return subject.accelerate(plain_model(name, config)) if how == "wrapped first" else fast_model(name, config)


CASES = (
    ("WavLMForCTC", "fast first"),
    ("WavLMForXVector", "wrapped first"),
    ("WavLMForSequenceClassification", "checkpointed"),
)


def gradients_of(name, how, rank):
    from wavlm_cases import subject

    model = build(name, how)
    if how == "wrapped first":
        model = subject.restore(model)
    model = DistributedDataParallel(model.train(), find_unused_parameters=False)
    if how == "wrapped first":
        assert subject.accelerate(model) is model
        assert isinstance(model.module, type(build(name, "")))
    if how == "checkpointed":
        model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):  # the second pass runs with rebuilt buckets
        model.zero_grad()
        loss_of(name, model, rank).backward()
    return {n: p.grad.numpy() for n, p in model.module.named_parameters()}


def worker(rank, meeting, paths, results):
    try:
        sys.path[:0] = paths
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        results.put((rank, {name: gradients_of(name, how, rank) for name, how in CASES}))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except Exception:  # the parent shows it
        results.put((rank, traceback.format_exc()))


@pytest.fixture(scope="module")
def received(tmp_path_factory):
    """What each of two processes got, by rank and class; one pair of processes serves all cases."""
    context = mp.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path_factory.mktemp("ddp") / "meeting"), list(sys.path), results)
    processes = [context.Process(target=worker, args=(rank, *arguments)) for rank in BATCHES]
    for process in processes:
        process.start()
    try:
        yield dict(results.get(timeout=200) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize(("name", "how"), CASES)
def test_two_processes_average_the_gradients_of_one(name, how, received):
    for rank, grads in received.items():
        assert isinstance(grads, dict), f"process {rank}:\n{grads}"
    alone = build(name, "").train()
    expected = []
    for rank in BATCHES:
        model = copy.deepcopy(alone)
        loss_of(name, model, rank).backward()
        expected.append({n: p.grad for n, p in model.named_parameters()})
    for n in expected[0]:
        mean = (expected[0][n] + expected[1][n]) / 2
        for rank in BATCHES:
            got = torch.from_numpy(received[rank][name][n])
            torch.testing.assert_close(got, mean, rtol=1e-3, atol=1e-4 * max(mean.abs().max().item(), 1e-2), msg=n)
