"""The migration pages of docs/: each row gives the numbers of the system that it replaces.

A case states our configuration and what it is compared with after every iteration: the weights that the system itself
averages, or, where it cannot be installed, a float64 loop over its definition in its own terms, a generator of the
weight of the new value at each iteration, None where it does not update.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from ignite_ema import EMAHandler, schedules
from ignite_ema.schedules import Annealing, Constant, CopyUntil, EqualWeight, HalfLife, InverseGamma, RatioWarmup
from tests.helpers.bits import copied
from tests.helpers.peer_files import need

EPOCHS, EPOCH = 6, 6
ITERATIONS = EPOCHS * EPOCH
ITERATION = Events.ITERATION_COMPLETED
FLOATS, COUNTERS = ["norm.running_mean", "norm.running_var"], ["norm.num_batches_tracked"]
KEEP_COUNTERS = {"*.num_batches_tracked": "keep", "*": "update"}


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


def mmengine(momentum, interval=1):
    """Copies at the first step of the averaged model, and updates at every interval-th one."""
    for steps in count():
        yield 1.0 if steps == 0 else momentum(steps) if steps % interval == 0 else None


def exponential(momentum, gamma):
    return lambda x: (1 - momentum) * math.exp(-(1 + x) / gamma) + momentum


def ramped_up(ema_kimg, ema_rampup, batch_size):
    return lambda x: 1 - 0.5 ** (batch_size / min(ema_kimg * 1000, (x + 1) * batch_size * ema_rampup))


def mmcv(momentum, interval, warm_up):
    for runner_iter in count():
        due = runner_iter % interval == 0
        yield min(momentum**interval, (1 + runner_iter) / (warm_up + runner_iter)) if due else None


def mmdet2(momentum_fun, interval=1):
    for runner_iter in count():
        yield momentum_fun(runner_iter) if (runner_iter + 1) % interval == 0 else None


def mmagic_hook(momentum=0.1, interval=1, start_iter=0):
    for runner_iter in count():
        due = (runner_iter + 1 - start_iter) % interval == 0
        yield 1.0 if runner_iter < start_iter else momentum if due else None


# The systems themselves, where they can be installed: started with a model, they give a function that is called after
# each iteration and returns the averaged tensors.


def real(make, update, state):
    """From the functions that make an average of a model, update it after an iteration, and give its tensors."""

    def start(model):
        averaged = make(model)

        def after(iteration):
            update(averaged, model, iteration)
            return state(averaged)

        return after

    return start


def state_of(attribute):
    return lambda averaged: getattr(averaged, attribute).state_dict()


def real_mmengine(ema_type="ExponentialMovingAverage", **options):
    def make(model):
        hook = need("mmengine.hooks").EMAHook(ema_type, **options)
        runner = SimpleNamespace(model=model, iter=0, epoch=0, max_iters=ITERATIONS, max_epochs=EPOCHS)
        hook.before_run(runner)
        hook.before_train(runner)
        return hook, runner

    def update(made, model, iteration):
        hook, runner = made
        runner.iter, runner.epoch = iteration - 1, (iteration - 1) // EPOCH
        hook.after_train_iter(runner, batch_idx=runner.iter % EPOCH)

    return real(make, update, lambda made: made[0].ema_model.module.state_dict())


def real_timm(**options):
    return real(
        lambda model: need("timm.utils").ModelEmaV3(model, **options),
        lambda averaged, model, iteration: averaged.update(model, step=iteration),
        state_of("module"),
    )


def real_of_parameters(module, name, **options):
    """An average of a list of parameters."""

    def make(model):
        names, parameters = zip(*model.named_parameters(), strict=True)
        return names, parameters, getattr(need(module), name)(parameters, **options)

    def update(made, model, iteration):
        _, parameters, averaged = made
        averaged.step(parameters) if hasattr(averaged, "step") else averaged.update()

    return real(make, update, lambda made: dict(zip(made[0], made[2].shadow_params, strict=True)))


def real_lightning(**options):
    def make(model):
        module = need("lightning.pytorch").LightningModule()
        module.net = model
        callback = need("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(**options)
        callback.setup(SimpleNamespace(), module, "fit")
        return callback, module

    def update(made, model, iteration):
        callback, module = made
        trainer = SimpleNamespace(global_step=iteration, current_epoch=(iteration - 1) // EPOCH)
        callback.on_train_batch_end(trainer, module, None, None, iteration - 1)
        if iteration % EPOCH == 0:
            callback.on_train_epoch_end(trainer, module)

    return real(make, update, lambda made: made[0]._average_model.module.net.state_dict())


def real_ema_pytorch(name="EMA", **options):
    return real(
        lambda model: getattr(need("ema_pytorch"), name)(model, **options),
        lambda averaged, model, iteration: averaged.update(),
        state_of("ema_model"),
    )


@dataclass(frozen=True)
class Case:
    """One row: what stands here, and what it replaces, by its definition or itself."""

    id: str
    momentum: float | Callable[[int], float]
    event: object = ITERATION
    theirs: Callable | None = None
    real: Callable | None = None
    handle_buffers: str | Mapping[str, str] = "copy"


def first_then(n):
    """Every third iteration, counted from the n-th, and all before it."""
    return ITERATION(before=n) | ITERATION(every=3, after=n - 1)


def copying(n, momentum=0.1):
    return CopyUntil(n, Constant(momentum))


THIRD, FROM_FIRST = ITERATION(every=3), ITERATION(every=3, after=0)
SWA = {"ema_type": "StochasticWeightAverage"}
ANNEALING = {"ema_type": "MomentumAnnealingEMA", "momentum": 0.1, "gamma": 8}
RAMP_UP = HalfLife(1000, rampup_ratio=0.5, samples_per_update=64)
EXPONENTIAL, INVERSE = (
    schedules.ExponentialWarmup(0.1, 20),
    InverseGamma(2.0, 0.75, min_momentum=1 - 0.8, max_momentum=1 - 0.3),
)
INVERSE_DECAY = {"decay": 0.8, "min_decay": 0.3, "update_after_step": 5}

CASES = [
    # mmengine: EMAHook and the averaged models
    *(
        Case(f"mmengine-{name}", momentum, event, real=real_mmengine(**options))
        for name, momentum, event, options in [
            ("interval", copying(1), FROM_FIRST, {"momentum": 0.1, "interval": 3}),
            ("begin_iter-interval", copying(10), first_then(10), {"momentum": 0.1, "interval": 3, "begin_iter": 10}),
            ("begin_epoch-interval", copying(13), first_then(13), {"momentum": 0.1, "interval": 3, "begin_epoch": 3}),
            ("SWA-begin_iter", CopyUntil(10, EqualWeight()), first_then(10), {**SWA, "interval": 3, "begin_iter": 10}),
            ("MomentumAnnealingEMA-interval", Annealing(0.1, 8 / 3), FROM_FIRST, {**ANNEALING, "interval": 3}),
        ]
    ),
    # mmcv 1.x: EMAHook
    Case("mmcv-interval", lambda n: RatioWarmup(0.6**3, warm_up=10)(3 * n), FROM_FIRST, lambda: mmcv(0.6, 3, 10)),
    # mmdetection 2: BaseEMAHook and its two schedules
    Case("mmdet2-interval", 0.1, THIRD, lambda: mmdet2(lambda x: 0.1, 3), handle_buffers=KEEP_COUNTERS),
    Case(
        "mmdet2-LinearMomentumEMAHook-interval",
        lambda n: RatioWarmup(0.9**3, warm_up=10)(3 * n + 2),
        THIRD,
        lambda: mmdet2(lambda x: min(0.9**3, (1 + x) / (10 + x)), interval=3),
    ),
    # mmdetection 3: ExpMomentumEMA, in mmengine's EMAHook
    Case(
        "mmdet3-ExpMomentumEMA-interval",
        CopyUntil(1, lambda n: EXPONENTIAL(3 * n)),
        FROM_FIRST,
        lambda: mmengine(exponential(0.1, 20), interval=3),
    ),
    # mmagic and mmgen: ExponentialMovingAverageHook and RampUpEMA
    Case(
        "mmagic-start_iter-interval",
        copying(10),
        ITERATION(before=11) | ITERATION(every=3, after=12),
        lambda: mmagic_hook(interval=3, start_iter=10),
    ),
    Case("mmgen-rampup", RAMP_UP, theirs=lambda: map(ramped_up(1, 0.5, 64), count())),
    Case("mmagic-RampUpEMA", CopyUntil(1, RAMP_UP), theirs=lambda: mmengine(ramped_up(1, 0.5, 64))),
    # torch.optim.swa_utils.AveragedModel
    Case(
        "torch-use_buffers",
        copying(1, 1 - 0.9),
        real=real(
            lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
            lambda averaged, model, iteration: averaged.update_parameters(model),
            state_of("module"),
        ),
        handle_buffers="update",
    ),
    # timm: ModelEmaV3
    Case("timm-exclude_buffers", copying(1, 1 - 0.9), real=real_timm(decay=0.9, exclude_buffers=True)),
    Case(
        "timm-use_warmup",
        CopyUntil(6, INVERSE),
        real=real_timm(**INVERSE_DECAY, use_warmup=True, warmup_gamma=2.0, warmup_power=0.75),
        handle_buffers="update",
    ),
    # diffusers: EMAModel
    Case(
        "diffusers-update_after_step",
        CopyUntil(6, lambda n: min(1 - 0.4, max(1 - 0.7, 9 / (10 + n)))),
        real=real_of_parameters("diffusers.training_utils", "EMAModel", decay=0.7, min_decay=0.4, update_after_step=5),
    ),
    # Lightning: EMAWeightAveraging
    Case(
        "lightning-update_starting_at_epoch",
        copying(1, 1 - 0.9),
        ITERATION(every=4, after=0) | Events.EPOCH_COMPLETED(after=2),
        real=real_lightning(update_starting_at_epoch=2, decay=0.9, update_every_n_steps=4, use_buffers=False),
    ),
    # ema-pytorch: EMA and KarrasEMA
    Case(
        "ema_pytorch-update_every",
        CopyUntil(5, InverseGamma(2.0 / 3, 0.75, min_momentum=1 - 0.9, max_momentum=1 - 0.5)),
        FROM_FIRST,
        real=real_ema_pytorch(beta=0.9, update_after_step=12, update_every=3, inv_gamma=2.0, power=0.75, min_value=0.5),
        handle_buffers=KEEP_COUNTERS,
    ),
    Case(
        "ema_pytorch-KarrasEMA",
        CopyUntil(1, lambda n: schedules.PowerFunction(0.1)(n + 1)),
        real=real_ema_pytorch("KarrasEMA", sigma_rel=0.1, update_every=1),
        handle_buffers=KEEP_COUNTERS,
    ),
    # torch_ema
    Case(
        "torch_ema-decay",
        lambda n: max(1 - 0.6, 9 / (11 + n)),
        real=real_of_parameters("torch_ema", "ExponentialMovingAverage", decay=0.6),
    ),
]


def trained(momentum, event=ITERATION, **options):
    """A handler whose model is trained, and what its trainer runs."""
    model = Net()
    handler = EMAHandler(model, momentum, **options)
    trainer = trainer_of(model)
    handler.attach(trainer, event=event)
    return handler, trainer


def ours(case):
    """The states of our twin, one after each iteration."""
    handler, trainer = trained(case.momentum, case.event, handle_buffers=case.handle_buffers)
    states = []

    def remember():
        states.append(copied(handler.ema_model.state_dict()))

    trainer.add_event_handler(Events.ITERATION_STARTED(after=1), remember)  # the end of the iteration before
    trainer.add_event_handler(Events.COMPLETED, remember)
    run(trainer)
    return states


def defined(case):
    """An average by their definition; where it copies, exactly."""
    model, weights = Net(), case.theirs()
    average = {name: tensor.double() for name, tensor in copied(model.state_dict()).items()}

    def after(iteration):
        weight = next(weights)
        for name, tensor in model.state_dict().items() if weight is not None else ():
            is_counter = name in COUNTERS
            if is_counter and case.handle_buffers is KEEP_COUNTERS:
                continue
            if weight == 1 or is_counter or (name in FLOATS and case.handle_buffers == "copy"):
                average[name].copy_(tensor)
            else:
                average[name] += weight * (tensor.double() - average[name])
        return average

    return model, after


def measured(case):
    """Their own average, but for the counters."""
    model = Net()
    after = case.real(model)
    return model, lambda iteration: {name: one for name, one in after(iteration).items() if name not in COUNTERS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_average_is_theirs(case):
    """After each iteration; where theirs is the model itself, ours is, too, bit for bit."""
    model, after = (measured if case.real else defined)(case)
    before = {}
    for iteration, state in enumerate(ours(case), start=1):
        move(model, iteration)
        online = model.state_dict()
        is_between = before and torch.equal(before["layer.weight"], state["layer.weight"])
        for name, tensor in after(iteration).items():
            if case.real and is_between and name in FLOATS:
                continue  # some copy the buffers all the same
            torch.testing.assert_close(state[name].double(), tensor.double(), rtol=0, atol=2e-6)
            if torch.equal(tensor.to(online[name].dtype), online[name]):
                assert torch.equal(state[name], online[name])
        before = state


def test_a_twin_that_is_a_submodule_of_the_model():
    """As mmagic's ``module_keys`` name them."""
    gan = nn.ModuleDict({"generator": Net(), "generator_ema": Net()})
    trainer = trainer_of(gan["generator"])
    EMAHandler(gan["generator"], 0.1, ema_model=gan["generator_ema"]).attach(trainer, event=THIRD)
    run(trainer)
    alone, its_trainer = trained(0.1, THIRD)
    run(its_trainer)
    for name, tensor in alone.ema_model.state_dict().items():
        assert torch.equal(gan.state_dict()[f"generator_ema.{name}"], tensor)
