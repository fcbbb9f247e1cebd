"""Comparisons with other systems: benchmarks/peers.py, its sides, benchmarks/same_budget.py. PyTorch is not needed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from benchmarks import peers, peers_packrcnn, same_budget
from benchmarks.peers import OURS, WORKS, Side, environment, in_turns, results_to_score, rows_of, table
from common import UserError, write_json
from config import default_config, finalize_config
from eval import evaluate_coco
from training_plan import make_plan

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
TORCH_SIDE = ast.parse(Path(peers.PEERS_SIDE).read_text())


def record(work="step-256", **changes):
    pairs = [
        {"system": "packrcnn", "precision": "bfloat16", "seconds": [2.0, 3.0, 1.0], "ours": [4.0, 4.0, 4.0]},
        {"system": "torchvision", "precision": "float32", "seconds": [6.0, 30.0, 6.0], "ours": [2.0, 10.0, 3.0]},
    ]
    peaks = {"packrcnn float32": [2048.0, 2048.0], "packrcnn bfloat16": [1024.0], "torchvision float32": [4096.0]}
    return {"work": work, "pairs": pairs, "peak_mib": peaks, "cores": 2, "notes": {}} | changes


# --------------------------------------------------------------------------------------------------------------- tables
def test_a_ratio_is_the_median_of_the_rounds_that_were_run_together():
    ours, half, theirs = rows_of(record())
    assert ours == ["packrcnn", "float32", "4.00", "1", "2.00", "1"]
    assert half == ["packrcnn", "bfloat16", "2.00", "0.50", "1.00", "0.50"]
    assert theirs == ["torchvision", "float32", "6.00", "3.00", "4.00", "2.00"]  # rounds: 3, 3, 2; of medians: 2


def test_the_table_has_the_works_in_their_order_and_names_each_once():
    lines = table([record("predict"), record()]).splitlines()[2:]
    assert len(lines) == 6
    assert lines[0].startswith(f"| {WORKS['step-256'].text}") and lines[3].startswith(f"| {WORKS['predict'].text}")
    assert all(line.split("|")[1].strip() == "" for line in lines[1:3] + lines[4:])


def test_measurements_are_read_back_and_an_empty_folder_is_one_line(tmp_path, capsys):
    assert peers.main(["table", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no measurement" in capsys.readouterr().err
    write_json(tmp_path / "step-256.json", record())
    assert peers.main(["table", str(tmp_path)]) == 0
    assert "| 3.00 " in capsys.readouterr().out


def test_what_is_measured_already_is_not_measured_again(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(peers, "measure", lambda name, args: done.append(name) or record(name))
    monkeypatch.setattr(peers, "versions", lambda *_: {"torch": "2.0"})
    monkeypatch.setattr(peers, "environment", lambda *_: Path("python"))
    write_json(tmp_path / "data.json", record("data"))
    assert peers.main(["measure", str(tmp_path), "--works", "data", "step-256"]) == 0
    assert done == ["step-256"] and "torch 2.0" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["measure"], "measure needs the folder of the measurements"),
    (["environment", "--detectron2", "/nowhere"], "no detectron2/__init__.py in it"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(words, message, capsys):
    assert peers.main(words) == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the environment
def test_only_what_is_missing_is_installed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(peers.venv, "create", lambda folder, **_: calls.append(("create", folder)))
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **_: calls.append(command[1:]))
    sources = tmp_path / "sources"
    (sources / "detectron2").mkdir(parents=True)
    (sources / "detectron2" / "__init__.py").touch()
    env = tmp_path / "env"
    env.mkdir()
    pip = ["-m", "pip", "install", "--quiet"]
    assert environment(env) == env / "bin" / "python"
    assert calls == [("create", env), [*pip, *peers.TORCH]]
    environment(env)
    environment(env, sources)
    assert calls[2:] == [("create", env), [*pip, *(p for p in peers.DETECTRON2 if p not in peers.TORCH)]]


def test_the_sources_of_detectron2_are_on_the_path_of_its_side(monkeypatch):
    monkeypatch.setattr(peers, "environment", lambda env, sources: env / "bin" / "python")
    plain = ["/env/bin/python", "-W", "ignore", peers.PEERS_SIDE, "job.json"]
    assert peers.peers_command(Path("/env"), None, Path("job.json")) == ["env", *plain]
    assert peers.peers_command(Path("/env"), Path("/d2"), Path("job.json")) == ["env", "PYTHONPATH=/d2", *plain]


def test_a_failed_installation_is_one_line_and_not_recorded(tmp_path, monkeypatch):
    def refuse(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(peers.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(peers.subprocess, "run", refuse)
    with pytest.raises(UserError, match="could not be installed"):
        environment(tmp_path)
    assert not (tmp_path / "installed.json").exists()


# ------------------------------------------------------------------------------------------------------- processes
STAND_IN = """
import json, sys
name, each = sys.argv[1:]
say = lambda **content: print(json.dumps(content), flush=True)
print("a library talks")
say(ready={"objects": [3]})
for _ in sys.stdin:
    with open("turns", "a") as f:
        f.write(name)
    if each == "fail":
        sys.exit("out of memory")
    say(seconds=float(each))
say(peak_mib=7.0)
"""


def stand_in(folder, name, each, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", folder)
    (folder / "stand_in.py").write_text(STAND_IN)
    return Side([sys.executable, str(folder / "stand_in.py"), name, each], folder / f"{name}.log")


def test_sides_take_turns_and_the_first_round_is_not_timed(tmp_path, monkeypatch):
    sides = {n: stand_in(tmp_path, n, each, monkeypatch) for n, each in (("a", "1.5"), ("b", "2"))}
    seconds, peaks = in_turns(sides, 3)
    assert (tmp_path / "turns").read_text() == "abababab"
    assert seconds == {"a": [1.5] * 3, "b": [2.0] * 3} and peaks == {"a": 7.0, "b": 7.0}
    assert sides["a"].notes == {"objects": [3]}


def test_a_side_that_fails_is_one_line_and_the_other_one_is_ended(tmp_path, monkeypatch):
    sides = {n: stand_in(tmp_path, n, each, monkeypatch) for n, each in (("a", "1"), ("b", "fail"))}
    with pytest.raises(UserError, match=r"b.log: the process ended before its answer \(out of memory\)"):
        in_turns(sides, 3)
    assert all(side._process.poll() is not None for side in sides.values())


def test_packrcnn_in_float32_takes_turns_with_all_the_others():
    others = [("packrcnn", "bfloat16"), ("torchvision", "float32"), ("torchvision", "bfloat16")]
    words = ["packrcnn", "torchvision"], ["float32", "bfloat16"]
    assert peers.groups(*words, in_pairs=False) == [[OURS, *others]]
    assert peers.groups(*words, in_pairs=True) == [[OURS, other] for other in others]


# ------------------------------------------------------------------------------------------------------- the work
def names_of(tree, variable):
    """Keys of the dictionary that a module assigns to `variable`."""
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == variable]
    return {key.value for key in value.keys}


def test_both_sides_know_every_kind_of_work():
    kinds = {work.kind for work in WORKS.values()}
    assert set(peers_packrcnn.WORKS) == kinds == names_of(TORCH_SIDE, "WORKS")


@pytest.mark.parametrize("name", ["step-800", "step-256-2", "predict"])
def test_packrcnn_is_set_as_the_job_says(name, tmp_path):
    job = peers.job_of(WORKS[name], "packrcnn", "bfloat16", tmp_path)
    cfg, model = peers_packrcnn.configuration(job), job["model"]
    assert cfg.TRAIN.PRECISION == "bfloat16" and cfg.MODE_MASK and cfg.MODE_FPN
    assert (model["rois"], model["freeze_at"]) == (cfg.FRCNN.BATCH_PER_IM, cfg.BACKBONE.FREEZE_AT)
    assert cfg.PREPROC.TEST_SHORT_EDGE_SIZE == model["short_edge"] == WORKS[name].size
    assert model["proposals"] == cfg.RPN.TRAIN_FPN_NMS_TOPK
    # What peers_torch.py gives the others as constants.
    assert (cfg.RPN.TRAIN_PER_LEVEL_NMS_TOPK, cfg.RPN.TEST_PER_LEVEL_NMS_TOPK, cfg.RPN.TEST_FPN_NMS_TOPK) == (
        2000, 1000, 1000,
    )  # fmt: skip
    assert (cfg.TEST.RESULT_SCORE_THRESH, cfg.TEST.RESULTS_PER_IM, cfg.FRCNN.ROI_SAMPLES) == (0.05, 100, 2)


def test_the_results_to_score_are_neither_perfect_nor_hopeless(tmp_path):
    results_to_score(tmp_path, images=6)
    unit, _ = peers_packrcnn.prepare_score({k: str(tmp_path / f"{n}.json") for k, n in
                                            (("annotations", "truth"), ("results", "results"))})  # fmt: skip
    unit()
    results = json.loads((tmp_path / "results.json").read_text())
    scores = evaluate_coco(str(tmp_path / "truth.json"), results, ["bbox", "segm"], verbose=False)
    assert 0.02 < scores["bbox/AP"] < 0.9 and 0.02 < scores["segm/AP"] < 0.9
    COCO(str(tmp_path / "truth.json")).loadRes(str(tmp_path / "results.json"))  # the peers' reader takes them


def test_packrcnn_reads_each_image_with_objects_once(tmp_path):
    job = peers.job_of(WORKS["data"], "packrcnn", "float32", tmp_path)
    job["model"] |= {"short_edge": 64, "max_size": 128}
    unit, notes = peers_packrcnn.prepare_data(job)
    assert len(unit()) == notes["images"] == 6


@pytest.mark.skipif("TORCH_PYTHON" not in os.environ, reason="TORCH_PYTHON names no Python with torch and torchvision")
@pytest.mark.parametrize("name", ["step-256", "predict", "data", "score"])
def test_torchvision_does_the_work(name, tmp_path):
    peers.write_inputs(WORKS[name], tmp_path)
    write_json(tmp_path / "job.json", peers.job_of(WORKS[name], "torchvision", "float32", tmp_path))
    side = Side([os.environ["TORCH_PYTHON"], peers.PEERS_SIDE, str(tmp_path / "job.json")], tmp_path / "log")
    seconds, peaks = in_turns({"torchvision": side}, 1)
    assert seconds["torchvision"][0] > 0 and peaks["torchvision"] > 100
    assert side.notes.get("objects", [100]) == [100] and side.notes.get("images", 6) == 6


# -------------------------------------------------------------------------------------------------- the same budget
def trained(system, precision, seed, ap):
    return {"system": system, "precision": precision, "seed": seed, "AP": ap, "AP50": 2 * ap, "peak_mib": 2048.0}


def test_scores_of_the_seeds_become_mean_and_spread():
    records = [trained("packrcnn", "float32", i, ap) for i, ap in enumerate((0.40, 0.44, 0.45))]
    lines = same_budget.table([trained("detectron2", "float32", 0, 0.3), *records]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [
        ["packrcnn", "float32", "3", "43.0", "40.0 to 45.0", "86.0", "80.0 to 90.0", "2.0"],
        ["detectron2", "float32", "1", "30.0", "30.0 to 30.0", "60.0", "60.0 to 60.0", "2.0"],
    ]


def test_finished_trainings_are_kept_and_seeds_come_one_after_the_other(tmp_path, monkeypatch, capsys):
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        write_json(tmp_path / "annotations" / f"instances_{part}.json", {})
    done, out = [], tmp_path / "out"
    monkeypatch.setattr(same_budget, "run_one", lambda *key: done.append(key[:3]) or trained(*key[:3], ap=0.1))
    words = ["run", str(out), "--data", str(tmp_path), "--precisions", "float32", "bfloat16"]
    assert same_budget.main([*words, "--seeds", "1"]) == same_budget.main([*words, "--seeds", "2"]) == 0
    assert done == [("packrcnn", p, s) for s in (0, 1) for p in ("float32", "bfloat16")]
    assert "| packrcnn" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["table", "{}"], "holds no finished training"),
    (["run", "{}", "--data", "{}"], "name the folder of BCCD in COCO's format"),
    (["run", "{}", "--systems", "detectron2"], "needs --detectron2 DIR"),
])  # fmt: skip
def test_wrong_arguments_of_the_same_budget_are_one_line(words, message, tmp_path, capsys):
    assert same_budget.main([word.format(tmp_path) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_both_sides_have_the_same_learning_rates():
    (function,) = [n for n in TORCH_SIDE.body if isinstance(n, ast.FunctionDef) and n.name == "rate_at"]
    names = {}
    exec(compile(ast.Module([function], []), peers.PEERS_SIDE, "exec"), names)
    theirs = [names["rate_at"](step, same_budget.PEERS_JOB) for step in range(same_budget.STEPS)]
    cfg = finalize_config(default_config().update_args(["DATA.NUM_CATEGORY=3", *same_budget.SETTINGS]))
    plan = make_plan(cfg, 1, 292)
    assert plan.total_steps == same_budget.STEPS and plan.total_batch == same_budget.IMAGES
    assert [plan.learning_rate(step) for step in range(plan.total_steps)] == pytest.approx(theirs, rel=1e-9)
