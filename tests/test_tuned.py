"""The store of tuned candidates: many processes, damaged and read-only files, and which level answers a lookup."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock  # noqa: F401  (imported here, because a test drops the right to read the environment's files)
import platformdirs  # noqa: F401
import pytest
import torch
from parallax_compile.lowering import cache_key, codegen, tuned
from parallax_compile.lowering.candidates import Candidate, candidates
from parallax_compile.lowering.store import FORMAT, Entry, Store, decoded, default_directory, encoded

import parallax_compile as plx
from parallax_compile.errors import StoreError

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="not about the interpreter")

CAUSAL = plx.PARALLAX.replace(mask_mod=plx.masks.causal())


def entry(number: int = 0, **key: Any) -> Entry:
    key = {"device": "Some GPU", "stage": f"stage {number}", **key}
    return Entry(key, dataclasses.asdict(Candidate(64, 32, 4, 2)), {"milliseconds": 1.0}, {"source": "a test"})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with tuned.using(Store(tmp_path / "store")) as store:
        yield store


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_store_round_trips_and_is_read_again_when_another_process_changed_it(store: Store) -> None:
    assert store.entries() == {} and store.fingerprint() == ""
    assert store.put([entry(1), entry(2, device="Another GPU")])
    assert sorted(path.name for path in store.directory.glob("*.json")) == ["another-gpu.json", "some-gpu.json"]  # type: ignore[union-attr]
    other = Store(store.directory)
    assert other.entries() == store.entries() == {e.digest: e for e in (entry(1), entry(2, device="Another GPU"))}
    before = store.fingerprint()
    other.put([entry(3)])
    assert len(store.entries()) == 3 and store.fingerprint() not in ("", before)
    assert store.remove(lambda e: e.key["stage"] == "stage 3") == 1
    assert store.fingerprint() == before


def test_two_processes_put_into_one_store_at_once(tmp_path: Path) -> None:
    program = """
        import sys
        from parallax_compile.lowering.store import Entry, Store
        store = Store(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(25):
            store.put([Entry({"device": "GPU", "stage": f"{sys.argv[2]} {number}"}, {"block_m": 64})])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, name], **pipes) for name in ("first", "second")]  # type: ignore[call-overload]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:  # both are past their imports: now they meet
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert len(Store(tmp_path).entries()) == 50
    assert not list(tmp_path.glob(".gpu*")), "temporary files are left"


@pytest.mark.parametrize("damage", ["truncated", "foreign", "binary", "empty"])
def test_a_damaged_file_is_set_aside_and_reported_and_rebuilt(store: Store, damage: str) -> None:
    store.put([entry(1)])
    (path,) = store.directory.glob("*.json")  # type: ignore[union-attr]
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[:-40], "foreign": b'{"format": "x"}', "binary": b"\xff\xfe\x00", "empty": b""}[damage]
    )
    with pytest.warns(UserWarning, match="set aside"):
        assert store.entries() == {}
    aside = path.with_name(f"{path.name}.aside-1")
    assert aside.exists() and not path.exists()
    assert store.put([entry(2)]) and list(store.entries()) == [entry(2).digest]
    assert len(store.problems) == 1


def test_a_forged_entry_is_dropped_and_the_others_are_kept(store: Store) -> None:
    store.put([entry(1), entry(2)])
    (path,) = store.directory.glob("*.json")  # type: ignore[union-attr]
    data = json.loads(path.read_text())
    data["entries"][entry(1).digest]["key"]["stage"] = "another"
    data["entries"]["nonsense"] = 5
    path.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="does not match its key"):
        assert list(store.entries()) == [entry(2).digest]
    assert decoded(path.read_text())[1] == [], "what is sound was written back"


def test_a_read_only_folder_is_read_and_what_is_found_holds_for_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    Store(folder).put([entry(1)])
    Store(folder).export(tmp_path / "exported.json")
    (tmp_path / "exported.json").chmod(0o444)
    for path in (tmp_path, folder, *folder.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    chain = [path for path in folder.parents if path != Path("/")]
    modes = {path: path.stat().st_mode for path in chain}
    root = os.geteuid() == 0
    try:
        if root:  # the superuser may write everywhere: be nobody for a while
            for path in chain:
                path.chmod(modes[path] | 0o055)
            os.seteuid(65534)
        store = Store(folder)
        assert list(store.entries()) == [entry(1).digest]
        with pytest.warns(UserWarning, match="for this process only"):
            assert store.put([entry(2)]) is False
        assert set(store.entries()) == {entry(1).digest, entry(2).digest}
        with pytest.raises(StoreError, match="cannot write"):
            store.remove(lambda e: True)
        with (
            pytest.warns(UserWarning, match="cannot write"),
            pytest.raises(StoreError, match=r"was read, but .* cannot be written"),
        ):
            Store(folder).load(tmp_path / "exported.json")
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
        folder.chmod(0o755)
        tmp_path.chmod(0o755)
    assert list(Store(folder).entries()) == [entry(1).digest]


def test_export_and_import(store: Store, tmp_path: Path) -> None:
    store.put([entry(1), entry(2)])
    assert store.export(tmp_path / "out.json", lambda e: e.key["stage"] == "stage 2") == 1
    other = Store(tmp_path / "other")
    assert other.load(tmp_path / "out.json") == 1 and list(other.entries()) == [entry(2).digest]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        other.load(tmp_path / "bad.json")
    with pytest.raises(StoreError, match="cannot read"):
        other.load(tmp_path / "none.json")


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARALLAX_STORE", str(tmp_path))
    assert default_directory() == tmp_path
    monkeypatch.setenv("PARALLAX_STORE", "off")
    assert default_directory() is None and Store().entries() == {}
    monkeypatch.delenv("PARALLAX_STORE")
    assert "parallax-compile" in str(default_directory())


# --- lookups --------------------------------------------------------------------------------------------------------


def question(**changes: Any) -> tuned.Question:
    fields = {
        "stage": "core_forward", "template": "t", "device": "GPU", "capability": "12.3", "dtype": "bfloat16",
        "width": 64, "value_width": 64, "gqa": 1, "mask": "none", "spec": '{"mods":{},"switches":{"HAS_PROBE":true}}',
        "minor": '{"SAVE_VALUE_MEAN":true}', "q_length": 2048, "kv_length": 2048, "bucket": "2048x2048", "package": "1",
        "torch": "2", "triton": "3",
    }  # fmt: skip
    return tuned.Question(**{**fields, **changes})  # type: ignore[arg-type]


LIMITS = {
    "width": 64,
    "value_width": 64,
    "itemsize": 2,
    "row_tiles": 1,
    "shared_memory_limit": 227 * 1024,
    "tma": True,
}
WINNER = Candidate(128, 32, 8, 2)


def winner(of: tuned.Question, candidate: Candidate = WINNER) -> Entry:
    return Entry(of.key(), dataclasses.asdict(candidate), {"milliseconds": 0.5, "shape": [1, 2, 3]}, {"device": "GPU"})


def answer(asked: tuned.Question, **limits: Any) -> tuned.Answer:
    with tuned.listening() as heard:
        found = tuned.offered(asked, **{**LIMITS, **limits})
    assert list(heard[0].candidates) == found
    return heard[0]


def test_levels_in_their_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    default = candidates("core_forward", **LIMITS)
    assert answer(question()).level == "heuristic" and answer(question()).candidates == tuple(default)
    other_device = winner(question(device="another GPU", torch="1", q_length=4096, bucket="4096x2048"))
    monkeypatch.setattr(tuned, "shipped", lambda: {other_device.digest: other_device})
    assert answer(question()).level == "shipped" and "another device" in answer(question()).why()
    store.put([winner(question(q_length=1500, minor="{}"))])
    assert answer(question()).level == "bucket"
    store.put([winner(question())])
    found = answer(question())
    assert found.level == "exact" and found.candidates == (WINNER, *default)
    assert "0.500 ms" in found.why()
    assert answer(question(), options={"BLOCK_M": 64}).level == "kernel_options"


def test_a_stages_digest_is_of_its_specialised_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def digests() -> list[str]:
        return [tuned.template_digest.__wrapped__(stage) for stage in ("core_forward", "decode_split")]

    before, load = digests(), tuned.templates.load
    changed = lambda name: load(name) + "#" * name.endswith("_specialized")
    monkeypatch.setattr(tuned.templates, "load", changed)
    assert [new == old for new, old in zip(digests(), before, strict=True)] == [False, True]


@pytest.mark.parametrize(
    "other", [{"torch": "1"}, {"template": "x"}, {"bucket": "1024x1024"}, {"gqa": 2}, {"mask": "blocks"}]
)
def test_a_winner_of_another_problem_or_version_is_not_taken(store: Store, other: dict[str, Any]) -> None:
    store.put([winner(question(**other))])
    assert answer(question()).level == "heuristic"


@pytest.mark.parametrize(
    "candidate, limits",
    [
        (Candidate(64, 64, 4, 3, tma=True), {"tma": False}),
        (Candidate(256, 256, 8, 8), {}),
        (Candidate(128, 64, 8, 2), {"q_block": 64, "kv_block": 64}),
    ],
    ids=["no descriptors", "too much shared memory", "does not divide the blocks"],
)
def test_a_winner_that_does_not_fit_is_passed_over(store: Store, candidate: Candidate, limits: dict[str, Any]) -> None:
    store.put([winner(question(), candidate)])
    found = answer(question(), **limits)
    assert found.level == "heuristic" and found.passed_over == ("exact",) and "passed over" in found.why()


@pytest.mark.parametrize("change", [{"block_m": 48}, {"num_warps": 3}, {"novel": 1}, {"block_n": "64"}])
def test_a_candidate_that_makes_no_sense_is_passed_over(store: Store, change: dict[str, Any]) -> None:
    found = winner(question())
    store.put([dataclasses.replace(found, candidate={**found.candidate, **change})])
    assert answer(question()).passed_over == ("exact",)


def test_buckets_hold_lengths_up_to_their_name() -> None:
    assert [tuned.bucket(length) for length in (1, 16, 17, 2048, 2049, 4096)] == [16, 16, 32, 2048, 4096, 4096]


def test_the_shipped_tables_are_sound_and_say_where_they_come_from() -> None:
    for path in sorted(Path(tuned.__file__).parent.glob("shipped_*.json")):
        entries, problems = decoded(path.read_text())
        assert entries and not problems and encoded(entries.values()) == path.read_text(), path.name
        for shipped in entries.values():
            assert tuned._candidate(shipped) is not None
            assert {"source", "device", "date", "versions", "tested"} <= set(shipped.provenance)
            assert not shipped.provenance["tested"] or shipped.result["milliseconds"] > 0


@pytest.mark.parametrize("gpu", ["l4", "b200"])
def test_an_untested_table_has_every_training_stage_and_says_that_its_kernels_hardly_spill(gpu: str) -> None:
    entries, _ = decoded((Path(tuned.__file__).parent / f"shipped_{gpu}_untested.json").read_text())
    kinds = {(e.key["stage"], e.key["width"], tuned._switches(e.key)["HAS_PROBE"]) for e in entries.values()}
    stages = ("core_forward", "core_backward_query", "core_backward_key")
    assert kinds == set(itertools.product(stages, (64, 128), (False, True)))
    for entry in entries.values():
        takes = entry.result["resources"]
        assert takes["registers"] > 32 and takes["spill_stores"] + takes["spill_loads"] <= 128
        assert not entry.provenance["tested"] and entry.result["milliseconds"] is None


# --- compiled calls -------------------------------------------------------------------------------------------------


def generated(length: int) -> tuple[codegen.GeneratedCode, list[tuned.Answer]]:
    pytest.importorskip("triton")
    inputs = [torch.empty(1, 2, length, 32, dtype=torch.bfloat16, device="meta") for _ in range(4)]  # no shipped width
    with tuned.listening() as heard:
        code = codegen.generate(
            lambda *tensors: plx.attention(*tensors, spec=CAUSAL), inputs, target="sm_100", backward=False
        )
    return code, heard


def test_a_compiled_call_takes_the_winner_of_its_length_and_of_its_bucket(store: Store) -> None:
    code, (before,) = generated(256)
    assert code.stage("core_forward").parameters["BLOCK_M"] == before.candidate.block_m
    picked = Candidate(32, 32, 4, 2)
    store.put([winner(before.question, picked)])
    for length, level in ((256, "exact"), (160, "bucket"), (512, "heuristic")):
        code, (found,) = generated(length)
        assert found.level == level
        parameters = code.stage("core_forward").parameters
        taken = (parameters["BLOCK_M"], parameters["BLOCK_N"], parameters["num_warps"]) == (32, 32, 4)
        assert taken == (level != "heuristic")


def test_a_captured_value_does_not_change_the_question_and_a_constant_does(store: Store) -> None:
    pytest.importorskip("triton")

    def questions(bias: torch.Tensor, factor: float) -> set[tuned.Question]:
        def mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return score * factor + bias[h]

        inputs = [torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device="meta") for _ in range(4)]
        with tuned.listening() as heard:
            codegen.generate(
                lambda *tensors: plx.attention(*tensors, score_mod=mod), inputs, target="sm_90", backward=False
            )
        return {found.question for found in heard}

    assert questions(torch.zeros(2), 2.0) == questions(torch.ones(2), 2.0)
    assert questions(torch.zeros(2), 2.0) != questions(torch.zeros(2), 3.0)


def test_a_new_winner_changes_what_torchs_caches_key_a_graph_by(store: Store) -> None:
    def salts() -> set[str]:
        graphs: list[torch.fx.GraphModule] = []

        def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        for spec in (plx.PARALLAX, plx.LINEAR):  # the core's operator and the scan's
            torch.compiler.reset()
            inputs = [torch.randn(1, 1, 32, 16) for _ in range(4)]
            torch.compile(lambda *tensors, spec=spec: plx.attention(*tensors, spec=spec), backend=record)(*inputs)
        found = set()
        for graph in graphs:
            for node in graph.graph.nodes:
                text = f"{node.args} {node.kwargs}"
                found.update(re.findall(rf"{cache_key.CACHE_SALT}-\w*", text))
        assert len(graphs) == 2
        return found

    (before,) = salts()
    assert before == f"{cache_key.CACHE_SALT}-"
    store.put([entry(1)])
    (after,) = salts()
    assert after == f"{cache_key.CACHE_SALT}-{store.fingerprint()}" != before


def test_the_format_is_named_in_the_file(store: Store) -> None:
    store.put([entry(1)])
    (path,) = store.directory.glob("*.json")  # type: ignore[union-attr]
    assert json.loads(path.read_text())["format"] == FORMAT
