"""What a run comes to depends on its settings and images, not on how the machine goes about it."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from support.runs import assert_same_outcome, interrupt, run

from ema_timm.errors import InterruptedRunError


@pytest.fixture
def eventful(config):
    """A run that draws random numbers wherever one can."""
    return dataclasses.replace(
        config, epochs=2, drop_path=0.1, mixup=0.2, reprob=0.3, hflip=0.5, aa="rand-m5-mstd0.5"
    )


def test_the_number_of_loader_processes_does_not_change_the_outcome(eventful, tmp_path):
    whole = [run(eventful, output=str(tmp_path / f"w{w}"), workers=w) for w in (0, 1, 2)]
    assert_same_outcome(whole[0], whole[1], tmp_path / "w0", tmp_path / "w1")
    assert_same_outcome(whole[0], whole[2], tmp_path / "w0", tmp_path / "w2")


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 1)])
def test_a_run_goes_on_with_other_loader_processes(eventful, tmp_path, monkeypatch, before, after):
    whole = run(eventful, output=str(tmp_path / "whole"), workers=1)
    interrupt(monkeypatch, 7)  # in the middle of the second epoch
    with pytest.raises(InterruptedRunError):
        run(eventful, workers=before)
    continued = run(eventful, workers=after, resume=True)
    assert_same_outcome(continued, whole, eventful.output, tmp_path / "whole")


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone(eventful):
    from ema_timm.training.data import create_loaders, open_images, timm_augmentation
    from ema_timm.training.processes import Process
    from ema_timm.training.seeding import RepeatableImages

    process = Process(0, 1, torch.device("cpu"))
    opened = open_images(eventful.data_dir, "", "", "", eventful.output, process)
    opened.read_channels(3)
    images = RepeatableImages(opened.train, seed=1)
    preprocessing = {
        "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3,
        "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    augmentation = timm_augmentation(
        eventful.aa, eventful.color_jitter, eventful.hflip, eventful.reprob, eventful.scale_min
    )
    create_loaders(images, opened.val, augmentation, preprocessing, process, 12, 0)  # augments them
    first = images[3][0]
    random.random(), np.random.rand(), torch.rand(1)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(images[3][0], first)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(state[0], after[0]) and state[1:] == after[1:]  # it leaves no trace
    assert not torch.equal(images[4][0], first)
    images.epoch = 1
    assert not torch.equal(images[3][0], first)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_run_goes_on_with_the_threads_it_was_started_on(config, tmp_path, monkeypatch, threads):
    """Sums are rounded otherwise on other threads: a run of three is not continued on one."""
    config = dataclasses.replace(config, epochs=2, img_size=96)
    threads(3)
    whole = run(config, output=str(tmp_path / "whole"))
    interrupt(monkeypatch, 7)
    with pytest.raises(InterruptedRunError):
        run(config)
    threads(1)
    continued = run(config, resume=True)
    assert torch.get_num_threads() == 1  # the caller's again
    assert_same_outcome(continued, whole, config.output, tmp_path / "whole")
