"""The search for candidates: what it tries, accepts and keeps, and when it stops. Times are made up; the rest is real."""

from __future__ import annotations

import dataclasses
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from parallax_compile.lowering import compile_pool, tuned
from parallax_compile.lowering.candidates import Candidate, shared_memory, table
from parallax_compile.lowering.codegen import GeneratedKernel, Trial, generate
from parallax_compile.lowering.compile_pool import CompilePool
from parallax_compile.lowering.cubin import Resources
from parallax_compile.lowering.model import ModelTimer, blocks_per_sm, efficiency
from parallax_compile.lowering.race import race
from parallax_compile.lowering.search import Search
from parallax_compile.lowering.space import EFFORTS, SPACES, explore, registers
from parallax_compile.lowering.store import Store
from parallax_compile.lowering.targets import resolve

import parallax_compile as plx
from parallax_compile.errors import InputError, InputTypeError, UnsupportedError
from parallax_compile.shapes import Shape
from parallax_compile.tuning import candidate_text

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are generated, not interpreted"
)


# --- the race -------------------------------------------------------------------------------------------------------


def noisy(times: dict[str, float], noise: float = 0.02) -> tuple[Callable[[str, int], list[float]], dict[str, int]]:
    generator, counts = random.Random(0), dict.fromkeys(times, 0)

    def sample(name: str, repeats: int) -> list[float]:
        counts[name] += repeats
        if times[name] != times[name]:
            raise RuntimeError("out of resource: shared memory")
        # Now and then something else runs on the device.
        return [times[name] * generator.gauss(1, noise) * generator.choice([1] * 9 + [3]) for _ in range(repeats)]

    return sample, counts


def test_a_race_finds_the_fastest_and_spends_its_samples_on_those_that_are_near() -> None:
    times = {"default": 1.0, "slow": 2.0, "near": 0.905, "best": 0.89, "broken": float("nan")}
    sample, counts = noisy(times)
    outcome = race(list(times), sample, rounds=40, repeats=5)
    assert outcome.winner == "best"
    assert list(outcome.failures) == ["broken"] and counts["broken"] == 5
    assert counts["slow"] == counts["default"] == 5 < counts["near"] <= counts["best"] < 200


def test_of_two_that_tie_the_preferred_one_wins() -> None:
    sample, _ = noisy({"default": 1.0, "other": 0.999}, noise=0.0)
    assert race(["default", "other"], sample, rounds=5, repeats=5).winner == "default"


def test_a_race_that_nobody_finishes_has_no_winner() -> None:
    sample, _ = noisy({"a": float("nan"), "b": float("nan")})
    outcome = race(["a", "b"], sample, rounds=5, repeats=5)
    assert outcome.winner is None and len(outcome.failures) == 2


# --- spaces and estimates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SPACES)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("probe", [True, False])
def test_a_space_begins_with_the_table_and_has_no_tile_that_cannot_be_good(stage: str, width: int, probe: bool) -> None:
    rows, found = table(stage, width, width, 2, probe), explore(stage, width, width, 2, probe)
    assert found[: len(rows)] == rows and len(set(found)) == len(found)
    assert len(found) > len(rows)
    for candidate in found[len(rows) :]:
        assert candidate.tma in SPACES[stage].tma and candidate.held <= SPACES[stage].held[probe]
        assert SPACES[stage].spills or registers(stage, candidate, width, width, probe) <= 255


def test_a_stage_without_a_space_is_searched_around_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SPACES, "core_forward")
    rows, found = table("core_forward", 64, 64, 2, True), explore("core_forward", 64, 64, 2, True)
    assert found[: len(rows)] == rows and len(found) > 2 * len(rows)
    assert dataclasses.replace(rows[0], num_stages=rows[0].num_stages - 1) in found


def test_estimates_grow_with_what_is_held() -> None:
    small, large = Candidate(64, 32, 4, 2), Candidate(64, 64, 4, 3)
    for stage in SPACES:
        assert shared_memory(stage, small, 64, 64, 2, True) < shared_memory(stage, large, 64, 64, 2, True)
        assert registers(stage, small, 64, 64, True) < registers(stage, large, 64, 64, True)


def test_the_model_knows_rows_of_matrix_instructions_and_tensor_memory() -> None:
    target = resolve("sm_100")
    resources = Resources(128, 0, 0, 0, 32 * 1024, 4, 2, tensor_memory=256)
    assert blocks_per_sm(resources, target) == 2
    assert blocks_per_sm(dataclasses.replace(resources, tensor_memory=257), target) == 1
    assert blocks_per_sm(dataclasses.replace(resources, tensor_memory=640), target) == 0
    whole, losses = efficiency((64, 128), resources, target, rows=128)
    half, said = efficiency((64, 128), resources, target, rows=64)
    assert half == pytest.approx(whole / 2) and len(said) == len(losses) + 1
    assert efficiency((32, 64), resources, resolve("sm_89")) == efficiency(
        (32, 64), resources, resolve("sm_89"), rows=64
    )


def test_a_short_search_sees_every_tile_and_only_what_the_target_holds() -> None:
    rows = table("core_backward_query", 64, 64, 2, True)
    found = explore("core_backward_query", 64, 64, 2, True, resolve("sm_89"))
    assert not any(candidate.tma for candidate in found)
    assert all(shared_memory("core_backward_query", c, 64, 64, 2, 1) <= 99 * 1024 for c in found)
    every = {(c.block_m, c.block_n) for c in found}
    # Not one tile in all its variants before the next.
    assert {(c.block_m, c.block_n) for c in found[: len(rows) + len(every)]} == every


def test_the_model_knows_occupancy_spills_and_idle_multiprocessors() -> None:
    target = resolve("sm_90")
    light = Resources(128, 0, 0, 0, 32 * 1024, 4, 2)
    heavy = dataclasses.replace(light, registers=255, shared_memory=200 * 1024)
    assert (blocks_per_sm(light, target), blocks_per_sm(heavy, target)) == (4, 1)
    best, _ = efficiency((64, 64), light, target, 132 * 40)
    for resources, blocks, said in (
        (heavy, 132 * 40, "hide little latency"),
        (dataclasses.replace(light, spill_stores=800), 132 * 40, "spill"),
        (light, 133, "idle"),
    ):
        share, losses = efficiency((64, 64), resources, target, blocks)
        assert 0 < share < best and any(said in loss for loss in losses)


# --- the compiling processes ----------------------------------------------------------------------------------------


def test_workers_compile_count_errors_and_survive_a_compiler_that_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A checkout has a folder of the package's name, without what belongs to the package.
    (tmp_path / "parallax_compile").mkdir()
    (tmp_path / "parallax_compile" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    inputs = [torch.empty(1, 1, 64, 16, dtype=torch.float16, device="meta") for _ in range(3)]
    code = generate(lambda *t: plx.attention(*t), inputs, target="sm_90", backward=False)
    kernel = code.stage("core_forward")
    broken = kernel.source.replace("tl.program_id(0)", "tl.program_id(0) + nonsense", 1)
    assert broken != kernel.source
    with CompilePool(1, resolve("sm_90"), report=True) as pool:
        kernels = [("crash", "f", "import os; os._exit(3)"), ("broken", kernel.name, broken)]
        answers = dict(pool.compile([*kernels, ("good", kernel.name, kernel.source)]))
    assert answers["crash"]["cause"] == "compiler crashed"
    assert answers["broken"]["cause"].startswith("compile error")
    assert answers["good"]["resources"]["registers"] > 0 and "error" not in answers["good"]


# --- the whole ------------------------------------------------------------------------------------------------------

CAUSAL = plx.PARALLAX.replace(mask_mod=plx.masks.causal())
SHAPE = "1,2,256,64"


class MadeUp:
    """Times by candidate."""

    name, tested, execute = "a test", True, None

    def __init__(self, milliseconds: Callable[[Candidate], float], wrong: Sequence[Candidate] = ()) -> None:
        self.milliseconds, self.wrong, self.loaded = milliseconds, wrong, []  # type: ignore[var-annotated]

    def load(self, kernel: GeneratedKernel) -> None:
        self.loaded.append(kernel.stage)

    def sample(self, trial: Trial, repeats: int) -> list[float]:
        return [self.milliseconds(trial.candidate)] * repeats

    def difference(self, trial: Trial, default: Trial) -> float:
        return 1.0 if trial.candidate in self.wrong else 0.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    def compiled(request: dict[str, Any]) -> dict[str, Any]:
        resources = dataclasses.asdict(Resources(128, 0, 0, 0, 1024, 4, 2))
        if "BLOCK_N : tl.constexpr = 32" in request["source"]:
            return {"seconds": 0.0, "error": "no", "cause": "out of shared memory"}
        return {"seconds": 0.0, "resources": resources}

    monkeypatch.setattr(compile_pool, "compiled", compiled)
    for effort, count in (("quick", 7), ("normal", 9)):
        monkeypatch.setitem(EFFORTS, effort, EFFORTS[effort]._replace(candidates=count))
    with tuned.using(Store(tmp_path / "store")) as store:
        yield store


def tune(measures: Any, **options: Any) -> Any:
    options = {
        "stages": ["core_forward"],
        "effort": "quick",
        "target": "sm_90",
        "workers": 0,
        "backward": False,
        **options,
    }
    return plx.autotune(CAUSAL, SHAPE, measures=measures, **options)


def test_a_winner_is_kept_and_taken_by_the_next_call(store: Store) -> None:
    picked = table("core_forward", 64, 64, 2, True)[2]
    report = tune(MadeUp(lambda candidate: 0.5 if candidate == picked else 1.0))
    (stage,) = report.stages
    assert (stage.candidate, stage.speedup, report.saved) == (dataclasses.asdict(picked), 2.0, True)
    assert stage.tried <= EFFORTS["quick"].candidates and stage.failed["out of shared memory"] >= 1  # type: ignore[operator]
    text = str(report)
    assert "core_forward" in text and "2.000" in text and "out of shared memory" in text
    inputs = Shape.of(SHAPE).tensors(CAUSAL, torch.bfloat16)
    with tuned.listening() as heard:
        code = generate(lambda *t: plx.attention(*t, spec=CAUSAL), inputs, target="sm_90", backward=False)
    assert [found.level for found in heard] == ["exact"]
    assert code.stage("core_forward").parameters["BLOCK_N"] == picked.block_n
    (entry,) = store.entries().values()
    assert entry.provenance["tested"] and entry.result["effort"] == "quick"


def test_a_second_run_keeps_what_the_first_found_and_more_effort_or_again_searches(store: Store) -> None:
    tune(MadeUp(lambda candidate: 1.0))
    second = MadeUp(lambda candidate: 1.0)
    assert [stage.note for stage in tune(second).stages] == ["kept from the store"] and not second.loaded
    assert tune(second, effort="normal").stages[0].tried > EFFORTS["quick"].candidates  # type: ignore[operator]
    assert tune(second, again=True).stages[0].tried > 0


def test_the_fastest_that_computes_something_else_does_not_win(store: Store) -> None:
    rows = table("core_forward", 64, 64, 2, True)
    speed = {rows[1]: 0.4, rows[2]: 0.5}
    report = tune(MadeUp(lambda candidate: speed.get(candidate, 1.0), wrong=[rows[1]]))
    assert report.stages[0].candidate == dataclasses.asdict(rows[2])
    assert report.stages[0].failed["wrong result"] == 1


def test_a_candidate_that_cannot_be_launched_is_counted(store: Store) -> None:
    def milliseconds(candidate: Candidate) -> float:
        if candidate.tma:
            raise RuntimeError("OutOfResources: shared memory")
        return 1.0

    assert tune(MadeUp(milliseconds)).failed["out of shared memory"] >= 2


def test_an_interrupt_keeps_what_was_found_and_the_next_run_goes_on(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(MadeUp):
        def sample(self, trial: Trial, repeats: int) -> list[float]:
            if self.loaded == ["core_forward", "core_backward_query"] and trial.candidate.block_m == 128:
                raise KeyboardInterrupt
            return super().sample(trial, repeats)

    with pytest.raises(KeyboardInterrupt):
        tune(Interrupted(lambda candidate: 1.0), stages="all", backward=True)
    assert "interrupted" in capsys.readouterr().err
    efforts = {entry.key["stage"]: entry.result["effort"] for entry in store.entries().values()}
    assert efforts == {"core_forward": "quick"}
    notes = {
        stage.stage: stage.note for stage in tune(MadeUp(lambda candidate: 1.0), stages="all", backward=True).stages
    }
    assert notes == {"core_forward": "kept from the store", "core_backward_query": "", "core_backward_key": ""}


def test_an_interrupt_while_compiling_counts_what_was_compiled(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, asked = compile_pool.compiled, iter(range(100))

    def compiled(request: dict[str, Any]) -> dict[str, Any]:
        if next(asked) == 3:
            raise KeyboardInterrupt
        return fine(request)

    monkeypatch.setattr(compile_pool, "compiled", compiled)
    with pytest.raises(KeyboardInterrupt):
        tune(MadeUp(lambda candidate: 1.0))
    row = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("core_forward"))
    assert row.split()[-3] == "3" and row.endswith("interrupted")  # tried, failed, note


def test_every_candidate_takes_what_the_graphs_kernel_is_launched_with() -> None:
    # Inductor would fuse what follows the adjoint solve into its kernel, with outputs that candidates do not have.
    spec = plx.LLA.replace(mask_mod=plx.masks.causal(), probe=plx.Solved(ridge=1.0))
    target = resolve("sm_90")
    inputs = Shape.of("1,2,64,32").tensors(spec, torch.bfloat16, "meta", requires_grad=True)
    spaces = {"core_solve": explore("core_solve", 32, 32, 2, True, target)[:2]}
    search = Search(lambda *x: plx.attention(*x, spec=spec), inputs, target, ModelTimer(target), spaces, "quick")
    instances = search.instances()
    assert len(instances) == 2  # the solve and its adjoint
    for instance in instances:
        (kernel,) = [kernel for kernel in search.code.kernels if instance.is_of(kernel)]
        taken = {source_arguments(trial.source) for trial in (kernel, *instance.trials)}
        assert len(taken) == 1, taken


def source_arguments(source: str) -> str:
    """The parameters of a generated kernel, as its text has them."""
    return re.findall(r"^def parallax_\w+\((.*?)\):", source, re.MULTILINE)[-1]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="effort must be one of"):
        tune(None, effort="much")
    with pytest.raises(InputTypeError, match="spec must be"):
        plx.autotune("PARALLAX", SHAPE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape must be"):
        plx.autotune(CAUSAL, "4,16")
    with pytest.raises(InputError, match="core_typo"):
        tune(MadeUp(lambda candidate: 1.0), stages=["core_typo"])
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"dtypes": []}, InputError, "dtypes must name at least one"),
        ({"shapes": []}, InputError, "shapes must name at least one"),
        ({"shapes": None}, InputTypeError, "shape must be a string or a tuple"),
        ({"stages": []}, InputError, "stages must name at least one"),
        ({"stages": 3}, InputError, "stages must be of core_forward.* but got 3"),
        ({"backward": "no"}, InputTypeError, "backward must be a bool"),
        ({"store": "/tmp/x"}, InputTypeError, "store must be .*PARALLAX_STORE"),
        ({"measures": 3}, InputError, "measures must be"),
        ({"workers": -1}, InputError, "workers must be an integer of at least 0"),
        ({"workers": "2"}, InputError, "workers must be"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            plx.autotune(CAUSAL, **{"shapes": SHAPE, "measures": "model"} | change)
    assert candidate_text({"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 3, "tma": True, "held": 1}) == (
        "64x32, 4 warps, 3 stages, TMA, 1 held"
    )
    assert candidate_text({"tile": 3}) == "tile 3"
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="measures='model'"):
            tune(None)


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("4,16,4096,128", [4, 16, 16, 4096, 4096, 128, 128]),
        ("2,32:8,1:4096,128:64", [2, 32, 8, 1, 4096, 128, 64]),
        ((2, (8, 2), 512, 64), [2, 8, 2, 512, 512, 64, 64]),
    ],
)
def test_shapes(text: Any, sizes: list[int]) -> None:
    shape = Shape.of(text)
    assert shape.sizes() == sizes and Shape.of(str(shape)) == shape


@pytest.mark.parametrize("wrong", ["1,2,3", "1:2,2,3,4", "a,b,c,d", "1,3:2,4,5", (1, 2, 0, 4), (1, 2, 3.0, 4)])
def test_wrong_shapes(wrong: Any) -> None:
    with pytest.raises(InputError):
        Shape.of(wrong)
    with pytest.raises(InputTypeError):
        Shape.of(5)
