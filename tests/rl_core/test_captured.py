"""Steps as graphs or compiled: the same as one by one (offline_common, invariant 11), and refused where they would not be.

Graphs themselves need a GPU. What decides when one is captured and replayed is tested without, on a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from ope.data import InputError
from rl_core.families.offline import Draw, Learner, OfflineMethod, Stage, Transitions, mean_of
from rl_core.loss import Loss
from rl_core.methods.bc import BC
from rl_core.methods.iql import IQL
from rl_core.methods.mdpo import OffPolicyMDPO
from rl_core.methods.prdc import PRDC
from rl_core.methods.sac import SAC
from rl_core.methods.td3 import TD3, Twin
from rl_core.methods.td3_bc import TD3BC
from rl_core.models.mlp import Sizes
from rl_core.paper import Paper
from rl_core.trainers import captured
from rl_core.trainers.captured import Captured, compiled, period
from rl_core.trainers.offline import OfflineTrainer
from tests.rl_core.offline_methods import METHODS, SCHEDULE, Recorded, Replayed, flat, made, trainer

torch.set_num_threads(1)

CAPTURED: dict[str, OfflineMethod] = METHODS | {
    "IQL": IQL(cosine=False), "SAC": SAC(), "SAC, linear": SAC(form="linear"), "MDPO": OffPolicyMDPO(refresh=10),
    "PRDC": PRDC(search="tiles"), "PRDC, l2": PRDC(search="tiles", norm="l2"), "PRDC, kernel": PRDC(search="tiles", bandwidth=0.5),
}  # fmt: skip
EACH = pytest.mark.parametrize("method", CAPTURED.values(), ids=CAPTURED)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Noisy:
    """A method that learns nothing, tells what it drew, and has a stage and a copy that come seldom."""

    paper: ClassVar[Paper] = Paper("none", "Noise", "offline_common", {}, {})
    tau = 0.5

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        return {"actor": nn.Linear(sizes.obs, sizes.action)}

    def lagged(self) -> tuple[str, ...]:
        return ("actor",)

    def stages(self) -> tuple[Stage, ...]:
        def loss(name: str) -> Any:
            def told(learner: Learner, batch: Transitions, draw: Draw) -> Loss:
                noise = draw.normal(len(batch))
                return Loss((mean_of(learner.nets["actor"](batch.obs)[:, 0] * noise),), (1.0,), {name: mean_of(noise)})

            return told

        return Stage({"actor": 1e-3}, loss("often")), Stage({"actor": 1e-3}, loss("seldom"), 3, ("actor",), copied_every=12)


# without a GPU: what a step asks for


class Asked(TorchDispatchMode):
    """Remembers operations that wait for the device, or bring a number to it, which waits, too."""

    WAIT = (
        "_local_scalar_dense",
        "lift_fresh",
        "nonzero",
        "masked_select",
        "equal.default",
        "unique",
        "bincount",
        "repeat_interleave",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = "index" in str(func) and any(
            one is not None and one.dtype == torch.bool for one in args[1:2] for one in _tensors(one)
        )
        if masked or any(name in str(func) for name in self.WAIT):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _tensors(found: Any) -> list[Tensor]:
    return [one for one in (found if isinstance(found, list | tuple) else [found]) if isinstance(one, Tensor)]


@EACH
def test_nothing_in_a_step_waits_for_the_device(method: OfflineMethod) -> None:
    run = trainer(method)
    run.advance(2)
    with Asked() as asked:
        run.advance(4)
    assert asked.found == []
    with Asked() as asked:
        run.metrics()
    assert "aten._local_scalar_dense.default" in asked.found


# without a GPU: sums in place


@EACH
def test_what_a_step_tells_is_added_up_in_place(method: OfflineMethod) -> None:
    whole, single = trainer(method), trainer(method)
    whole.advance(12)
    held = [one for stage in whole.stages for pair in stage.sums.values() for one in pair]
    rows: list[dict[str, float]] = []
    for _ in range(12):
        single.advance()
        rows.append(single.metrics())
    found = whole.metrics()
    for name in found.keys() - {"step", "cpu_seconds"}:
        told = [row[name] for row in rows if name in row]
        assert len(told) in {6, 12}  # nothing is told of a stage that did not run
        assert found[name] == pytest.approx(sum(told) / len(told), rel=1e-5, abs=1e-6)
    assert whole.metrics().keys() == {"step", "cpu_seconds"}
    whole.advance(2)
    after = [one for stage in whole.stages for pair in stage.sums.values() for one in pair]
    assert all(one is other for one, other in zip(held, after, strict=True))


def test_sums_of_a_state_stay_as_they_were() -> None:
    run, other = trainer(TD3BC()), trainer(TD3BC())
    run.advance(6)
    state = run.state()
    kept = state["stages"][0]["sums"]["q"][0].clone()
    for one in (run, other):
        one.restore(state)
        one.advance(5)
    assert torch.equal(state["stages"][0]["sums"]["q"][0], kept)
    assert run.metrics() | {"cpu_seconds": 0} == other.metrics() | {"cpu_seconds": 0}


# without a GPU: when a graph is captured and replayed


def test_the_period_is_that_of_all_stages_and_copies() -> None:
    assert period(BC().stages()) == 1
    assert period(TD3(twin=Twin(actor_every=3)).stages()) == 3
    assert period(Noisy().stages()) == 12
    assert period((Stage({}, lambda *_: None, every=4), Stage({}, lambda *_: None, every=6, copied_every=9))) == 36  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "change", "wrong"),
    [
        (TD3BC(), {}, r"device: found cpu; expected cuda"),
        (IQL(), {}, r"found rates of actor that fall as a cosine; expected constant ones"),
        (PRDC(), {}, r"search: found Tree, which asks the CPU; expected tiles"),
        (PRDC(search="lists"), {}, r"search: found Lists, which asks the CPU; expected tiles"),
        (TD3BC(), {"capacity": 500}, r"found 200 rows and room for 500; expected a buffer that does not grow"),
        (TD3BC(), {"draw": Replayed([])}, r"found numbers of a Replayed; expected the trainer's own generator"),
    ],
)
def test_what_cannot_be_captured_is_refused(method: OfflineMethod, change: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        Captured(OfflineTrainer(method, made(), SCHEDULE, **change))


def test_priorities_are_refused() -> None:
    with pytest.raises(InputError, match=r"priority: found 0\.6; expected 0"):
        Captured(trainer(TD3BC(), priority=0.6))


def test_a_graph_has_at_least_a_step() -> None:
    with pytest.raises(InputError, match="steps: found 0; expected at least 1"):
        Captured(trainer(TD3BC()), 0)


class StandIn:
    """CUDA without a device: a graph replays the very stages that were asked for when it was captured."""

    def __init__(self, run: OfflineTrainer) -> None:
        self.run, self.captures, self.replays = run, list[int](), 0

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(register_generator_state=self.registered, replay=self.replay)

    def registered(self, rng: Any) -> None:
        assert rng is self.run.rng

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        assert all(group["capturable"] for stage in self.run.stages for group in stage.optimizer.param_groups)
        self.captures.append(self.run.step)
        self.run.advance = self.counted  # type: ignore[method-assign]
        yield
        del self.run.advance

    def counted(self, steps: int) -> None:
        self.run.step, self.length = self.run.step + steps, steps

    def replay(self) -> None:
        step, self.run.step = self.run.step, self.captures[-1]
        self.run.advance(self.length)
        self.run.step, self.replays = step, self.replays + 1

    def Stream(self) -> Any:  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def device(self, device: Any) -> Any:
        return nullcontext()

    stream = device


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made_of(run: OfflineTrainer, steps: int) -> tuple[Captured, StandIn]:
        run.device, stand_in = torch.device("cuda"), StandIn(run)
        monkeypatch.setattr(captured, "torch", SimpleNamespace(cuda=stand_in))
        return Captured(run, steps), stand_in

    return made_of


def alike(one: OfflineTrainer, other: OfflineTrainer, tolerance: float = 0.0) -> None:
    """Weights, copies, moments, generator, and what was told."""
    assert one.step == other.step
    assert torch.equal(one.rng.get_state(), other.rng.get_state())
    for a, b in ((one.nets, other.nets), (one.lagged, other.lagged)):
        found, wanted = list(a.parameters()), list(b.parameters())
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    for a, b in zip(one.stages, other.stages, strict=True):
        for kept, also in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
            assert kept["step"].item() == also["step"].item()
    told, wanted_told = one.metrics(), other.metrics()
    told["cpu_seconds"] = wanted_told["cpu_seconds"] = 0.0
    assert told == pytest.approx(wanted_told, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("method", "each"), [(TD3BC(), 20), (Noisy(), 24), (SAC(), 20)], ids=["TD3BC", "Noisy", "SAC"])
def test_pieces_of_any_length_are_the_steps_one_by_one(cuda: Any, method: Any, each: int) -> None:
    one, other = trainer(method), trainer(method)
    graphs, seen = cuda(one, 20)
    assert graphs.steps == each
    other.advance(5)
    one.advance(5)
    for piece in (1, 2, 65, 7, 100, 19, 43):
        graphs.advance(piece)
        other.advance(piece)
        alike(one, other)
    assert len(seen.captures) == 1
    assert seen.captures[0] % graphs.period == 0
    assert seen.captures[0] >= 5 + 1 + 2 + graphs.warm
    assert seen.replays >= 6
    assert not any(group["capturable"] for stage in one.stages for group in stage.optimizer.param_groups)


def test_a_restored_trainer_is_captured_anew(cuda: Any) -> None:
    one, other = trainer(Noisy()), trainer(Noisy())
    graphs, seen = cuda(one, 12)
    other.advance(17)
    one.restore(other.state())
    graphs.advance(60)
    kept = one.state()
    graphs.advance(30)
    one.restore(kept)
    graphs.advance(40)
    other.advance(100)
    alike(one, other)
    assert len(seen.captures) == 2
    again = trainer(Noisy())
    again.restore(one.state())
    for run in (one, again):
        run.advance(20)
    alike(one, again)


def test_other_weights_are_captured_anew(cuda: Any) -> None:
    one, other = trainer(TD3BC()), trainer(TD3BC())
    graphs, seen = cuda(one, 10)
    for weight in (torch.arange(200.0), torch.ones(200)):
        for run in (one, other):
            run.buffer.weigh(weight)
        graphs.advance(40)
        other.advance(40)
    graphs.advance(40)
    other.advance(40)
    alike(one, other)
    assert len(seen.captures) == 2


def test_a_buffer_that_changes_is_refused(cuda: Any) -> None:
    run = trainer(TD3BC())
    graphs, _ = cuda(run, 10)
    graphs.advance(40)
    run.add(made(7))
    with pytest.raises(InputError, match=r"found a buffer of \(200, 7\); expected that of \(200, 0\)"):
        graphs.advance(1)


# compiled


class Held(Replayed):
    """Numbers that are there already, which no compiler looks into."""

    normal = uniform = torch.compiler.disable(Replayed.normal)


QUIET = pytest.mark.filterwarnings("ignore")
"""PyTorch warns of its own when it compiles."""


@QUIET
@pytest.mark.parametrize("method", [TD3BC(), IQL()], ids=["TD3BC", "IQL"])
def test_traced_losses_are_the_losses(method: OfflineMethod) -> None:
    """On batches and numbers that were drawn before; operations as they are, since building kernels takes long."""
    plain = trainer(method)
    draw = plain.draw = Recorded(plain.draw)
    batches = [plain.buffer.draw(SCHEDULE.batch, torch.Generator().manual_seed(number)) for number in range(100)]
    for index in batches:
        plain.learn(plain.buffer.take(index))
    traces = list[Any]()

    def traced(graph: Any, inputs: Any) -> Any:
        traces.append(graph)
        return aot_eager(graph, inputs)

    other = compiled(OfflineTrainer(method, made(), SCHEDULE, draw=Held(draw.kept)), traced)
    for index in batches:
        other.learn(other.buffer.take(index))
    assert len(traces) >= len(plain.stages)
    found, wanted = ([*run.nets.parameters(), *run.lagged.parameters()] for run in (other, plain))
    torch.testing.assert_close(flat(found), flat(wanted), rtol=0, atol=1e-4)
    assert other.metrics() | {"cpu_seconds": 0} == pytest.approx(plain.metrics() | {"cpu_seconds": 0}, rel=1e-3, abs=1e-4)


# on a GPU


def on_gpu(method: OfflineMethod, **settings: Any) -> OfflineTrainer:
    return OfflineTrainer(method, made(), replace(SCHEDULE, **settings), device="cuda")


@GPU
@EACH
def test_graphs_are_the_steps_one_by_one(method: OfflineMethod) -> None:
    one, other = on_gpu(method), on_gpu(method)
    Captured(one).advance(100)
    other.advance(100)
    alike(one, other, 1e-4)


@GPU
@EACH
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_gpu(method: OfflineMethod) -> None:
    run = on_gpu(method)
    run.advance(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.advance(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_no_two_replays_draw_the_same() -> None:
    run = on_gpu(Noisy())
    graphs = Captured(run, 12)
    graphs.advance(36)
    told = []
    for _ in range(4):
        graphs.advance(12)
        told.append(run.metrics()["seldom"])
    assert len(set(told)) == 4


@GPU
def test_a_run_goes_on_from_graphs_and_with_them() -> None:
    one, other = on_gpu(TD3BC()), on_gpu(TD3BC())
    first = Captured(one)
    first.advance(50)
    other.restore(one.state())
    second = Captured(other)
    for graphs in (first, second):
        graphs.advance(75)
    alike(one, other, 1e-4)
    one.restore(other.state())
    first.advance(60)
    second.advance(60)
    alike(one, other, 1e-4)


@GPU
@QUIET
@pytest.mark.parametrize("method", [TD3BC(), SAC()], ids=["TD3BC", "SAC"])
def test_compiled_losses_are_the_losses_and_can_be_captured(method: OfflineMethod) -> None:
    torch.compiler.reset()
    one, other = compiled(on_gpu(method)), on_gpu(method)
    Captured(one).advance(100)
    other.advance(100)
    alike(one, other, 1e-4)
