"""The whole step as one graph: a tape for the CPU in CUDA's place records and replays it, and the plain step judges."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.training import GANTrainer, step_graph
from fastgan.training.step_graph import CUDAGraph
from fastgan.training.step_result import NAMES, StepResult
from tests.training.test_gan import batches, pair

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:real and fake go through"),
    pytest.mark.filterwarnings("ignore:real runs from"),
]

LR = 2.0**-9  # a float32 as well, as the recorded step reads it


class Tape(TorchDispatchMode):
    """Records the operations of a call with their tensors, and does them again with the same ones.

    As on a GPU a replay calls no Python of the step, reads and writes the recording's memory and draws on from torch's
    generator, and a value that the host asks for cannot be recorded. (Recording a call also does it, for a CPU has no
    other way; the replay that follows at once is then done already.)
    """

    def __init__(self):
        super().__init__()
        self.captures = self.warm_ups = self.replays = 0
        self.rehearses = self.asked = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            if not self.rehearses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
            self.asked = True
        result = operator(*args, **(kwargs or {}))
        self.tape.append((operator, args, kwargs or {}, result))
        return result

    def warm_up(self, call):
        self.warm_ups += 1
        return call()

    def rehearse(self, call):
        self.tape, self.rehearses = [], True
        with self:
            result = call()
        self.rehearses = False
        return result, "the host waits for the device in it" if self.asked else None

    def capture(self, call):
        self.captures += 1
        self.tape, self.done = [], True
        with self:
            self.result = call()

    def replay(self):
        self.replays += 1
        if not self.done:
            with torch.no_grad():
                for operator, args, kwargs, recorded in self.tape:
                    result = operator(*args, **kwargs)
                    was, now = (torch.utils._pytree.tree_leaves(each) for each in (recorded, result))
                    for to, tensor in zip(was, now, strict=True):
                        if isinstance(to, torch.Tensor) and to.data_ptr() != tensor.data_ptr():
                            to.detach().copy_(tensor)
        self.done = False
        return self.result


class Both:
    """A trainer and one with a tape, from the same networks."""

    def __init__(self, change=lambda generator, discriminator: None, optimizers=None, **settings):
        networks = pair(dtype=settings.pop("dtype", torch.float64))
        change(*networks)
        self.trainers = []
        for graphed in (False, True):
            generator, discriminator = copy.deepcopy(networks)
            own = optimizers and optimizers(generator, discriminator)
            self.trainers.append(GANTrainer(generator, discriminator, (6, 1, 1), lr=LR, optimizers=own, **settings))
            if graphed:
                self.tape = Tape()
                self.trainers[-1]._graphed = self.trainers[-1]._graphed_by(self.tape)
        self.plain, self.graphed = self.trainers

    def train(self, sizes, between=lambda trainer, step: None):
        real, noises = batches(sizes)
        for trainer in self.trainers:
            torch.manual_seed(1)
            losses = []
            for step, images in enumerate(real):
                noise = noises[step] if trainer.seed is None else None
                losses.append(list(trainer.train_step(images.to(trainer.dtype), noise).values()))
                between(trainer, step)
            if trainer is self.plain:
                expected = losses
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=1e-6)
        self.check()

    def check(self):
        for name in ("generator", "discriminator"):
            plain, graphed = (getattr(trainer, name) for trainer in self.trainers)
            for (key, value), other in zip(plain.state_dict().items(), graphed.state_dict().values(), strict=True):
                torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12, msg=f"{name}.{key}")
            for a, b in zip(plain.parameters(), graphed.parameters(), strict=True):
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-12)


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the training step is not a CUDA graph")
        yield


def spectral_norm(generator, discriminator):
    first, second = [layer for layer in discriminator.main if isinstance(layer, nn.Conv2d)][:2]
    nn.utils.spectral_norm(first)
    nn.utils.parametrizations.spectral_norm(second)


def dropout(generator, discriminator):
    discriminator.main.insert(2, nn.Dropout(0.5))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 3, "penalty": "wgan-gp", "loss": "wasserstein"},
        {"penalty": "r1", "replace": False},
        {"change": spectral_norm},
        {"change": dropout, "seed": 3},
        {"precision": "bfloat16", "dtype": torch.float32, "seed": 1},
    ],
    ids=lambda settings: "-".join(map(str, settings)) or "plain",
)
def test_the_same_parameters_and_losses_as_step_by_step(settings, no_warning):
    both = Both(**settings)
    calls = []

    def count(trainer):  # without a hook
        kind = type(trainer.generator)

        class Counting(kind):
            def forward(self, noise):
                calls.append(trainer)
                return super().forward(noise)

        trainer.generator.__class__ = Counting

    for trainer in both.trainers:
        count(trainer)
    both.train([6] * 9)
    assert both.tape.captures == 1
    assert both.tape.replays == 9 - step_graph.WARM_UP
    assert calls.count(both.plain) == 9
    assert calls.count(both.graphed) == step_graph.WARM_UP + 1


def test_the_steps_own_noise_goes_on_from_torchs_generator(no_warning):
    both = Both()
    real, _ = batches([6] * 8)
    losses = []
    for trainer in both.trainers:
        torch.manual_seed(4)
        losses.append([trainer.train_step(images)["loss_g"] for images in real])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    both.check()


def test_the_last_batch_of_an_epoch_runs_beside_the_recording(no_warning):
    both = Both(seed=1)
    both.train([6, 6, 6, 6, 6, 4, 6, 6, 4, 6])
    assert both.tape.captures == 1
    assert both.tape.replays == 5
    both.train([4] * 5)  # from now on
    assert both.tape.captures == 2
    both.train([4, 3])  # the gradients are those of the last step, whoever made it


def test_a_schedule_of_the_learning_rate_needs_no_new_recording(no_warning):
    both = Both(seed=1)
    schedules = {
        trainer: [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (trainer.optimizer_g, trainer.optimizer_d)]
        for trainer in both.trainers
    }
    both.train([6] * 9, lambda trainer, step: [schedule.step() for schedule in schedules[trainer]])
    assert both.tape.captures == 1
    for trainer in both.trainers:
        for optimizer in (trainer.optimizer_g, trainer.optimizer_d):
            group = optimizer.param_groups[0]
            assert (group["lr"], group["capturable"]) == (LR / 2**4, False)
            group["lr"] = torch.tensor(LR)
    both.train([6] * 2)
    assert both.tape.captures == 1


def test_other_settings_and_a_loaded_state_make_a_new_recording(no_warning):
    both = Both(seed=1)
    saved = {trainer: copy.deepcopy(trainer.state_dict()) for trainer in both.trainers}
    both.train([6] * 5)
    for trainer in both.trainers:
        trainer.load_state_dict(copy.deepcopy(saved[trainer]))
    both.train([6] * 6)
    assert both.tape.captures == 2
    changes = [
        lambda trainer: trainer.discriminator.main[0].weight.requires_grad_(False),
        lambda trainer: trainer.discriminator.main[0].weight.requires_grad_(True),
        lambda trainer: trainer.discriminator.main[3].eval(),
        lambda trainer: trainer.optimizer_d.param_groups[0].update(betas=(0.25, 0.5)),
        lambda trainer: setattr(trainer, "real_label", 0.9),
    ]
    for count, change in enumerate(changes, 3):
        for trainer in both.trainers:
            change(trainer)
        both.train([6] * 5)
        assert both.tape.captures == count


def test_a_state_goes_on_in_another_trainer():
    both, later = Both(seed=1), Both(seed=1)
    both.train([6] * 6)
    for trainer, other in zip(both.trainers, later.trainers, strict=True):
        other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    real, _ = batches([6] * 6)
    for images in real:
        losses = [trainer.train_step(images)["loss_d"] for trainer in (*both.trainers, *later.trainers)]
        assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-6)


def sgd(generator, discriminator):
    return [torch.optim.SGD(module.parameters(), LR) for module in (generator, discriminator)]


def slow_adam(generator, discriminator):
    return [torch.optim.Adam(module.parameters(), LR) for module in (generator, discriminator)]


def clipped(generator, discriminator):
    optimizers = [torch.optim.Adam(module.parameters(), LR, fused=True) for module in (generator, discriminator)]

    def clip(optimizer, *_):
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1e-2)

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(clip)
    return optimizers


def forward_hook(generator, discriminator):
    generator.main[0].register_forward_hook(lambda *_: None)


def gradient_hook(generator, discriminator):
    generator.main[0].weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


class Asking(nn.Module):
    def forward(self, x):
        return x if x.detach().mean().item() > -100 else -x


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizers": sgd}, "the optimizer is SGD"),
        ({"optimizers": slow_adam}, "Adam was made without fused=True"),
        ({"optimizers": clipped}, "Adam has a step hook"),
        ({"change": forward_hook}, r"main\.0 has a hook"),
        ({"change": lambda g, d: d.main.insert(1, Asking())}, "the host waits for the device in it"),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly_and_one_line_says_why(settings, reason):
    both = Both(**settings)
    with pytest.warns(UserWarning, match=f"^the training step is not a CUDA graph, and slower: {reason}") as said:
        both.train([6] * 6)
    assert len([w for w in said if "CUDA graph" in str(w.message)]) == 1
    assert both.tape.replays == 0


def test_a_recording_that_fails_nevertheless(monkeypatch):
    both = Both(seed=1)

    def capture(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(both.tape, "capture", capture)
    reason = r"recording it failed \(RuntimeError: operation not permitted when stream is capturing\)$"
    with pytest.warns(UserWarning, match=f"and slower: {reason}"):
        both.train([6] * 6)
    assert both.tape.replays == 0


class Cyclic(nn.Module):
    """Leaves garbage that only the collector frees, as an older trainer with its recorded graph is."""

    freed_while: ClassVar[set[str]] = set()
    now = "a step"

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            Cyclic.freed_while.add(Cyclic.now)

    def forward(self, x):
        self.Garbage()
        return x


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_during_the_recording(monkeypatch, enabled, fails):
    both = Both(change=lambda generator, discriminator: discriminator.main.insert(1, Cyclic()), seed=1)
    Cyclic.freed_while.clear()
    capture, freed_before = both.tape.capture, set()

    def watched(call):
        freed_before.update(Cyclic.freed_while)
        monkeypatch.setattr(Cyclic, "now", "the recording")
        capture(call)
        monkeypatch.setattr(Cyclic, "now", "a step")
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(both.tape, "capture", watched)
    before, thresholds = gc.isenabled(), gc.get_threshold()
    gc.set_threshold(1)  # a collection at every other allocation
    try:
        real, noises = batches([6] * 5)
        for step, images in enumerate(real):
            gc.enable() if enabled else gc.disable()
            if step == step_graph.WARM_UP:
                gc.disable()
                Cyclic.Garbage()  # for the step's own collection
                monkeypatch.setattr(Cyclic, "now", "before it")
                gc.enable() if enabled else None
            if fails and step == step_graph.WARM_UP:
                with pytest.warns(UserWarning, match="recording it failed"):
                    both.graphed.train_step(images, noises[step])
            else:
                both.graphed.train_step(images, noises[step])
            assert gc.isenabled() == enabled
    finally:
        gc.set_threshold(*thresholds)
        gc.enable() if before else gc.disable()
    assert "before it" in freed_before
    assert "the recording" not in Cyclic.freed_while


def test_a_gradient_hook_works_and_is_said():
    generator, discriminator = pair()
    trainer = GANTrainer(generator, discriminator, (6, 1, 1), lr=LR)
    gradient_hook(trainer.generator, trainer.discriminator)
    trainer._graphed = trainer._graphed_by(Tape())
    real, noises = batches([4])
    with pytest.warns(UserWarning, match=r"main\.0\.weight has a gradient hook"):
        trainer.train_step(real[0], noises[0])
    assert trainer.generator.main[0].weight.grad.abs().max() <= 1e-3


def test_a_hook_set_after_the_recording_is_called():
    both = Both(seed=1)
    both.train([6] * 5)
    called = []
    both.graphed.generator.main[0].register_forward_hook(lambda *_: called.append(1))
    with pytest.warns(UserWarning, match="has a hook"):
        both.train([6] * 2)
    assert len(called) == 2


def test_autocast_around_the_step_and_settings_that_never_rest():
    both = Both(seed=1, dtype=torch.float32)
    real, _ = batches([4])
    with pytest.warns(UserWarning, match="autocast is on around train_step"), torch.autocast("cpu", torch.bfloat16):
        both.graphed.train_step(real[0].float())

    def momentum(trainer, step):
        for optimizer in (trainer.optimizer_d, trainer.optimizer_g):
            optimizer.param_groups[0]["betas"] = (0.5 + step / 100, 0.999)

    both = Both(seed=1)
    with pytest.warns(UserWarning, match="settings change from step to step"):
        both.train([4] * 14, momentum)


def spoilt_step(both):
    real, _ = batches([4])
    real[0][0, 0, 0, 0] = float("nan")
    return real[0], both.graphed.train_step(real[0])


def test_a_loss_that_is_not_finite_is_said_when_it_is_looked_at():
    both = Both(seed=1)
    both.train([4] * 5)
    step = both.graphed.step
    _, result = spoilt_step(both)
    assert both.tape.replays == 3
    for look in (lambda: result["loss_g"], lambda: dict(result), lambda: json.dumps(result)):
        with pytest.raises(FloatingPointError, match=f"loss_d is nan at step {step + 1}"):
            look()


def test_a_loss_that_nobody_looks_at_is_said_by_the_next_step_or_the_state():
    both = Both(seed=1)
    both.train([4] * 5)
    good = both.graphed.state_dict()
    step = both.graphed.step
    real, _ = spoilt_step(both)
    with pytest.raises(FloatingPointError, match=f"loss_d is nan at step {step + 1}"):
        both.graphed.train_step(real)
    with pytest.raises(FloatingPointError, match=f"at step {step + 2}"):
        both.graphed.state_dict()
    both.graphed.state_dict()  # it has been said
    spoilt_step(both)
    both.graphed.load_state_dict(good)
    both.graphed.train_step(batches([4])[0][0])


def test_results_keep_their_own_numbers_while_steps_go_on():
    both = Both(seed=1)
    real, noises = batches([4] * 6)
    expected, results = ([t.train_step(x, z) for x, z in zip(real, noises, strict=True)] for t in both.trainers)
    assert type(results[-1]) is StepResult
    for one, other in zip(results, expected, strict=True):
        assert list(one) == ["loss_d", "loss_g", "d_real", "d_fake"]
        torch.testing.assert_close(dict(one), dict(other), rtol=1e-6, atol=1e-6)


def unread(values=(1.0, 2.0, 0.5, 0.25)):
    """A result, and how often it has been read."""
    reads = []
    return StepResult(lambda: reads.append(1) or list(values), lambda _: None), reads


@pytest.mark.parametrize("look", [
    lambda r: r["loss_d"], len, list, repr, dict, str, lambda r: dict(**r), lambda r: {**r}, lambda r: r | {},
    lambda r: r == {}, lambda r: r.get("d_fake"), lambda r: "loss_d" in r, json.dumps, copy.copy, copy.deepcopy,
    pickle.dumps, lambda r: r.copy(), lambda r: r.update(wait=1), lambda r: r.setdefault("loss_d"),
    lambda r: list(reversed(r)),
])  # fmt: skip
def test_a_result_is_read_at_the_first_look_of_whatever_kind(look):
    result, reads = unread()
    assert not reads
    look(result)
    assert reads == [1]
    assert {k: result[k] for k in NAMES} == {"loss_d": 1.0, "loss_g": 2.0, "d_real": 0.5, "d_fake": 0.25}
    assert reads == [1]


def test_a_result_is_a_dict_to_whoever_asks():
    result, _ = unread()
    plain = {"loss_d": 1.0, "loss_g": 2.0, "d_real": 0.5, "d_fake": 0.25}
    assert json.loads(json.dumps(result)) == plain
    assert pickle.loads(pickle.dumps(result)) == plain == result
    assert f"{result}" == f"{plain}"
    result["wait"] = 0.5
    assert result == plain | {"wait": 0.5}


def test_the_cpu_and_a_switch_leave_it_out():
    generator, discriminator = pair()
    assert GANTrainer(generator, discriminator)._graphed is None


def test_a_rehearsal_tells_where_the_host_waited(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    graph = CUDAGraph(torch.device("cuda", 0))
    monkeypatch.setattr(graph, "warm_up", lambda call: call())

    def call():
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        warnings.warn("another one", stacklevel=1)
        return 1

    with pytest.warns(UserWarning, match="^another one$") as said:
        result, reason = graph.rehearse(call)
    assert (result, len(said), modes) == (1, 1, ["warn", 0])
    assert reason.startswith(f"the host waits for the device in it, at {__file__}:")
    assert graph.rehearse(lambda: 2) == (2, None)


def test_after_a_failed_recording_torchs_generator_is_as_before(monkeypatch):
    class Generator:
        state = "before"

        def clone_state(self):
            return "a copy of it"

        def graphsafe_set_state(self, state):
            self.state = state

    generator = Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", [None, generator])
    graph = CUDAGraph(torch.device("cuda", 1))
    monkeypatch.setattr(graph, "_capture", lambda call: call())
    graph.capture(lambda: 1)
    assert generator.state == "before"
    with pytest.raises(ZeroDivisionError):
        graph.capture(lambda: 1 / 0)
    assert generator.state == "a copy of it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_device(precision, no_warning):
    networks = pair(64, dtype=torch.float32)
    losses = []
    for cuda_graph in (False, True):
        generator, discriminator = copy.deepcopy(networks)
        settings = {"device": "cuda", "seed": 1, "precision": precision, "lr": LR, "cuda_graph": cuda_graph}
        trainer = GANTrainer(generator, discriminator, **settings)
        assert (trainer._graphed is not None) == cuda_graph
        real, _ = batches([16] * 8 + [5] + [16] * 3, 64)
        losses.append([list(trainer.train_step(images.float()).values()) for images in real])
    assert isinstance(trainer._graphed._graph, CUDAGraph)
    assert trainer._graphed.is_recorded
    torch.testing.assert_close(torch.tensor(losses[1][:5]), torch.tensor(losses[0][:5]), rtol=1e-2, atol=1e-2)
