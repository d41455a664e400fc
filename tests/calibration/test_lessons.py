"""What distillation learns from: how much timesteps and batches count, and what is held out to judge by."""

import pytest
import torch
from diffusers import DDPMScheduler
from distilling import FEW_BLOCKS, TIMESTEPS, UNTRAINED, distilled, recorded, unet2d

from dq_runtime import DilateQuantConfig
from dq_runtime.calibration import training
from dq_runtime.calibration.importance import timestep_importance


def train_losses(monkeypatch):
    """The losses of each call of ``_train``, by name: trainer and losses."""
    original, seen = training.Trainer._train, {}

    def train(self, name, losses_of, *arguments):
        with torch.no_grad():
            seen[name] = self, [losses_of(i) for i in range(len(self.batches))]
        original(self, name, losses_of, *arguments)

    monkeypatch.setattr(training.Trainer, "_train", train)
    return seen


def by_timestep(trainer, errors):
    """Sums over the training batches, and how many there are of each timestep."""
    total, count = torch.zeros(trainer.grid.num_timesteps), torch.zeros(trainer.grid.num_timesteps)
    for i in trainer.training:
        total.index_add_(0, trainer.indices[i], errors[i])
        count.index_add_(0, trainer.indices[i], torch.ones_like(errors[i]))
    return total, count


def test_in_a_block_every_timestep_counts_the_same(monkeypatch):
    unet, seen = unet2d(), train_losses(monkeypatch)
    calibration_set = recorded(unet, scheduler=DDPMScheduler())
    distilled(unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), **UNTRAINED | {"samples": 48})

    assert len(seen) == 6
    for trainer, errors in seen.values():
        total, count = by_timestep(trainer, errors)
        assert count.max() > 3 * count.min()
        torch.testing.assert_close(total, total.mean().expand(3), rtol=1e-4, atol=0)


def test_a_polish_weighs_timesteps_by_what_they_do_to_the_image(monkeypatch):
    unet, seen = unet2d(), train_losses(monkeypatch)
    calibration_set = recorded(unet, scheduler=DDPMScheduler())
    settings = {"samples": 48, "polish_iterations": 8, "polish_learning_rate": 1e-9, "scale_learning_rate": 1e-9}
    rounded = distilled(unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), **UNTRAINED | settings)

    trainer, errors = seen["whole UNet"]
    total, count = by_timestep(trainer, errors)
    importance = torch.tensor(timestep_importance(DDPMScheduler(), TIMESTEPS))
    error = torch.stack(
        [(call.run(rounded).sample - call.run(unet).sample).square().mean() for call in calibration_set.calls]
    )
    # The samples are not drawn equally often, a batch computes them together: not bit by bit.
    torch.testing.assert_close(total / count.sum(), importance * error, rtol=0.2, atol=0)


def test_held_out_samples_are_judged_and_not_trained_on(monkeypatch):
    unet = unet2d()
    trained, replayed = set(), set()
    original = training.Trainer._run_block

    def run_block(self, block, i):
        (trained if torch.is_grad_enabled() else replayed).update(self.batches[i].sample[:, 0, 0, 0].tolist())
        return original(self, block, i)

    monkeypatch.setattr(training.Trainer, "_run_block", run_block)
    calibration_set = recorded(unet, rows=32)
    distilled(unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), batch_size=24, samples=96, iterations=5)
    assert len(trained) == 3 * 28
    assert len(replayed - trained) == 3 * 4


def test_a_polish_holds_out_the_same_samples(monkeypatch):
    unet, sets = unet2d(), []
    original = training.Trainer.__init__

    def init(self, unet, stand_ins, batches, *arguments):
        sets.append(batches)
        original(self, unet, stand_ins, batches, *arguments)

    monkeypatch.setattr(training.Trainer, "__init__", init)
    calibration_set = recorded(unet, rows=32)
    settings = {"samples": 24, "batch_size": 24, "iterations": 0, "polish_iterations": 3}
    distilled(unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), **settings)

    blocks, polish = (
        [
            {value for i in part for value in batches[i].sample[:, 0, 0, 0].tolist()}
            for part in (batches.training, batches.validation)
        ]
        for batches in sets
    )
    assert len(polish[0]) > len(blocks[0])
    assert not (blocks[0] | polish[0]) & (blocks[1] | polish[1])


def test_a_batch_counts_as_much_as_it_has_samples(monkeypatch):
    unet, losses = unet2d(), []
    original = training.Trainer._descend

    def descend(self, loss_of, *arguments):
        losses.append([(len(self.batches[i].sample), loss_of(i).item()) for i in self.training])
        original(self, loss_of, *arguments)

    monkeypatch.setattr(training.Trainer, "_descend", descend)
    calibration_set = recorded(unet)
    for batch_size in (5, 48):
        settings = {"samples": 48, "batch_size": batch_size, "iterations": 1, "error_feedback": False}
        distilled(unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), **settings)

    blocks = len(losses) // 2
    for small, (whole,) in zip(losses[:blocks], losses[blocks:], strict=True):
        assert small[-1][0] == whole[0] % 5 > 0
        assert sum(loss for _, loss in small) * 5 == pytest.approx(whole[1] * 48, rel=0.05)
