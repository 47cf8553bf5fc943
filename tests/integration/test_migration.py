"""The migration pages of docs/: each row gives the numbers of the system that it replaces.

A case states our configuration and, in that system's own terms, its definition: a generator of the weight of the new
value at each iteration, None where it does not update. A float64 loop over that is what we are compared with, after
every iteration; and where the system can be installed, so are the weights that the system itself averages.
"""

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from ignite_ema import EMAHandler
from ignite_ema.schedules import (
    Annealing,
    Constant,
    CopyUntil,
    EqualWeight,
    ExponentialWarmup,
    HalfLife,
    InverseGamma,
    PowerFunction,
    RatioWarmup,
    Rescaled,
)

EPOCHS, EPOCH = 6, 6
ITERATIONS = EPOCHS * EPOCH
ITERATION = Events.ITERATION_COMPLETED
FLOATS, COUNTERS = ["norm.running_mean", "norm.running_var"], ["norm.num_batches_tracked"]
KEEP_COUNTERS = {"*.num_batches_tracked": "keep", "*": "update"}
Weights = Iterator[float | None]


class Net(nn.Module):
    """Weights, floating-point buffers and an integer one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


@torch.no_grad()
def move(model, iteration):
    """What a training step does to the model, the same for whoever asks."""
    generator = torch.Generator().manual_seed(iteration)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor += torch.randn(tensor.shape, generator=generator) / 4 if tensor.is_floating_point() else 1


def trainer_of(model):
    return Engine(lambda engine, batch: move(model, engine.state.iteration))


def run(trainer):
    return trainer.run(max_epochs=EPOCHS, epoch_length=EPOCH)


# The definitions, k = 1, 2, … being the iteration that has just been made.


def mmengine(momentum=lambda steps: 0.1, interval=1, enabled=lambda k: True) -> Weights:
    """Copies until it is enabled, and at the first step of the averaged model; then at every interval-th step."""
    steps = 0
    for k in count(1):
        if not enabled(k):
            yield 1.0
            continue
        yield 1.0 if steps == 0 else momentum(steps) if steps % interval == 0 else None
        steps += 1


def annealed(momentum, gamma):
    return lambda steps: max(momentum, gamma / (gamma + steps))


def exponential(momentum, gamma):
    return lambda x: (1 - momentum) * math.exp(-(1 + x) / gamma) + momentum


def ramped_up(ema_kimg, ema_rampup, batch_size):
    return lambda x: 1 - 0.5 ** (batch_size / min(ema_kimg * 1000, (x + 1) * batch_size * ema_rampup))


def mmcv(momentum, interval, warm_up) -> Weights:
    for runner_iter in count():
        due = runner_iter % interval == 0
        yield min(momentum**interval, (1 + runner_iter) / (warm_up + runner_iter)) if due else None


def mmdet2(momentum_fun, interval=1) -> Weights:
    for runner_iter in count():
        yield momentum_fun(runner_iter) if (runner_iter + 1) % interval == 0 else None


def mmagic_hook(momentum=0.001, interval=1, start_iter=0) -> Weights:
    for runner_iter in count():
        due = (runner_iter + 1 - start_iter) % interval == 0
        yield 1.0 if runner_iter < start_iter else momentum if due else None


def mmagic_gan(discriminator_steps, ema_start) -> Weights:
    """Looks at its average in the iterations that train the generator."""
    averaged = mmengine()
    for k in count(1):
        trained = k % discriminator_steps == 0
        yield None if not trained else next(averaged) if k >= ema_start * discriminator_steps else 1.0


def swa_utils(weight, due=lambda k: True) -> Weights:
    n_averaged = 0
    for k in count(1):
        yield None if not due(k) else 1.0 if n_averaged == 0 else weight(n_averaged)
        n_averaged += due(k)


def timm(decay, min_decay=0.0, update_after_step=0, warmup=None) -> Weights:
    for step in count(1):
        step = max(0, step - update_after_step - 1)
        if step > 0 and warmup is not None:
            gamma, power = warmup
            yield 1 - max(min(1 - (1 + step / gamma) ** -power, decay), min_decay)
        else:
            yield 1 - decay if step > 0 else 1.0


def diffusers(decay, min_decay=0.0, update_after_step=0, warmup=None) -> Weights:
    for optimization_step in count(1):
        step = max(0, optimization_step - update_after_step - 1)
        if warmup is None:
            current = (1 + step) / (10 + step)
        else:
            inv_gamma, power = warmup
            current = 1 - (1 + step / inv_gamma) ** -power
        yield 1 - max(min(current, decay), min_decay) if step > 0 else 1.0


def lightning(decay, every=1, at_step=0, at_epoch=None) -> Weights:
    """No two of its updates fall into the same iteration in the cases here."""

    def due(k):
        step, epoch_ends = k - 1, k % EPOCH == 0
        from_epoch = at_epoch is not None and epoch_ends and k // EPOCH - 1 >= at_epoch
        return (step >= at_step and step % every == 0) or from_epoch

    return swa_utils(lambda n: 1 - decay, due)


def ema_pytorch(beta, update_after_step, update_every, inv_gamma=1.0, power=2 / 3, min_value=0.0) -> Weights:
    for step in count():
        if step % update_every != 0:
            yield None
        elif step <= update_after_step:
            yield 1.0
        else:
            value = 1 - (1 + (step - update_after_step) / inv_gamma) ** -power
            yield 1 - min(max(value, min_value), beta)


def karras(gamma) -> Weights:
    for step in count(1):
        yield 1.0 if step == 1 else 1 - (1 - 1 / (step + 1)) ** (1 + gamma)


def torch_ema(decay) -> Weights:
    for num_updates in count(1):
        yield 1 - min(decay, (1 + num_updates) / (10 + num_updates))


# The systems themselves, where they can be installed: started with a model, they give a function that is called after
# each iteration and returns the averaged tensors.


def installed(module):
    """The module, or a skip; silently, for packages warn when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"{module} is not installed: pip install -e '.[bench]'")


def real_mmengine(ema_type="ExponentialMovingAverage", **options):
    def start(model):
        hook = installed("mmengine.hooks").EMAHook(ema_type, **options)
        runner = SimpleNamespace(model=model, iter=0, epoch=0, max_iters=ITERATIONS, max_epochs=EPOCHS)
        hook.before_run(runner)
        hook.before_train(runner)

        def after(iteration):
            runner.iter, runner.epoch = iteration - 1, (iteration - 1) // EPOCH
            hook.after_train_iter(runner, batch_idx=runner.iter % EPOCH)
            return hook.ema_model.module.state_dict()

        return after

    return start


def real_averaged_model(due=lambda k: True, **options):
    def start(model):
        averaged = AveragedModel(model, **options)

        def after(iteration):
            if due(iteration):
                averaged.update_parameters(model)
            return averaged.module.state_dict()

        return after

    return start


def timms_model_ema():
    """Its file alone, without torchvision, which timm imports."""
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    path = Path(package.submodule_search_locations[0], "utils", "model_ema.py")
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


def real_timm(steps=True, **options):
    def start(model):
        averaged = timms_model_ema()(model, **options)

        def after(iteration):
            averaged.update(model, step=iteration if steps else None)
            return averaged.module.state_dict()

        return after

    return start


def real_diffusers(**options):
    def start(model):
        names, parameters = zip(*model.named_parameters(), strict=True)
        averaged = installed("diffusers.training_utils").EMAModel(parameters, **options)

        def after(iteration):
            averaged.step(parameters)
            return dict(zip(names, averaged.shadow_params, strict=True))

        return after

    return start


def real_lightning(name="EMAWeightAveraging", **options):
    def start(model):
        lightning = installed("lightning.pytorch")
        module = lightning.LightningModule()
        module.net = model
        callback = getattr(installed("lightning.pytorch.callbacks.weight_averaging"), name)(**options)
        callback.setup(SimpleNamespace(), module, "fit")

        def after(iteration):
            trainer = SimpleNamespace(global_step=iteration, current_epoch=(iteration - 1) // EPOCH)
            callback.on_train_batch_end(trainer, module, None, None, iteration - 1)
            if iteration % EPOCH == 0:
                callback.on_train_epoch_end(trainer, module)
            return callback._average_model.module.net.state_dict()

        return after

    return start


def real_ema_pytorch(name="EMA", **options):
    def start(model):
        averaged = getattr(installed("ema_pytorch"), name)(model, **options)

        def after(iteration):
            averaged.update()
            return averaged.ema_model.state_dict()

        return after

    return start


def real_torch_ema(decay):
    def start(model):
        names, parameters = zip(*model.named_parameters(), strict=True)
        averaged = installed("torch_ema").ExponentialMovingAverage(parameters, decay)

        def after(iteration):
            averaged.update()
            return dict(zip(names, averaged.shadow_params, strict=True))

        return after

    return start


@dataclass(frozen=True)
class Case:
    """One row: what stands here, and what it replaces."""

    id: str
    momentum: float | Callable[[int], float]
    event: object
    theirs: Callable[[], Weights]
    real: Callable | None = None
    handle_buffers: str | Mapping[str, str] = "copy"
    averages_buffers: bool = False
    keeps_counters: bool = False


SWA_START = 3  # epochs without an average


def in_epochs(k):
    return k % EPOCH == 0 and k // EPOCH > SWA_START


CASES = [
    # mmengine: EMAHook and the averaged models
    Case(
        "mmengine-momentum",
        CopyUntil(1, Constant(0.1)),
        ITERATION,
        mmengine,
        real_mmengine(momentum=0.1),
    ),
    Case(
        "mmengine-interval",
        CopyUntil(1, Constant(0.1)),
        ITERATION(every=3, after=0),
        lambda: mmengine(interval=3),
        real_mmengine(momentum=0.1, interval=3),
    ),
    Case(
        "mmengine-begin_iter",
        CopyUntil(10, Constant(0.1)),
        ITERATION,
        lambda: mmengine(enabled=lambda k: k >= 10),
        real_mmengine(momentum=0.1, begin_iter=10),
    ),
    Case(
        "mmengine-begin_iter-interval",
        CopyUntil(10, Constant(0.1)),
        ITERATION(before=10) | ITERATION(every=3, after=9),
        lambda: mmengine(interval=3, enabled=lambda k: k >= 10),
        real_mmengine(momentum=0.1, interval=3, begin_iter=10),
    ),
    Case(
        "mmengine-begin_epoch",
        CopyUntil(2 * EPOCH + 1, Constant(0.1)),
        ITERATION,
        lambda: mmengine(enabled=lambda k: (k - 1) // EPOCH + 1 >= 3),
        real_mmengine(momentum=0.1, begin_epoch=3),
    ),
    Case(
        "mmengine-begin_epoch-interval",
        CopyUntil(2 * EPOCH + 1, Constant(0.1)),
        ITERATION(before=2 * EPOCH + 1) | ITERATION(every=4, after=2 * EPOCH),
        lambda: mmengine(interval=4, enabled=lambda k: (k - 1) // EPOCH + 1 >= 3),
        real_mmengine(momentum=0.1, interval=4, begin_epoch=3),
    ),
    Case(
        "mmengine-StochasticWeightAverage",
        EqualWeight(),
        ITERATION(every=3, after=0),
        lambda: mmengine(lambda steps: 1 / (steps // 3 + 1), interval=3),
        real_mmengine("StochasticWeightAverage", interval=3),
    ),
    Case(
        "mmengine-StochasticWeightAverage-begin_iter",
        CopyUntil(10, EqualWeight()),
        ITERATION(before=10) | ITERATION(every=3, after=9),
        lambda: mmengine(lambda steps: 1 / (steps // 3 + 1), interval=3, enabled=lambda k: k >= 10),
        real_mmengine("StochasticWeightAverage", interval=3, begin_iter=10),
    ),
    Case(
        "mmengine-MomentumAnnealingEMA",
        Annealing(0.1, gamma=8),
        ITERATION,
        lambda: mmengine(annealed(0.1, 8)),
        real_mmengine("MomentumAnnealingEMA", momentum=0.1, gamma=8),
    ),
    Case(
        "mmengine-MomentumAnnealingEMA-interval",
        Annealing(0.1, gamma=8 / 3),
        ITERATION(every=3, after=0),
        lambda: mmengine(annealed(0.1, 8), interval=3),
        real_mmengine("MomentumAnnealingEMA", momentum=0.1, gamma=8, interval=3),
    ),
    Case(
        "mmengine-update_buffers",
        CopyUntil(1, Constant(0.1)),
        ITERATION,
        mmengine,
        real_mmengine(momentum=0.1, update_buffers=True),
        handle_buffers="update",
        averages_buffers=True,
    ),
    # mmcv 1.x: EMAHook
    Case("mmcv-momentum", RatioWarmup(0.3, warm_up=10), ITERATION, lambda: mmcv(0.3, 1, 10)),
    Case(
        "mmcv-interval",
        lambda n: RatioWarmup(0.6**3, warm_up=10)(3 * n),
        ITERATION(every=3, after=0),
        lambda: mmcv(0.6, 3, 10),
    ),
    # mmdetection 2: BaseEMAHook and its two schedules
    Case(
        "mmdet2-interval",
        0.1,
        ITERATION(every=3),
        lambda: mmdet2(lambda x: 0.1, interval=3),
        handle_buffers=KEEP_COUNTERS,
        averages_buffers=True,
        keeps_counters=True,
    ),
    Case("mmdet2-skip_buffers", 0.1, ITERATION, lambda: mmdet2(lambda x: 0.1)),
    Case("mmdet2-ExpMomentumEMAHook", ExponentialWarmup(0.1, 20), ITERATION, lambda: mmdet2(exponential(0.1, 20))),
    Case(
        "mmdet2-ExpMomentumEMAHook-interval",
        ExponentialWarmup(0.1, 20 / 3),
        ITERATION(every=3),
        lambda: mmdet2(exponential(0.1, 20), interval=3),
    ),
    Case(
        "mmdet2-LinearMomentumEMAHook",
        RatioWarmup(0.4, warm_up=10),
        ITERATION,
        lambda: mmdet2(lambda x: min(0.4, (1 + x) / (10 + x))),
    ),
    Case(
        "mmdet2-LinearMomentumEMAHook-interval",
        lambda n: RatioWarmup(0.9**3, warm_up=10)(3 * n + 2),
        ITERATION(every=3),
        lambda: mmdet2(lambda x: min(0.9**3, (1 + x) / (10 + x)), interval=3),
    ),
    # mmdetection 3: ExpMomentumEMA, in mmengine's EMAHook
    Case(
        "mmdet3-ExpMomentumEMA",
        CopyUntil(1, ExponentialWarmup(0.1, 20)),
        ITERATION,
        lambda: mmengine(exponential(0.1, 20)),
    ),
    Case(
        "mmdet3-ExpMomentumEMA-interval",
        CopyUntil(1, lambda n: ExponentialWarmup(0.1, 20)(3 * n)),
        ITERATION(every=3, after=0),
        lambda: mmengine(exponential(0.1, 20), interval=3),
    ),
    # mmagic and mmgen: ExponentialMovingAverageHook and RampUpEMA
    Case("mmagic-momentum", 0.1, ITERATION, lambda: mmagic_hook(0.1)),
    Case("mmagic-interval", 0.1, ITERATION(every=3), lambda: mmagic_hook(0.1, interval=3)),
    Case("mmagic-start_iter", CopyUntil(10, Constant(0.1)), ITERATION, lambda: mmagic_hook(0.1, start_iter=10)),
    Case(
        "mmagic-start_iter-interval",
        CopyUntil(10, Constant(0.1)),
        ITERATION(before=11) | ITERATION(every=3, after=12),
        lambda: mmagic_hook(0.1, interval=3, start_iter=10),
    ),
    Case(
        "mmagic-ema_config-start_iter",
        CopyUntil(5, Constant(0.1)),
        ITERATION(every=2),
        lambda: mmagic_gan(discriminator_steps=2, ema_start=5),
    ),
    Case("mmgen-momentum", 1 - 0.9, ITERATION, lambda: mmagic_hook(1 - 0.9)),
    Case(
        "mmgen-rampup",
        HalfLife(1000, rampup_ratio=0.5, samples_per_update=64),
        ITERATION,
        lambda: map(ramped_up(1, 0.5, 64), count()),
    ),
    Case(
        "mmagic-RampUpEMA",
        CopyUntil(1, HalfLife(1000, rampup_ratio=0.5, samples_per_update=64)),
        ITERATION,
        lambda: mmengine(ramped_up(1, 0.5, 64)),
    ),
    Case(
        "mmagic-RampUpEMA-interval",
        CopyUntil(1, lambda n: HalfLife(1000, rampup_ratio=0.5, samples_per_update=64)(3 * n)),
        ITERATION(every=3, after=0),
        lambda: mmengine(ramped_up(1, 0.5, 64), interval=3),
    ),
    # torch.optim.swa_utils.AveragedModel
    Case(
        "torch-AveragedModel",
        EqualWeight(),
        ITERATION,
        lambda: swa_utils(lambda n: 1 / (n + 1)),
        real_averaged_model(),
    ),
    Case(
        "torch-swa_start",
        EqualWeight(),
        Events.EPOCH_COMPLETED(after=SWA_START),
        lambda: swa_utils(lambda n: 1 / (n + 1), in_epochs),
        real_averaged_model(in_epochs),
    ),
    Case(
        "torch-get_ema_avg_fn",
        CopyUntil(1, Constant(1 - 0.9)),
        ITERATION,
        lambda: swa_utils(lambda n: 1 - 0.9),
        real_averaged_model(avg_fn=get_ema_avg_fn(0.9)),
    ),
    Case(
        "torch-use_buffers",
        CopyUntil(1, Constant(1 - 0.9)),
        ITERATION,
        lambda: swa_utils(lambda n: 1 - 0.9),
        real_averaged_model(avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
        handle_buffers="update",
        averages_buffers=True,
    ),
    # timm: ModelEmaV3
    Case(
        "timm-decay",
        1 - 0.9,
        ITERATION,
        lambda: repeat(1 - 0.9),
        real_timm(steps=False, decay=0.9),
        handle_buffers="update",
        averages_buffers=True,
    ),
    Case(
        "timm-update_after_step",
        CopyUntil(6, Constant(1 - 0.9)),
        ITERATION,
        lambda: timm(0.9, update_after_step=5),
        real_timm(decay=0.9, update_after_step=5),
        handle_buffers="update",
        averages_buffers=True,
    ),
    Case(
        "timm-use_warmup",
        CopyUntil(6, InverseGamma(2.0, 0.75, min_momentum=1 - 0.8, max_momentum=1 - 0.3)),
        ITERATION,
        lambda: timm(0.8, 0.3, 5, warmup=(2.0, 0.75)),
        real_timm(decay=0.8, min_decay=0.3, update_after_step=5, use_warmup=True, warmup_gamma=2.0, warmup_power=0.75),
        handle_buffers="update",
        averages_buffers=True,
    ),
    Case(
        "timm-exclude_buffers",
        CopyUntil(1, Constant(1 - 0.9)),
        ITERATION,
        lambda: timm(0.9),
        real_timm(decay=0.9, exclude_buffers=True),
    ),
    # diffusers: EMAModel
    Case(
        "diffusers-decay",
        CopyUntil(1, lambda n: max(1 - 0.7, 9 / (10 + n))),
        ITERATION,
        lambda: diffusers(0.7),
        real_diffusers(decay=0.7),
    ),
    Case(
        "diffusers-update_after_step",
        CopyUntil(6, lambda n: min(1 - 0.4, max(1 - 0.7, 9 / (10 + n)))),
        ITERATION,
        lambda: diffusers(0.7, min_decay=0.4, update_after_step=5),
        real_diffusers(decay=0.7, min_decay=0.4, update_after_step=5),
    ),
    Case(
        "diffusers-use_ema_warmup",
        CopyUntil(6, InverseGamma(2.0, 0.75, min_momentum=1 - 0.8, max_momentum=1 - 0.3)),
        ITERATION,
        lambda: diffusers(0.8, 0.3, 5, warmup=(2.0, 0.75)),
        real_diffusers(decay=0.8, min_decay=0.3, update_after_step=5, use_ema_warmup=True, inv_gamma=2.0, power=0.75),
    ),
    # Lightning: WeightAveraging and EMAWeightAveraging
    Case(
        "lightning-WeightAveraging",
        EqualWeight(),
        ITERATION,
        lambda: swa_utils(lambda n: 1 / (n + 1)),
        real_lightning("WeightAveraging", use_buffers=False),
    ),
    Case(
        "lightning-EMAWeightAveraging",
        CopyUntil(1, Constant(1 - 0.9)),
        ITERATION,
        lambda: lightning(0.9),
        real_lightning(decay=0.9),
        handle_buffers="update",
        averages_buffers=True,
    ),
    Case(
        "lightning-update_starting_at_step",
        CopyUntil(1, Constant(1 - 0.9)),
        ITERATION(every=4, after=12),
        lambda: lightning(0.9, every=4, at_step=10),
        real_lightning(decay=0.9, update_every_n_steps=4, update_starting_at_step=10, use_buffers=False),
    ),
    Case(
        "lightning-update_starting_at_epoch",
        CopyUntil(1, Constant(1 - 0.9)),
        ITERATION(every=4, after=0) | Events.EPOCH_COMPLETED(after=2),
        lambda: lightning(0.9, every=4, at_epoch=2),
        real_lightning(decay=0.9, update_every_n_steps=4, update_starting_at_epoch=2, use_buffers=False),
    ),
    # ema-pytorch: EMA and KarrasEMA
    Case(
        "ema_pytorch-beta",
        CopyUntil(1, InverseGamma(1.0, 2 / 3, min_momentum=1 - 0.8)),
        ITERATION,
        lambda: ema_pytorch(0.8, 0, 1),
        real_ema_pytorch(beta=0.8, update_after_step=0, update_every=1),
        handle_buffers=KEEP_COUNTERS,
        averages_buffers=True,
        keeps_counters=True,
    ),
    Case(
        "ema_pytorch-update_every",
        CopyUntil(5, InverseGamma(2.0 / 3, 0.75, min_momentum=1 - 0.9, max_momentum=1 - 0.5)),
        ITERATION(every=3, after=0),
        lambda: ema_pytorch(0.9, 12, 3, 2.0, 0.75, 0.5),
        real_ema_pytorch(beta=0.9, update_after_step=12, update_every=3, inv_gamma=2.0, power=0.75, min_value=0.5),
        handle_buffers=KEEP_COUNTERS,
        averages_buffers=True,
        keeps_counters=True,
    ),
    Case(
        "ema_pytorch-KarrasEMA",
        CopyUntil(1, lambda n: PowerFunction(0.1)(n + 1)),
        ITERATION,
        lambda: karras(6.937203937601806),
        real_ema_pytorch("KarrasEMA", sigma_rel=0.1, update_every=1),
        handle_buffers=KEEP_COUNTERS,
        averages_buffers=True,
        keeps_counters=True,
    ),
    # torch_ema
    Case(
        "torch_ema-decay",
        lambda n: max(1 - 0.6, 9 / (11 + n)),
        ITERATION,
        lambda: torch_ema(0.6),
        real_torch_ema(0.6),
    ),
]


def cloned(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def ours(case):
    """The states of our twin, one after each iteration."""
    model, states = Net(), []
    handler = EMAHandler(model, case.momentum, handle_buffers=case.handle_buffers)
    trainer = trainer_of(model)
    handler.attach(trainer, event=case.event)

    def remember():
        states.append(cloned(handler.ema_model.state_dict()))

    trainer.add_event_handler(Events.ITERATION_STARTED(after=1), remember)  # the end of the iteration before
    trainer.add_event_handler(Events.COMPLETED, remember)
    run(trainer)
    return states


def theirs(case):
    """By their definition, after each iteration: the weight of the update, and the states of average and model."""
    model, steps = Net(), []
    average = {name: tensor.double() for name, tensor in cloned(model.state_dict()).items()}
    copied = set() if case.averages_buffers else set(FLOATS)
    copied.update([] if case.keeps_counters else COUNTERS)
    for iteration, weight in zip(range(1, ITERATIONS + 1), case.theirs(), strict=False):
        move(model, iteration)
        online = cloned(model.state_dict())
        for name, tensor in online.items() if weight is not None else ():
            if name in copied:
                average[name].copy_(tensor)
            elif name not in COUNTERS:
                average[name] += weight * (tensor.double() - average[name])
        steps.append((weight, cloned(average), online))
    return steps


def named(cases):
    return [pytest.param(case, id=case.id) for case in cases]


def test_every_case_has_a_name_of_its_own():
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", named(CASES))
def test_the_average_is_theirs(case):
    """After each iteration; where theirs follows the model, bit for bit."""
    for state, (weight, average, online) in zip(ours(case), theirs(case), strict=True):
        for name, tensor in state.items():
            torch.testing.assert_close(tensor.double(), average[name], rtol=0, atol=1e-6)
            if weight == 1 and not (name in COUNTERS and case.keeps_counters):
                assert torch.equal(tensor, online[name])


@pytest.mark.slow  # timm is there for the slow tests alone: what it requires would bring another torch
@pytest.mark.parametrize("case", named(case for case in CASES if case.real and case.id.startswith("timm")))
def test_the_average_is_that_of_timm(case):
    test_the_average_is_that_of_the_system_itself(case)


@pytest.mark.parametrize("case", named(case for case in CASES if case.real and not case.id.startswith("timm")))
def test_the_average_is_that_of_the_system_itself(case):
    model = Net()
    after = case.real(model)
    for iteration, (state, weight) in enumerate(zip(ours(case), case.theirs(), strict=False), start=1):
        move(model, iteration)
        for name, tensor in after(iteration).items():
            between = weight is None and name in FLOATS  # where some copy the buffers all the same; see below
            if tensor.is_floating_point() and not between:
                torch.testing.assert_close(state[name], tensor, rtol=0, atol=2e-6)


BEGINNINGS = {
    "mmengine-begin_iter": 3 * EPOCH,
    "mmengine-begin_epoch": 2 * EPOCH + 1,
    "mmengine-begin_iter-interval": 3 * EPOCH,
    "mmagic-start_iter": 3 * EPOCH,
}


@pytest.mark.parametrize(("name", "begin"), BEGINNINGS.items(), ids=list(BEGINNINGS))
def test_a_validation_before_the_beginning_sees_the_model(name, begin):
    model, same = Net(), []
    handler = EMAHandler(model, CopyUntil(begin, Constant(0.1)))
    trainer = trainer_of(model)
    event = ITERATION(before=begin) | ITERATION(every=4, after=begin - 1) if name.endswith("interval") else ITERATION
    handler.attach(trainer, event=event)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate():
        pairs = zip(handler.ema_model.state_dict().values(), model.state_dict().values(), strict=True)
        same.append(all(torch.equal(averaged, online) for averaged, online in pairs))

    run(trainer)
    assert same == [epoch * EPOCH <= begin for epoch in range(1, EPOCHS + 1)]


def test_buffers_that_follow_between_the_updates_are_one_line():
    """mmengine copies them after every iteration, whatever the interval."""
    model, states = Net(), []
    handler = EMAHandler(model, CopyUntil(1, Constant(0.1)))
    trainer = trainer_of(model)
    handler.attach(trainer, event=ITERATION(every=3, after=0))
    trainer.add_event_handler(ITERATION, lambda: handler.reset(buffers_only=True))

    @trainer.on(ITERATION)
    def remember():
        states.append(cloned(handler.ema_model.state_dict()))
        for name in FLOATS + COUNTERS:
            assert torch.equal(states[-1][name], model.state_dict()[name])

    run(trainer)
    theirs = Net()
    after = real_mmengine(momentum=0.1, interval=3)(theirs)
    for iteration, state in enumerate(states, start=1):
        move(theirs, iteration)
        for name, tensor in after(iteration).items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)


def test_a_pattern_decides_whether_a_buffer_is_averaged_copied_or_kept():
    policy = {"norm.running_mean": "update", "norm.running_var": "keep"}
    model, before = Net(), Net().state_dict()
    handler = EMAHandler(model, 0.1, handle_buffers=policy)
    trainer = trainer_of(model)
    handler.attach(trainer)
    mean = before["norm.running_mean"].double()

    @trainer.on(ITERATION)
    def average():
        mean.mul_(0.9).add_(0.1 * model.norm.running_mean.double())

    run(trainer)
    twin = handler.ema_model.norm
    torch.testing.assert_close(twin.running_mean.double(), mean, rtol=0, atol=1e-6)
    assert torch.equal(twin.running_var, before["norm.running_var"])
    assert twin.num_batches_tracked == model.norm.num_batches_tracked == ITERATIONS


def after_a_run(**options):
    """A handler whose twin lies behind its model, in weights and in buffers."""
    model = Net()
    handler = EMAHandler(model, Annealing(0.1, gamma=4), handle_buffers="update", **options)
    trainer = trainer_of(model)
    handler.attach(trainer)
    run(trainer)
    assert not any(torch.equal(handler.ema_model.state_dict()[name], model.state_dict()[name]) for name in FLOATS)
    return handler


def test_sync_parameters_is_reset():
    handler = after_a_run()
    handler.reset()
    for name, tensor in handler.model.state_dict().items():
        assert torch.equal(handler.ema_model.state_dict()[name], tensor)
    assert handler.num_updates == 0


def test_sync_buffers_is_reset_of_the_buffers_alone():
    handler = after_a_run()
    before = cloned(handler.ema_model.state_dict())
    handler.reset(buffers_only=True)
    for name, tensor in handler.ema_model.state_dict().items():
        expected = handler.model.state_dict() if name in FLOATS + COUNTERS else before
        assert torch.equal(tensor, expected[name])
    assert handler.num_updates == ITERATIONS


def test_device_is_where_the_average_is_held():
    handler = after_a_run(device="cpu")
    assert {tensor.device.type for tensor in handler.ema_model.state_dict().values()} == {"cpu"}
    with pytest.raises(ValueError, match="device should be one that holds values, got 'meta'"):
        EMAHandler(Net(), device="meta")


@pytest.mark.slow
def test_dtype_holds_the_average_of_a_bfloat16_model_as_timms_does():
    model, theirs = Net().bfloat16(), Net().bfloat16()
    handler = EMAHandler(model, CopyUntil(1, Constant(1 - 0.9)), handle_buffers="update", dtype=torch.float32)
    trainer = trainer_of(model)
    handler.attach(trainer)
    run(trainer)
    after = real_timm(decay=0.9, dtype=torch.float32)(theirs)
    for iteration in range(1, ITERATIONS + 1):
        move(theirs, iteration)
        averaged = after(iteration)
    for name, tensor in averaged.items():
        torch.testing.assert_close(handler.ema_model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_frozen_parameters_that_are_constant_stay_bit_for_bit():
    model = nn.ModuleDict({"frozen": nn.Linear(50, 50).requires_grad_(False), "trained": Net()})
    before = cloned(model["frozen"].state_dict())
    handler = EMAHandler(model, 0.001)
    trainer = trainer_of(model["trained"])
    handler.attach(trainer)
    run(trainer)
    for name, tensor in handler.ema_model["frozen"].state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("real", [None, real_diffusers(decay=0.9, min_decay=0.9)], ids=["mmagic", "diffusers"])
def test_frozen_parameters_that_move_are_copied_by_one_line(real):
    """In mmagic by ``momentum_nontrainable=1``, in diffusers always."""
    model, theirs = Net(), Net()
    for net in (model, theirs):
        net.layer.requires_grad_(False)
    handler = EMAHandler(model, CopyUntil(1, Constant(1 - 0.9)))
    trainer = trainer_of(model)
    handler.attach(trainer)
    trainer.add_event_handler(ITERATION, lambda: handler.ema_model.layer.load_state_dict(model.layer.state_dict()))
    run(trainer)
    average, after = theirs.norm.weight.double().detach(), real(theirs) if real else None
    for iteration in range(1, ITERATIONS + 1):
        move(theirs, iteration)
        real_average = after(iteration) if after else {}
        average += (1.0 if iteration == 1 else 1 - 0.9) * (theirs.norm.weight.detach().double() - average)
    twin = handler.ema_model.state_dict()
    assert torch.equal(twin["layer.weight"], theirs.layer.weight)
    torch.testing.assert_close(twin["norm.weight"].double(), average, rtol=0, atol=1e-6)
    for name, tensor in real_average.items():
        torch.testing.assert_close(twin[name], tensor.detach(), rtol=0, atol=1e-6)


class Gan(nn.Module):
    """As mmagic's: twins, where it has them, are submodules beside what they average."""

    def __init__(self, with_twins):
        super().__init__()
        self.generator, self.mapping = Net(), nn.Linear(2, 2)
        if with_twins:
            self.generator_ema, self.mapping_ema = Net(), nn.Linear(2, 2)


@pytest.mark.parametrize("with_twins", [True, False], ids=["given", "missing"])
def test_twins_that_are_submodules_of_the_model(with_twins):
    gan = Gan(with_twins)
    initial = gan.generator.layer.weight.detach().double()
    trainer = Engine(lambda engine, batch: [move(gan.generator, engine.state.iteration), move(gan.mapping, 0)])
    for key in ("generator_ema", "mapping_ema"):  # mmagic's module_keys
        net = gan.get_submodule(key.removesuffix("_ema"))
        if not hasattr(gan, key):
            gan.add_module(key, copy.deepcopy(net))
        handler = EMAHandler(net, 0.1, ema_model=gan.get_submodule(key))
        handler.attach(trainer, name=f"{key}_momentum", event=ITERATION(every=3))
        assert handler.ema_model is gan.get_submodule(key)
    run(trainer)
    reference, net = initial, Net()
    for iteration, weight in zip(range(1, ITERATIONS + 1), mmagic_hook(0.1, interval=3), strict=False):
        move(net, iteration)
        reference = reference + (weight or 0) * (net.layer.weight.detach().double() - reference)
    saved = gan.state_dict()
    torch.testing.assert_close(saved["generator_ema.layer.weight"].double(), reference, rtol=0, atol=1e-6)
    assert not torch.equal(saved["mapping_ema.weight"], saved["mapping.weight"])
    loaded = Gan(with_twins=True)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded.generator_ema.layer.weight, gan.generator_ema.layer.weight)


@pytest.mark.parametrize("factor", [3, 4], ids=["interval", "batch_size"])
def test_rescaled_makes_up_for_fewer_updates(factor):
    """One update stands for ``factor``; mmcv's and mmdetection's power of the momentum itself does not."""

    def averaged(momentum, every):
        model = Net()
        handler = EMAHandler(model, momentum)
        trainer = Engine(lambda engine, batch: [move(model, k) for k in [engine.state.iteration] if k % factor == 1])
        handler.attach(trainer, event=ITERATION(every=every))
        run(trainer)
        return handler.ema_model.layer.weight

    expected = averaged(0.1, every=1)
    torch.testing.assert_close(averaged(Rescaled(Constant(0.1), factor), every=factor), expected, rtol=0, atol=1e-6)
    assert (averaged(Constant(0.1**factor), every=factor) - expected).norm() > 0.5 * expected.norm()


def test_a_decay_passed_as_momentum_is_warned_about():
    with pytest.warns(UserWarning, match=r"if it was meant as a decay, pass 1 - 0.999 = 0.001"):
        EMAHandler(Net(), 0.999)
    EMAHandler(Net(), 0.5)  # as in mmengine: above that, it warns


def test_the_model_going_on_from_its_average_is_one_line():
    """ema-pytorch's ``update_model_with_ema_every``."""
    model, theirs = Net(), Net()
    handler = EMAHandler(model, CopyUntil(1, Constant(1 - 0.9)), handle_buffers=KEEP_COUNTERS)
    trainer = trainer_of(model)
    handler.attach(trainer)
    trainer.add_event_handler(
        ITERATION(every=8, after=8), lambda: model.load_state_dict(handler.ema_model.state_dict())
    )
    run(trainer)
    options = {"beta": 0.9, "min_value": 0.9, "update_after_step": 0, "update_every": 1}
    after = real_ema_pytorch(**options, update_model_with_ema_every=8)(theirs)
    for iteration in range(1, ITERATIONS + 1):
        move(theirs, iteration)
        averaged = after(iteration)
    for mine, other in ((handler.ema_model.state_dict(), averaged), (model.state_dict(), theirs.state_dict())):
        for name in mine.keys() - COUNTERS:
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-6)
